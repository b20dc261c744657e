"""Perplexity of windows: against a loop of its own, its conventions on examples made by hand, the published protocols, what is refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from evaluation_cases import CONF, spec_of
from tokenizers.processors import TemplateProcessing
from torch import nn

from quantsweep.composing.composition import compose_base, search_folders
from quantsweep.composing.prepare import Prepared, prepare, refuse_unpinned
from quantsweep.errors import ConfigurationError, EvaluationError
from quantsweep.evaluation.evaluator import Evaluator
from quantsweep.evaluation.perplexity import PROTOCOLS, Perplexity, metrics_of
from quantsweep.evaluation.scoring import Scorer
from quantsweep.mini import TASKS_DIR, model_path
from quantsweep.models.loading import LoadedModel, load_model
from quantsweep.planning.shards import assumed_tokens
from quantsweep.trial.specs import PERPLEXITY, ModelSpec, TaskSpec

DOCUMENTS = [json.loads(line)["text"] for line in (TASKS_DIR / "data" / "ppl.jsonl").read_text().splitlines()]
PPL = "mini_window_ppl"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelSpec(name="m", family="f", path=str(model_path("mini-neox-0.3m")), dtype="float32"), "cpu")


@pytest.fixture(scope="module")
def evaluator(loaded: LoadedModel) -> Evaluator:
    return Evaluator(loaded)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tenth of the bundled documents: tokenized in no time."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS[:40]))
    return file


def gptq_perplexity(loaded: LoadedModel, stream_1L: torch.Tensor, window: int, num_windows: int | None = None) -> float:
    """The loop of GPTQ's opt.py as it is described, in plain torch: no batches, all logits, torch's own cross-entropy."""
    number = num_windows or stream_1L.numel() // window
    total = []
    for place in range(number):
        batch = stream_1L[:, place * window : (place + 1) * window]
        with torch.no_grad():
            logits = loaded.model(batch).logits
        loss = nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        total.append(loss.double() * window)
    return math.exp(float(torch.stack(total).sum()) / (number * window))


class TestValue:
    def test_it_is_that_of_a_plain_loop(self, loaded: LoadedModel, evaluator: Evaluator) -> None:
        """In float32, summed in another order: equal to 1e-6."""
        result = evaluator.evaluate(spec_of(PPL, limit=12))
        stream = loaded.tokenizer("\n\n".join(DOCUMENTS), return_tensors="pt").input_ids
        assert result.primary.name == "perplexity"
        assert result.primary.value == pytest.approx(gptq_perplexity(loaded, stream, 256, 12), rel=1e-6)
        assert (result.window, result.num_samples, result.num_tokens) == (256, 12, 12 * 255)

    def test_the_tail_is_dropped_and_the_batch_changes_nothing(self, loaded: LoadedModel, text: Path) -> None:
        stream = loaded.tokenizer("\n\n".join(DOCUMENTS[:40]), return_tensors="pt").input_ids
        expected = gptq_perplexity(loaded, stream, 100)
        assert stream.numel() % 100
        for batch_size in (None, 3):
            result = Evaluator(loaded, batch_size=batch_size).evaluate(spec_of(PPL, path=str(text), window=100))
            assert result.num_samples == stream.numel() // 100
            assert result.primary.value == pytest.approx(expected, rel=1e-6)

    def test_a_model_that_knows_nothing_has_the_vocabularys_size(self, loaded: LoadedModel, evaluator: Evaluator, text: Path) -> None:
        """Whatever the window: a sum over T−1 targets that is divided by T would give V^((T−1)/T)."""
        head = loaded.model.get_output_embeddings()
        handle = head.register_forward_hook(lambda _module, _input, output: torch.zeros_like(output))
        try:
            for window in (2, 16):
                result = evaluator.evaluate(spec_of(PPL, path=str(text), limit=3, window=window))
                assert result.primary.value == pytest.approx(len(head.weight), rel=1e-6)
        finally:
            handle.remove()

    def test_windows_count_alike(self) -> None:
        """Two windows by hand: mean log-likelihoods log ½ and log ⅛ are a perplexity of √16."""
        perplexity, cross_entropy = metrics_of(np.log([0.5, 0.125]), "perplexity")
        assert perplexity.value == pytest.approx(4)
        assert perplexity.is_primary
        assert cross_entropy.value == pytest.approx(math.log(4))
        # s / √n of (log 2, log 8), and the exponential's slope times it
        assert cross_entropy.stderr == pytest.approx(math.log(4) / math.sqrt(2) / math.sqrt(2))
        assert perplexity.stderr == pytest.approx(4 * cross_entropy.stderr)

    def test_a_broken_model_is_a_result(self) -> None:
        assert [metric.value for metric in metrics_of(np.array([-1e4, -1.0]), "perplexity")] == [math.inf, 5000.5]
        assert math.isnan(metrics_of(np.array([math.nan, -1.0]), "perplexity")[0].value)

    def test_windows_are_kept_for_pairs(self, evaluator: Evaluator, text: Path) -> None:
        first, fewer = (evaluator.evaluate(spec_of(PPL, path=str(text), limit=limit)) for limit in (6, 4))
        loglikelihoods = np.array(first.samples.loglikelihood)
        assert math.exp(-loglikelihoods.mean() / 255) == pytest.approx(first.primary.value, rel=1e-6)
        assert fewer.samples.loglikelihood == first.samples.loglikelihood[:4]
        assert evaluator.evaluate(spec_of(PPL, path=str(text), limit=6)).requests_hash == first.requests_hash != fewer.requests_hash


class TestStart:
    def test_the_tokenizers_own_stands_once_and_is_never_scored(self, text: Path) -> None:
        begins = load_model(ModelSpec(name="m", family="f", path=str(model_path("mini-neox-0.3m")), dtype="float32"), "cpu")
        token = (begins.tokenizer.eos_token, begins.tokenizer.eos_token_id)
        begins.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token[0]} $A", special_tokens=[token])
        spec = spec_of(PPL, path=str(text), limit=5)
        windows = Perplexity.of(spec, begins, None, lambda: None).windows_NT
        assert windows[0, 0] == token[1]
        assert (windows == token[1]).sum() == 1
        result = Evaluator(begins).evaluate(spec)
        stream = begins.tokenizer("\n\n".join(DOCUMENTS[:40]), return_tensors="pt").input_ids
        assert result.primary.value == pytest.approx(gptq_perplexity(begins, stream, 256, 5), rel=1e-6)


def letters(text: str) -> list[int]:
    """Tokens of a text that can be read."""
    return list(map(ord, text))


def words(count: int) -> pa.ChunkedArray:
    return pa.chunked_array([[chr(0x100 + n) for n in range(count)]], pa.large_string())


class TestProtocols:
    def test_joins(self) -> None:
        for protocol, separator in (("joined_paragraphs", "\n\n"), ("joined_spaces", " ")):
            found = PROTOCOLS[protocol](words(7), letters, 4)
            expected = letters(separator.join(words(7).to_pylist()))
            assert found.tolist() == [expected[at : at + 4] for at in range(0, len(expected) - 3, 4)]

    def test_the_first_1100_documents_and_256_windows(self) -> None:
        long = PROTOCOLS["first_1100"](words(1200), letters, 8)  # 2,199 tokens: 274 windows
        short = PROTOCOLS["first_1100"](words(1200), letters, 733)
        assert (short.shape, short.max()) == ((3, 733), 0x100 + 1099)
        assert long.reshape(-1).tolist() == letters(" ".join(words(1100).to_pylist()))[: len(long) * 8]
        assert len(long) == 256

    def test_256_crops_with_seed_0(self, loaded: LoadedModel, text: Path) -> None:
        def encode(document: str) -> list[int]:
            return list(loaded.tokenizer(document, verbose=False).input_ids)

        random.seed(0)
        expected = []
        for _ in range(256):
            while True:
                tokens = encode(DOCUMENTS[random.randint(0, 39)])
                if len(tokens) > 64:
                    break
            start = random.randint(0, len(tokens) - 64 - 1)
            expected.append(tokens[start : start + 64])
        found = Perplexity.of(spec_of(PPL, path=str(text), protocol="crops_256", window=64), loaded, None, lambda: None)
        assert found.windows_NT.tolist() == expected

    def test_every_perplexity_that_ships_is_one(self) -> None:
        names = [path.stem for path in CONF.glob("*.yaml") if _kind(path) == PERPLEXITY and path.stem != "local_perplexity"]
        specs = [spec_of(name) for name in names]
        assert {spec.task_key for spec in specs} >= {
            "wikitext2@1+joined_paragraphs", "ptb@1+joined_paragraphs", "ptb_new@1+joined_spaces", "c4@1+crops_256", "c4_new@1+first_1100",
        }  # fmt: skip


def _kind(path: Path) -> str | None:
    return yaml.safe_load(path.read_text()).get("kind")  # type: ignore[no-any-return]


class TestWindow:
    def test_it_is_2048_or_the_models_context(self, loaded: LoadedModel, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert Perplexity.of(spec_of(PPL, path=str(text)), loaded, None, lambda: None).windows_NT.shape[1] == 256
        monkeypatch.setattr("quantsweep.evaluation.perplexity.WINDOW", 128)
        assert Perplexity.of(spec_of(PPL, path=str(text)), loaded, None, lambda: None).windows_NT.shape[1] == 128
        assert Perplexity.of(spec_of(PPL, path=str(text), window=200), loaded, None, lambda: None).windows_NT.shape[1] == 200

    def test_what_the_model_cannot_do_is_refused(self, evaluator: Evaluator, tmp_path: Path) -> None:
        with pytest.raises(EvaluationError, match="windows of 257 tokens were asked for, and the context of m has 256"):
            evaluator.prepare(spec_of(PPL, window=257))
        (tmp_path / "a.txt").write_text("A few words.")
        with pytest.raises(EvaluationError, match=r"mini_window_ppl: .*a\.txt has fewer tokens than one window of 256; give more text"):
            evaluator.prepare(spec_of(PPL, path=str(tmp_path / "a.txt")))
        with pytest.raises(EvaluationError, match=r"task wikitext2: text .* no commit is pinned for it"):
            evaluator.prepare(spec_of("wikitext2"))

    def test_lack_of_memory_halves_the_batch(self, loaded: LoadedModel, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = Evaluator(loaded).evaluate(spec_of(PPL, path=str(text), limit=6)).primary.value
        score = Scorer._score_tokens

        def limited(self: Scorer, batch: Any, with_greedy: bool) -> Any:
            if len(batch.input_BT) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return score(self, batch, with_greedy)

        monkeypatch.setattr(Scorer, "_score_tokens", limited)
        result = Evaluator(loaded, batch_size=8).evaluate(spec_of(PPL, path=str(text), limit=6))
        assert result.batch_size == 2
        assert result.primary.value == pytest.approx(expected, rel=1e-6)

    def test_texts_of_tasks_can_be_compared(self, evaluator: Evaluator) -> None:
        """What calibration text is held against: of a perplexity its windows, of lm-eval's tasks their requests."""
        assert " ".join(evaluator.texts(spec_of(PPL, limit=2))).startswith(DOCUMENTS[0][:100])
        assert evaluator.texts(spec_of("mini_ppl", limit=2)) == DOCUMENTS[:2]
        assert all(" " in text for text in evaluator.texts(spec_of("mini_continuation", limit=2)))


class TestPlanning:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    @staticmethod
    def planned(results: Path, *said: str) -> Prepared:
        typed = [f"results_dir={results}", "model=mini-neox-0.3m", "method=none", *said]
        cfg = compose_base(typed)
        return prepare(cfg, search_folders(cfg.hydra), typed)

    def tasks(self, results: Path, *said: str) -> tuple[TaskSpec, ...]:
        return self.planned(results, *said).plan.trials[0].tasks

    def test_keys_name_the_protocol_the_windows_and_a_text_of_ones_own(self, tmp_path: Path, text: Path) -> None:
        (plain,) = self.tasks(tmp_path, f"task={PPL}")
        assert plain.task_key == f"{PPL}@1+joined_paragraphs"
        (short,) = self.tasks(tmp_path, f"task={PPL}", "limit=5", "task.window=64")
        assert short.task_key == f"{PPL}@1+limit5+window64+joined_paragraphs"
        (own,) = self.tasks(tmp_path, "task=wikitext2", f"task.path={text}")
        assert own.task_key.startswith("wikitext2@1+joined_paragraphs+own")
        other = text.with_name("other.jsonl")
        other.write_text('{"text": "another"}\n')
        assert self.tasks(tmp_path, "task=wikitext2", f"task.path={other}")[0].task_key != own.task_key

    @pytest.mark.parametrize(
        "said",
        [
            *("task.column=page", "task.files=wikitext-103-raw-v1/test-*.parquet", "task.hub_id=other/wikitext"),
            *("task.branch=other", f"task.revision={40 * 'a'}", "task.path=package://quantsweep/mini/tasks/data/ppl.jsonl"),
        ],
    )
    def test_a_built_in_task_on_another_text_has_another_key(self, tmp_path: Path, said: str) -> None:
        (own,) = self.tasks(tmp_path, "task=wikitext2", said)
        assert own.task_key.startswith("wikitext2@1+joined_paragraphs+own")

    def test_a_text_of_the_hub_is_submitted_only_where_it_is_pinned(self, tmp_path: Path) -> None:
        plan = self.planned(tmp_path, "task=perplexity").plan
        assert plan.unpinned == ("task c4", "task ptb", "task wikitext2")
        with pytest.raises(ConfigurationError, match=r"which weights or text task c4, task ptb, task wikitext2 would be.*task\.path=FILE"):
            refuse_unpinned(plan)

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            (["task=local_perplexity"], r"give a text, task\.path=FILE"),
            (["task=local_perplexity", "task.path=/nowhere/a.txt"], r"text /nowhere/a\.txt cannot be looked at"),
            ([f"task={PPL}", "task.protocol=lm_eval"], "the protocol of a perplexity is one of joined_paragraphs, joined_spaces"),
            (
                ["task=mini_ppl", "task.protocol=crops_256"],
                "a task of lm-eval has .* and the protocol null or lm_eval",
            ),
            ([f"task={PPL}", "num_fewshot=2"], "a perplexity has no examples in its prompt; leave num_fewshot out"),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_runs(self, tmp_path: Path, said: list[str], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            self.planned(tmp_path, *said)

    def test_its_cost_is_that_of_its_windows(self) -> None:
        assert assumed_tokens(spec_of("c4")) == 256 * 2048
        assert assumed_tokens(spec_of("c4", limit=10, window=512)) == 10 * 512
