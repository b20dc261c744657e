"""Activations quantized inside a model while an evaluator scores it: a text gets the same numbers in any company.

In float64 the products of a batch differ from those of a sequence alone by parts in 1e16, which float32, in which activations are
quantized, does not see but at a tie: scores agree to 1e-6 of their size.  In float32 such a difference may move a code to its
neighbour; scores of 8-bit activations then agree to about 1e-3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from quantsweep.activations.llm_int8 import ACTIVATION as LLM_INT8
from quantsweep.activations.per_block import ACTIVATION as PER_BLOCK
from quantsweep.activations.per_tensor import ACTIVATION as PER_TENSOR
from quantsweep.evaluation.scoring import Plan, Scorer
from quantsweep.models.blocks import quantizable_linears
from quantsweep.models.folding import pairs, rescaled
from quantsweep.trial.specs import ActivationSpec, StepSpec, options_tuple
from tests.contract.architectures import random_model

SPANS = [([1, 2, 3, 4, 5], [6, 7]), ([9, 8], [7]), (list(range(10, 40)), [41, 42, 43]), ([5], [6]), (list(range(50, 62)), [3])]
INT8 = {"data_type": "int", "data_type_version": 1, "bit_width": 8, "symmetric": True,
        "data_type_options": options_tuple({"convention": "absmax_full"})}  # fmt: skip
STEPS: dict[str, tuple[Any, ActivationSpec]] = {
    "per_tensor": (PER_TENSOR, ActivationSpec(step=StepSpec("per_tensor", 1), **INT8)),
    "nvfp4": (
        PER_BLOCK,
        ActivationSpec(step=StepSpec("per_block", 1), data_type="nvfp4", data_type_version=1, bit_width=4, symmetric=True, block_size=16),
    ),
    "llm_int8": (
        LLM_INT8,
        ActivationSpec(step=StepSpec("llm_int8", 1, options_tuple({"threshold": 6.0, "outlier_weights": "int8"})), **INT8),
    ),
}


@contextmanager
def hung(model: PreTrainedModel, module: nn.Module) -> Iterator[None]:
    """The inputs of all linear layers go through a module."""
    handles = [
        place.module.register_forward_pre_hook(lambda _m, args: (module(args[0]), *args[1:]))
        for place in quantizable_linears(model).values()
        if place.expert is None
    ]
    yield
    for handle in handles:
        handle.remove()


def scores(scorer: Scorer, batch_size: int) -> npt.NDArray[np.float64]:
    plan = Plan.of(SPANS, 64)
    return scorer.score(plan.batches(batch_size), plan.num_spans)[0]


@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "mixtral"])
@pytest.mark.parametrize("name", STEPS)
def test_a_text_is_scored_alike_in_any_company(family: str, name: str) -> None:
    model = random_model(family, torch.float64)
    for pair in pairs(model, "norm"):  # loud channels, as LLM.int8() is about
        loud_I = torch.ones(len(pair.unit_of_column), dtype=torch.float64)
        loud_I[3] = 16
        for parameter, value in rescaled(model, pair, source_I=loud_I, readers_I=1 / loud_I).items():
            model.get_parameter(parameter).copy_(value)
    scorer = Scorer(model)  # made before anything is hung, as the evaluator's is
    plain = scores(scorer, 5)
    step, spec = STEPS[name]
    with hung(model, step.module(spec, None)):
        together, by_twos, alone = (scores(scorer, size) for size in (5, 2, 1))
    assert np.abs(together - plain).max() > 1e-6, "activations were quantized"
    np.testing.assert_allclose(by_twos, together, rtol=1e-6)
    np.testing.assert_allclose(alone, together, rtol=1e-6)


def test_a_batch_says_what_is_padding() -> None:
    (batch,) = Plan.of([([1, 2, 3], [4]), ([0], [0])], 64).batches(2)
    assert batch.is_token_BT.tolist() == [[True, True, True], [True, False, False]]
