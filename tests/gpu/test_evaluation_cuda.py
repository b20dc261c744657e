"""Loading, writing, restoring and scoring on a GPU: the same numbers as on the CPU, less memory than two models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quantsweep.evaluation.evaluator import Evaluator
from quantsweep.evaluation.scoring import Scorer
from quantsweep.mini import model_path
from quantsweep.models.checksums import checksum
from quantsweep.models.loading import load_model
from quantsweep.trial.specs import ModelSpec, TaskSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SPEC = ModelSpec(name="m", family="f", path=str(model_path("mini-neox-6.0m")), dtype="float32")
MINI_TASKS = {"mini_cloze": "acc", "mini_continuation": "acc", "mini_ppl": "bits_per_byte"}


def task(name: str, limit: int | None = 20) -> TaskSpec:
    metric = MINI_TASKS[name]
    return TaskSpec(
        name=name, lm_eval_task=name, folder="mini", version="1.0", primary_metric=metric, higher_is_better=metric == "acc", limit=limit
    )


@pytest.mark.parametrize("name", MINI_TASKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 2e-2)])
def test_scores_are_those_of_the_cpu(name: str, dtype: str, tolerance: float) -> None:
    expected = Evaluator(load_model(SPEC, "cpu")).evaluate(task(name))
    result = Evaluator(load_model(replace(SPEC, dtype=dtype), "cuda")).evaluate(task(name))
    assert result.requests_hash == expected.requests_hash
    assert result.samples.loglikelihood == pytest.approx(expected.samples.loglikelihood, rel=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_restore_is_bit_exact_and_the_device_holds_one_model(dtype: str) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    loaded = load_model(replace(SPEC, dtype=dtype), "cuda")
    bits = {name: tensor.cpu() for name, tensor in loaded.model.state_dict().items()}
    model_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
    for layer in loaded.layers.values():
        layer.write(layer.read() * 0.5)
    assert loaded.restore() == len(loaded.layers)
    assert torch.cuda.memory_allocated() - before < 1.2 * model_bytes
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor.cpu(), bits[name]), name


def test_checksum_is_the_same_on_both_devices() -> None:
    weight = torch.randn(3000, 1000)
    assert checksum(weight.cuda()) == checksum(weight)


def test_running_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(SPEC, "cuda")
    expected = Evaluator(loaded, batch_size=4).evaluate(task("mini_ppl"))
    score_tokens = Scorer._score_tokens

    def greedy_for_memory(self: Scorer, batch: Any, with_greedy: bool) -> Any:
        if len(batch.input_BT) > 4:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")  # a real torch.OutOfMemoryError
        return score_tokens(self, batch, with_greedy)

    monkeypatch.setattr(Scorer, "_score_tokens", greedy_for_memory)
    result = Evaluator(loaded, batch_size=32).evaluate(task("mini_ppl"))
    assert result.batch_size == 4
    assert result.samples == expected.samples
