"""The evaluator: lm-eval's numbers, made once what can be made once, and broken models as results."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from evaluation_cases import spec_of, write_local_tasks
from lm_eval.api.metrics import mean_stderr
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quantsweep.errors import EvaluationError
from quantsweep.evaluation import scoring
from quantsweep.evaluation.evaluator import Evaluator
from quantsweep.evaluation.results import TaskResult
from quantsweep.evaluation.scoring import Plan, Scorer
from quantsweep.mini import model_path
from quantsweep.models.loading import LoadedModel, load_model
from quantsweep.tasks.definition import _MINI_TASKS
from quantsweep.trial.specs import ModelSpec, TaskSpec
from tests.cases import overflowing

MINI_TASKS = ("mini_cloze", "mini_continuation", "mini_ppl")
LOCAL_TASKS = ("lambada_openai", "piqa", "winogrande", "copa", "wikitext")
LIMIT = 12

select = scoring._selecting


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelSpec(name="m", family="f", path=str(model_path("mini-neox-0.3m")), dtype="float32"), "cpu")


@pytest.fixture(scope="module")
def task_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_local_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def evaluator(loaded: LoadedModel, task_path: Path) -> Evaluator:
    return Evaluator(loaded, task_path=task_path)


@pytest.fixture
def original_weights(loaded: LoadedModel) -> Iterator[None]:
    yield
    loaded.restore()


def simple_evaluate(loaded: LoadedModel, folder: Path, spec: TaskSpec) -> dict[str, Any]:
    """What lm-eval itself says: metrics, and samples in the order of the documents."""
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=5)
    manager = TaskManager(include_path=[folder], include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, tasks=[spec.lm_eval_task], limit=spec.limit, num_fewshot=spec.num_fewshot, task_manager=manager, bootstrap_iters=0
    )
    return {"metrics": results["results"][spec.lm_eval_task], "samples": results["samples"][spec.lm_eval_task]}


def assert_equal(ours: TaskResult, theirs: dict[str, Any]) -> None:
    """All metrics, and the outcomes of each example."""
    for metric in ours.metrics:
        assert metric.value == pytest.approx(theirs["metrics"][f"{metric.name},none"], rel=1e-5), metric.name
    assert ours.num_samples == len(theirs["samples"])
    for name, outcomes in (("acc", ours.samples.correct), ("acc_norm", ours.samples.correct_norm)):
        expected = [bool(sample[name]) for sample in theirs["samples"]] if name in theirs["samples"][0] else None
        assert outcomes == expected


@pytest.mark.parametrize(
    ("name", "shots"), [*((name, None) for name in (*MINI_TASKS, *LOCAL_TASKS)), ("mini_continuation", 2), ("winogrande", 2), ("copa", 2)]
)
def test_values_are_those_of_simple_evaluate(
    name: str, shots: int | None, loaded: LoadedModel, evaluator: Evaluator, task_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    spec = spec_of(name, limit=LIMIT, num_fewshot=shots)
    result = evaluator.evaluate(spec)
    assert_equal(result, simple_evaluate(loaded, _MINI_TASKS if name in MINI_TASKS else task_path, spec))


def test_log_likelihoods_are_those_of_simple_evaluate(loaded: LoadedModel, evaluator: Evaluator) -> None:
    """Of the gold answer: the only one of a cloze, the right choice of several, the whole document."""
    for name in MINI_TASKS:
        spec = spec_of(name, limit=LIMIT)
        samples = simple_evaluate(loaded, _MINI_TASKS, spec)["samples"]
        gold = [sample["filtered_resps"][sample["target"] if name == "mini_continuation" else 0] for sample in samples]
        expected = [answer if name == "mini_ppl" else answer[0] for answer in gold]
        assert evaluator.evaluate(spec).samples.loglikelihood == pytest.approx(expected, rel=1e-5)


def test_other_architectures_and_compute_dtypes(caplog: pytest.LogCaptureFixture) -> None:
    """OPT in bfloat16, where lm-eval must be told to take the softmax in float32, as we do."""
    caplog.set_level(logging.CRITICAL)
    opt = load_model(ModelSpec(name="m", family="f", path=str(model_path("mini-opt-0.4m")), dtype="bfloat16"), "cpu")
    spec = spec_of("mini_ppl", limit=4)
    result = Evaluator(opt, batch_size=1).evaluate(spec)
    model = HFLM(pretrained=opt.model, tokenizer=opt.tokenizer, batch_size=1, softmax_dtype="float32")
    manager = TaskManager(include_path=[_MINI_TASKS], include_defaults=False)
    theirs = lm_eval.simple_evaluate(model, tasks=["mini_ppl"], limit=4, task_manager=manager, bootstrap_iters=0)
    assert result.primary.value == pytest.approx(theirs["results"]["mini_ppl"]["bits_per_byte,none"], rel=1e-3)


class TestResult:
    def test_standard_error_and_direction(self, evaluator: Evaluator) -> None:
        result = evaluator.evaluate(spec_of("mini_continuation", limit=LIMIT))
        by_name = {metric.name: metric for metric in result.metrics}
        assert result.samples.correct is not None
        assert by_name["acc"].stderr == pytest.approx(mean_stderr([float(c) for c in result.samples.correct]))
        assert by_name["acc"].higher_is_better
        assert result.primary is by_name["acc"]
        assert [metric.is_primary for metric in result.metrics].count(True) == 1

    def test_rolling_tasks_have_bits_per_byte(self, evaluator: Evaluator) -> None:
        result = evaluator.evaluate(spec_of("mini_ppl", limit=LIMIT))
        values = {metric.name: metric.value for metric in result.metrics}
        assert values["bits_per_byte"] == pytest.approx(math.log2(values["byte_perplexity"]))
        assert result.samples.num_bytes is not None
        total = -sum(result.samples.loglikelihood) / sum(result.samples.num_bytes) / math.log(2)
        assert values["bits_per_byte"] == pytest.approx(total, rel=1e-6)
        assert result.samples.correct is None

    def test_bits_per_byte_is_added_where_a_rolling_task_lacks_it(self, loaded: LoadedModel, tmp_path: Path) -> None:
        (tmp_path / "bytes.yaml").write_text(
            f"include: {_MINI_TASKS}/mini_ppl.yaml\ntask: bytes\ntag: null\nmetric_list:\n"
            "  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}\n"
        )
        spec = spec_of("mini_ppl", name="bytes", lm_eval_task="bytes", primary_metric="byte_perplexity", limit=3)
        result = Evaluator(loaded, task_path=tmp_path).evaluate(spec)
        values = {metric.name: metric.value for metric in result.metrics}
        assert set(values) == {"byte_perplexity", "bits_per_byte"}
        assert values["byte_perplexity"] == pytest.approx(2 ** values["bits_per_byte"])

    def test_one_example_has_no_standard_error(self, evaluator: Evaluator) -> None:
        result = evaluator.evaluate(spec_of("mini_cloze", limit=1))
        assert result.num_samples == 1
        assert all(math.isnan(metric.stderr) for metric in result.metrics)

    def test_provenance_and_cost(self, evaluator: Evaluator) -> None:
        result = evaluator.evaluate(spec_of("mini_continuation", limit=LIMIT))
        assert result.lm_eval_version == lm_eval.__version__
        assert result.task_version == "1.0"
        assert result.batch_size == 8
        assert 0 < result.num_tokens < result.num_input_tokens
        assert result.seconds > 0
        assert result.num_nonfinite == result.num_truncated == 0

    def test_data_that_were_pinned_are_what_is_read_or_nothing_is(self, loaded: LoadedModel) -> None:
        spec = spec_of("mini_cloze", limit=1)
        revision = Evaluator(loaded).evaluate(spec).data_revision
        assert revision is not None
        pinned = Evaluator(loaded, data_revisions={spec.name: revision, "another": "hub:0"})
        assert pinned.evaluate(spec).data_revision == revision
        moved = Evaluator(loaded, data_revisions={spec.name: "hub:0123"})
        with pytest.raises(EvaluationError, match=rf"its data are {revision} here, and were pinned as hub:0123.*prewarm … --update"):
            moved.evaluate(spec)

    def test_requests_hash_tells_what_can_be_paired(self, evaluator: Evaluator) -> None:
        hashes = {
            evaluator.evaluate(spec).requests_hash
            for spec in (spec_of("mini_cloze", limit=3), spec_of("mini_cloze", limit=4), spec_of("mini_cloze", limit=3, num_fewshot=1))
        }
        assert len(hashes) == 3
        opt = load_model(ModelSpec(name="o", family="f", path=str(model_path("mini-opt-0.4m")), dtype="float32"), "cpu")
        assert Evaluator(opt).evaluate(spec_of("mini_cloze", limit=3)).requests_hash in hashes


class TestSharing:
    def test_nothing_is_tokenized_or_loaded_twice(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = spec_of("mini_continuation", limit=4)
        encoded: list[str] = []
        tokenizer = type(loaded.tokenizer)
        encode = tokenizer.encode
        monkeypatch.setattr(tokenizer, "encode", lambda self, text, **options: encoded.append(text) or encode(self, text, **options))
        evaluator = Evaluator(loaded)
        first = evaluator.evaluate(spec)
        assert encoded
        texts = encoded[2:]  # the first two ask what the tokenizer puts around a text
        assert len(texts) == len(set(texts))  # nor twice within a task
        encoded.clear()
        monkeypatch.setattr("quantsweep.evaluation.evaluator.load_task", lambda *_: pytest.fail("loaded again"))
        second = evaluator.evaluate(spec)
        assert not encoded
        assert first.metrics == second.metrics
        assert first.samples == second.samples

    def test_weights_that_change_in_between_change_the_scores(self, loaded: LoadedModel, original_weights: None) -> None:
        evaluator, spec = Evaluator(loaded), spec_of("mini_ppl", limit=3)
        before = evaluator.evaluate(spec)
        for layer in loaded.layers.values():
            layer.write(layer.read() * 0.5)
        assert evaluator.evaluate(spec).primary.value > before.primary.value * 1.01
        loaded.restore()
        assert evaluator.evaluate(spec).metrics == before.metrics

    def test_prepare_does_what_the_first_evaluation_would(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        evaluator, spec = Evaluator(loaded), spec_of("mini_cloze", limit=2)
        evaluator.prepare(spec)
        monkeypatch.setattr("quantsweep.evaluation.evaluator.load_task", lambda *_: pytest.fail("loaded again"))
        evaluator.prepare(spec)
        assert evaluator.evaluate(spec).num_samples == 2


class TestBrokenModels:
    """filterwarnings=error: these would also fail on a warning of numpy or torch."""

    @pytest.mark.parametrize("name", [*MINI_TASKS, "winogrande", "wikitext"])
    @pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
    def test_nan_and_infinity_are_results(
        self, name: str, value: float, loaded: LoadedModel, evaluator: Evaluator, original_weights: None
    ) -> None:
        layer = loaded.layers["gpt_neox.layers.3.mlp.dense_4h_to_h"]
        layer.write(torch.full((layer.out_features, layer.in_features), value))
        result = evaluator.evaluate(spec_of(name, limit=3))
        assert result.num_nonfinite > 0
        assert not math.isfinite(result.samples.loglikelihood[0])
        for metric in result.metrics:
            assert not math.isfinite(metric.value)
        for outcomes in (result.samples.correct, result.samples.correct_norm):
            assert outcomes is None or None in outcomes

    def test_no_accuracy_is_made_of_nan(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Overflow of float16 outside the quantized layers: it looked like an accuracy of 0.35."""
        path = str(overflowing(tmp_path / "m"))
        found = {}
        for dtype in ("float16", "bfloat16"):
            model = load_model(ModelSpec(name="m", family="f", path=path, dtype=dtype), "cpu")
            found[dtype] = Evaluator(model).evaluate(spec_of("mini_continuation", limit=3))
        half, brain = found["float16"], found["bfloat16"]
        assert half.num_nonfinite == 12
        assert [math.isnan(metric.value) for metric in half.metrics] == [True, True]
        assert half.samples.correct == [None] * 3
        assert "12 of 12 log-likelihoods are not finite, so that 3 of 3 examples have no outcome" in caplog.text
        assert brain.num_nonfinite == 0
        assert all(math.isfinite(metric.value) for metric in brain.metrics)

    def test_one_answer_that_is_impossible_is_an_outcome(self, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
        """-inf among finite ones can be compared; nothing but -inf cannot, nor NaN."""
        spec = spec_of("mini_continuation", limit=2)
        evaluator.prepare(spec)
        for first, decided in ((-math.inf, True), (math.nan, False), (math.inf, False)):
            answers = [(first, False), *[(-float(n), False) for n in range(1, 8)]]
            monkeypatch.setattr(Evaluator, "_score", lambda *_, answers=answers: answers)
            result = evaluator.evaluate(spec)
            assert math.isfinite(result.primary.value) is decided
            assert result.samples.correct is not None
            assert [outcome is not None for outcome in result.samples.correct] == [decided, True]
        monkeypatch.setattr(Evaluator, "_score", lambda *_: [(-math.inf, False)] * 8)
        assert math.isnan(evaluator.evaluate(spec).primary.value)

    def test_a_model_that_overflows_from_the_start(self) -> None:
        """Its original weights do: the evaluator meets NaN logits before it has scored anything."""
        half = load_model(ModelSpec(name="m", family="f", path=str(model_path("mini-neox-0.3m")), dtype="float16"), "cpu")
        layer = half.layers["gpt_neox.layers.3.mlp.dense_4h_to_h"]
        layer.write(torch.full((layer.out_features, layer.in_features), 6e4))
        evaluator = Evaluator(half)
        result = evaluator.evaluate(spec_of("mini_cloze", limit=3))
        assert evaluator._scorer._head is None
        assert result.num_nonfinite == 3
        assert math.isnan(result.samples.loglikelihood[0])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_selection_is_judged_by_the_finite_logits(self, value: float, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        def break_first(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
            return logits.index_fill(-1, torch.tensor([0]), value)

        head = loaded.model.get_output_embeddings()
        handle = head.register_forward_hook(break_first)
        try:
            assert Scorer(loaded.model)._head is head
            monkeypatch.setattr(scoring, "_selecting", lambda head, positions_N: select(head, positions_N.flip(0)))
            assert Scorer(loaded.model)._head is None  # other positions' logits are not taken for the same
        finally:
            handle.remove()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_without_a_finite_logit_all_positions_are_computed(self, value: float, loaded: LoadedModel) -> None:
        handle = loaded.model.get_output_embeddings().register_forward_hook(lambda _module, _args, logits: torch.full_like(logits, value))
        try:
            evaluator = Evaluator(loaded)
            assert evaluator._scorer._head is None
            assert evaluator.evaluate(spec_of("mini_cloze", limit=2)).num_nonfinite == 2
        finally:
            handle.remove()

    def test_an_exploded_perplexity_is_infinite(self, loaded: LoadedModel, evaluator: Evaluator, original_weights: None) -> None:
        """Finite log-likelihoods, whose exponential overflows."""
        layer = loaded.layers["gpt_neox.layers.3.mlp.dense_4h_to_h"]
        head = loaded.model.get_output_embeddings()
        layer.write(layer.read() * 1e3)
        norm = loaded.model.gpt_neox.final_layer_norm
        scale = norm.weight.detach().clone()
        norm.weight.data.mul_(1e4)
        try:
            result = evaluator.evaluate(spec_of("mini_cloze", limit=3))
        finally:
            norm.weight.data.copy_(scale)
        assert head is not None
        assert result.num_nonfinite == 0
        values = {metric.name: metric.value for metric in result.metrics}
        assert values["perplexity"] == math.inf


class TestProgress:
    def test_once_a_batch(self, loaded: LoadedModel) -> None:
        signs: list[None] = []
        spec = spec_of("mini_continuation", limit=4)
        evaluator = Evaluator(loaded, batch_size=3, on_progress=lambda: signs.append(None))
        evaluator.prepare(spec)
        signs.clear()
        evaluator.evaluate(spec)
        batches = evaluator._prepared[spec.task_key].batches
        assert len(signs) == len(batches) > 1

    def test_after_each_batch_and_not_before(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        events: list[str] = []
        score_tokens = Scorer._score_tokens
        monkeypatch.setattr(Scorer, "_score_tokens", lambda *arguments: events.append("batch") or score_tokens(*arguments))
        scorer = Scorer(loaded.model, lambda: events.append("sign"))
        plan = Plan.of([([1, 2, 3], [4]), ([5], [6]), ([7, 8], [9])], loaded.max_length)
        scorer.score(plan.batches(1), plan.num_spans)
        assert events == ["batch", "sign"] * 3

    def test_within_the_preparation_of_many_documents(self, loaded: LoadedModel) -> None:
        """Loaded, rendered (2 × 100 documents), tokenized (2 × 100), divided into batches."""
        signs: list[None] = []
        Evaluator(loaded, on_progress=lambda: signs.append(None)).prepare(spec_of("mini_cloze", limit=250))
        assert len(signs) == 3 + 2 + 2


class TestOutOfMemory:
    @pytest.fixture
    def small_memory(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """A device that holds two sequences; the list gathers the batch sizes that were tried."""
        tried: list[int] = []
        score_tokens = Scorer._score_tokens

        def limited(self: Scorer, batch: Any, with_greedy: bool) -> Any:
            tried.append(len(batch.input_BT))
            if len(batch.input_BT) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return score_tokens(self, batch, with_greedy)

        monkeypatch.setattr(Scorer, "_score_tokens", limited)
        return tried

    def test_the_batch_is_halved_recorded_and_kept(self, loaded: LoadedModel, evaluator: Evaluator, small_memory: list[int]) -> None:
        spec = spec_of("mini_continuation", limit=4)
        small = Evaluator(loaded, batch_size=8)
        result = small.evaluate(spec)
        assert small_memory[:3] == [8, 4, 2]
        assert result.batch_size == 2
        small_memory.clear()
        again = small.evaluate(spec)
        assert max(small_memory) == 2
        assert again.metrics == result.metrics

    def test_the_numbers_do_not_depend_on_it(self, loaded: LoadedModel, evaluator: Evaluator) -> None:
        spec = spec_of("mini_continuation", limit=LIMIT)
        expected = evaluator.evaluate(spec)
        for batch_size in (1, 3, 64):
            result = Evaluator(loaded, batch_size=batch_size).evaluate(spec)
            assert result.samples.loglikelihood == pytest.approx(expected.samples.loglikelihood, rel=1e-5)
            assert result.samples.correct == expected.samples.correct

    def test_one_sequence_that_does_not_fit_is_the_callers_affair(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        def never(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        evaluator = Evaluator(loaded, batch_size=4)
        monkeypatch.setattr(Scorer, "_score_tokens", never)
        with pytest.raises(torch.OutOfMemoryError):
            evaluator.evaluate(spec_of("mini_cloze", limit=2))

    def test_a_batch_of_none(self, loaded: LoadedModel) -> None:
        with pytest.raises(EvaluationError, match="batch_size must be at least 1, or null for the default; got 0"):
            Evaluator(loaded, batch_size=0)


class TestScoring:
    def test_texts_too_long_lose_their_beginning(self, loaded: LoadedModel, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
        (tmp_path / "long.py").write_text(
            "from datasets import Dataset\n\n"
            "def load(**_):\n    return {'test': Dataset.from_list([{'text': 'the king ' * 400 + 'went'}] * 2)}\n"
        )
        (tmp_path / "long.yaml").write_text(
            f"include: {_MINI_TASKS}/mini_cloze.yaml\ntask: long\ntag: null\ncustom_dataset: !function long.load\n"
        )
        spec = spec_of("mini_cloze", name="long", lm_eval_task="long")
        result = Evaluator(loaded, task_path=tmp_path).evaluate(spec)
        assert result.num_truncated == 2
        assert result.num_input_tokens == loaded.max_length  # the two are the same input
        assert "2 of 2 texts are longer than the 256 tokens" in caplog.text
        caplog.set_level(logging.CRITICAL)
        assert_equal(result, simple_evaluate(loaded, tmp_path, spec))

    def test_equal_inputs_are_computed_once(self) -> None:
        plan = Plan.of([([1, 2], [3]), ([1, 2], [4]), ([1], [2, 5]), ([1, 2], [4, 5])], max_length=8)
        assert [len(row.tokens) for row in plan.rows] == [3, 2]
        assert plan.num_input_tokens == 5
        assert plan.num_scored_tokens == 6

    def test_a_model_whose_head_cannot_be_hooked_is_scored_in_full(
        self, loaded: LoadedModel, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = spec_of("mini_cloze", limit=3)
        expected = evaluator.evaluate(spec)
        monkeypatch.setattr(type(loaded.model), "get_output_embeddings", lambda _self: None)
        plain = Evaluator(loaded)
        assert plain._scorer._head is None
        assert plain.evaluate(spec).samples.loglikelihood == pytest.approx(expected.samples.loglikelihood, rel=1e-5)

    def test_more_shots_than_there_are_examples(self, evaluator: Evaluator) -> None:
        with pytest.raises(EvaluationError, match=r"task copa: lm-eval cannot render its requests \(num_fewshot=99\): Sample larger"):
            evaluator.evaluate(spec_of("copa", num_fewshot=99))

    def test_answers_that_cannot_be_scored_are_named(self, loaded: LoadedModel, tmp_path: Path) -> None:
        (tmp_path / "empty.yaml").write_text(f"include: {_MINI_TASKS}/mini_cloze.yaml\ntask: empty\ntag: null\ndoc_to_target: ''\n")
        spec = spec_of("mini_cloze", name="empty", lm_eval_task="empty", limit=2)
        with pytest.raises(EvaluationError, match="task empty, document 0: an answer of 0 tokens cannot be scored"):
            Evaluator(loaded, task_path=tmp_path).evaluate(spec)


def test_nothing_is_printed(loaded: LoadedModel, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    Evaluator(loaded).evaluate(spec_of("mini_continuation", limit=2))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_samples_are_float32(evaluator: Evaluator) -> None:
    for value in evaluator.evaluate(spec_of("mini_cloze", limit=3)).samples.loglikelihood:
        assert float(np.float32(value)) == value
