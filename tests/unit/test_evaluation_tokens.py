"""Each text has one start, scored never: families are comparable, whatever their tokenizers put around a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_cases import spec_of
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from quantsweep.errors import EvaluationError
from quantsweep.evaluation.evaluator import Evaluator
from quantsweep.evaluation.results import TaskResult
from quantsweep.evaluation.tokens import Tokens
from quantsweep.mini import model_path
from quantsweep.models.loading import LoadedModel, load_model
from quantsweep.trial.specs import ModelSpec
from tests import cases
from tests.unit.test_evaluation_evaluator import simple_evaluate

MINI = model_path("mini-neox-0.3m")
BEFORE, AROUND = f"{cases.START} $A", f"{cases.START} $A {cases.START}"


def load(path: Path) -> LoadedModel:
    return load_model(ModelSpec(name="m", family="f", path=str(path), dtype="float32"), "cpu")


def evaluate(loaded: LoadedModel, name: str = "mini_ppl", **changes: Any) -> TaskResult:
    return Evaluator(loaded).evaluate(spec_of(name, **{"limit": 5, **changes}))


@pytest.fixture(scope="module")
def plain() -> LoadedModel:
    return load(MINI)


@pytest.fixture(scope="module")
def adds_start(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(cases.special_tokens(cases.mini_copy(tmp_path_factory.mktemp("start") / "m"), BEFORE))


@pytest.mark.parametrize("template", [BEFORE, AROUND])
def test_a_rolling_document_has_one_start_whatever_the_tokenizer_adds(template: str, plain: LoadedModel, tmp_path: Path) -> None:
    special = load(cases.special_tokens(cases.mini_copy(tmp_path / "m"), template))
    ours, expected = evaluate(special), evaluate(plain)
    assert ours.num_tokens == expected.num_tokens
    assert ours.primary.value == expected.primary.value


@pytest.mark.parametrize("template", [BEFORE, AROUND])
@pytest.mark.parametrize("name", ["mini_cloze", "mini_continuation"])
def test_choices_have_one_start_and_no_end(template: str, name: str, plain: LoadedModel, tmp_path: Path) -> None:
    """As if the start stood in the text, and no token of an answer is lost to an end token behind the context."""
    special = load(cases.special_tokens(cases.mini_copy(tmp_path / "m"), template))
    tokens, bare = Tokens(special.tokenizer, "m"), Tokens(plain.tokenizer, "m")
    for context, continuation in (("The king", " of the sea"), ("The king ", "of the sea"), (f"{cases.START}The king", " went")):
        before, after = tokens.pair(context, continuation)
        assert before.count(0) == 1
        assert before[0] == 0
        assert after == bare.pair(context, continuation)[1]
        assert 0 not in after
    assert evaluate(special, name).num_tokens == evaluate(plain, name).num_tokens


def test_lm_eval_agrees_where_it_has_one_start(adds_start: LoadedModel) -> None:
    model = HFLM(pretrained=adds_start.model, tokenizer=adds_start.tokenizer)
    tokens = Tokens(adds_start.tokenizer, "m")
    for context, continuation in (("The king", " of the sea"), ("The king  ", "went"), (f"{cases.START}The king", " went"), ("The", "re")):
        assert tokens.pair(context, continuation) == model._encode_pair(context, continuation)


@pytest.mark.parametrize("context", ["", " ", "\n\n"])
def test_an_empty_context_is_the_start(context: str, plain: LoadedModel, adds_start: LoadedModel) -> None:
    for loaded in (plain, adds_start):
        before, after = Tokens(loaded.tokenizer, "m").pair(context, "The king")
        assert before == [0]
        assert loaded.tokenizer.decode(after) == context + "The king"


def test_a_document_that_begins_with_the_start_in_writing_has_it_once(plain: LoadedModel) -> None:
    tokens = Tokens(plain.tokenizer, "m")
    assert list(tokens.windows(f"{cases.START}The king", 8)) == list(tokens.windows("The king", 8))


def test_windows_score_each_token_once(adds_start: LoadedModel) -> None:
    text = "The king of the sea went down to the house and said to all the people that the day was good. " * 3
    tokens = adds_start.tokenizer.encode(text, add_special_tokens=False)
    for length in (2, 7, 64, len(tokens), len(tokens) + 1):
        windows = list(Tokens(adds_start.tokenizer, "m").windows(text, length))
        assert [token for _, continuation in windows for token in continuation] == tokens
        assert all(len(context) + len(continuation) - 1 <= length for context, continuation in windows)
        assert windows[0][0] == [0]


class TestWindow:
    @pytest.fixture(scope="class")
    @classmethod
    def long(cls, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
        return load(cases.llama(tmp_path_factory.mktemp("long") / "m", max_position_embeddings=131072))

    def test_a_long_context_can_be_cut(self, long: LoadedModel) -> None:
        whole, cut = evaluate(long, limit=20), evaluate(long, limit=20, window=256)
        assert (whole.window, cut.window) == (131072, 256)
        assert whole.num_tokens == cut.num_tokens == 5883
        assert whole.primary.value == pytest.approx(3.5271327, abs=2e-6)
        assert cut.primary.value == pytest.approx(3.5271459, abs=2e-6)

    def test_it_stands_in_the_key_where_it_is_set(self) -> None:
        assert spec_of("mini_ppl", window=256).task_key == "mini_ppl@1.0+window256"
        assert spec_of("mini_ppl").task_key == "mini_ppl@1.0"

    def test_one_that_cannot_be_had_is_refused(self, plain: LoadedModel) -> None:
        with pytest.raises(EvaluationError, match="task mini_ppl: windows of 512 tokens were asked for, and the context of m has 256"):
            evaluate(plain, window=512)
        with pytest.raises(EvaluationError, match="task mini_cloze: window=64 was asked for, and only rolling tasks are cut into windows"):
            evaluate(plain, "mini_cloze", window=64)
        assert evaluate(plain, "mini_cloze").window is None


class TestWithoutSpecialTokens:
    @pytest.fixture(scope="class")
    @classmethod
    def bare(cls, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
        return load(cases.without_special_tokens(cases.mini_copy(tmp_path_factory.mktemp("bare") / "m")))

    def test_choices_are_scored(self, bare: LoadedModel, plain: LoadedModel) -> None:
        for name in ("mini_cloze", "mini_continuation"):
            assert evaluate(bare, name).metrics == evaluate(plain, name).metrics

    def test_rolling_and_empty_contexts_are_refused_by_name(self, bare: LoadedModel) -> None:
        said = "task mini_ppl, document 0: the tokenizer of model m has neither a BOS nor an EOS token, and a rolling task needs one"
        with pytest.raises(EvaluationError, match=said):
            evaluate(bare)
        with pytest.raises(EvaluationError, match="an answer without a context needs one to begin with: name it in"):
            Tokens(bare.tokenizer, "m").pair(" ", "The king")

    def test_the_protocol_of_lm_eval_is_refused(self, bare: LoadedModel) -> None:
        with pytest.raises(EvaluationError, match="without which lm-eval encodes nothing; leave protocol out"):
            evaluate(bare, "mini_cloze", protocol="lm_eval")


class TestProtocol:
    def test_rolling_numbers_are_lm_evals_with_both_starts(self, adds_start: LoadedModel) -> None:
        spec = spec_of("mini_ppl", limit=20, protocol="lm_eval")
        result = Evaluator(adds_start).evaluate(spec)
        theirs = simple_evaluate(adds_start, Path(MINI).parents[1] / "tasks", spec)["metrics"]["bits_per_byte,none"]
        assert result.primary.value == pytest.approx(theirs, rel=1e-7)
        assert result.primary.value == pytest.approx(1.5989849, abs=1e-6)
        assert result.num_tokens == 5903

    @pytest.mark.parametrize("name", ["mini_continuation", "mini_ppl"])
    def test_in_16_bit_too(self, name: str) -> None:
        """lm-eval takes the softmax in the compute dtype, and its own batches."""
        loaded = load_model(ModelSpec(name="m", family="f", path=str(MINI), dtype="bfloat16"), "cpu")
        spec = spec_of(name, limit=3, protocol="lm_eval")
        result = Evaluator(loaded, batch_size=5).evaluate(spec)  # as simple_evaluate
        theirs = simple_evaluate(loaded, Path(MINI).parents[1] / "tasks", spec)["metrics"]
        for metric in result.metrics:
            assert metric.value == theirs[f"{metric.name},none"], metric.name

    def test_weights_that_lm_eval_would_tie_are_left_alone(self) -> None:
        loaded = load(MINI)
        head = loaded.model.get_output_embeddings()
        loaded.model.config.tie_word_embeddings = True
        own = torch.nn.Parameter(head.weight.detach().clone() * 2, requires_grad=False)
        head.weight = own
        value = evaluate(loaded, protocol="lm_eval").primary.value
        assert loaded.model.get_output_embeddings().weight is own
        assert value == pytest.approx(evaluate(loaded).primary.value, rel=1e-6)

    def test_it_stands_in_the_key(self) -> None:
        assert spec_of("piqa", protocol="lm_eval", num_fewshot=2).task_key == "piqa@1.0+2shot+lm_eval"


def test_a_tokenizer_whose_start_cannot_be_told_is_refused() -> None:
    class Odd:
        bos_token_id = eos_token_id = 0

        def encode(self, _text: str, add_special_tokens: bool = True) -> list[int]:
            return [1, 2] if add_special_tokens else [3]

    with pytest.raises(EvaluationError, match=r"the tokenizer of model m turns 'a' into \[3\], and with its special tokens into \[1, 2\]"):
        Tokens(Odd(), "m")  # type: ignore[arg-type]


def test_the_bundled_tokenizers_add_nothing() -> None:
    tokens = Tokens(AutoTokenizer.from_pretrained(MINI), "m")
    assert tokens.pair("The king", " went")[0] == AutoTokenizer.from_pretrained(MINI).encode("The king")
