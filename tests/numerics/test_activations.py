"""Activation quantizers against plain numpy in float64, against the formats of weights, and against bitsandbytes.

Ours computes in float32: a quotient in the middle between two levels (the largest value of a row is, by the symmetric convention of GPTQ)
may be rounded to the other one.  Such values are one step apart and at most one in a hundred; all others agree to a few units of
float32's last place.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from quantsweep.activations._base import Inputs
from quantsweep.activations.llm_int8 import ACTIVATION as LLM_INT8
from quantsweep.activations.per_block import ACTIVATION as PER_BLOCK
from quantsweep.activations.per_embedding_group import ACTIVATION as PER_EMBEDDING_GROUP
from quantsweep.activations.per_tensor import ACTIVATION as PER_TENSOR
from quantsweep.activations.per_tensor_static import ACTIVATION as PER_TENSOR_STATIC
from quantsweep.activations.per_token import ACTIVATION as PER_TOKEN
from quantsweep.data_types._base import fake_quantize
from quantsweep.errors import ConfigurationError, QuantizationError
from quantsweep.numerics.tokens import tokens_are
from quantsweep.trial.registry import DATA_TYPES
from quantsweep.trial.specs import ActivationSpec, QuantizationSpec, StepSpec, options_tuple

Array = npt.NDArray[np.float64]
LENGTHS = (7, 3, 5)
FAMILY = [("absmax_full", True), ("kbit", True), ("gptq", True), ("gptq", False), ("awq", True), ("awq", False), ("deepspeed", True),
          ("deepspeed", False)]  # fmt: skip


def spec_of(
    name: str = "per_token", *, options: dict[str, Any] | None = None, convention: str = "absmax_full", **changes: Any
) -> ActivationSpec:
    """8-bit symmetric integers, but for what is said otherwise."""
    fields = {"data_type": "int", "data_type_version": 1, "bit_width": 8, "symmetric": True, **changes}
    if fields["data_type"] == "int":
        fields["data_type_options"] = options_tuple({"convention": convention})
    step = StepSpec(name, 1, options_tuple(options or {}))
    return ActivationSpec(step=step, **fields)


def batch(seed: int = 0, width: int = 40, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Skewed activations with two loud channels, (B, T, I), and which of them are tokens; padding is louder than all."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(LENGTHS), max(LENGTHS), width, generator=generator) + 0.4
    values[..., 3] *= 30
    values[..., 17] *= -12
    is_token = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    values[~is_token] = 1e4
    values[1, 1] = 0.0  # a token of zeros
    return values.to(dtype), is_token


def run(module: nn.Module, values: Tensor, is_token: Tensor) -> Tensor:
    with tokens_are(is_token), torch.inference_mode():
        quantized: Tensor = module(values)
    assert quantized.shape == values.shape
    assert quantized.dtype == values.dtype
    return quantized


def levels_by_hand(x: Array, low: Array, high: Array, k: int, convention: str, symmetric: bool) -> tuple[Array, Array]:
    """(values, step): methods.md §3, written out once more.  low and high broadcast to x."""
    largest, signed, m = 2**k - 1, 2 ** (k - 1) - 1, np.maximum(high, -low)
    if symmetric:
        step = {
            "absmax_full": m / signed,
            "kbit": m / signed,
            "awq": np.maximum(m, 1e-5) / signed,
            "gptq": np.where(low < 0, 2 * m, m) / largest,
            "deepspeed": 2 * m / 2**k,
        }[convention]
        zero: Any = 2 ** (k - 1)
    else:
        step = {
            "gptq": (np.maximum(high, 0) - np.minimum(low, 0)) / largest,
            "awq": np.maximum(high - low, 1e-5) / largest,
            "deepspeed": np.maximum((high - low) / 2**k, m * 2.0**-14),
        }[convention]
        zero = -np.round(low / np.where(step == 0, 1, step))
        zero = zero if convention == "deepspeed" else np.clip(zero, 0, largest)
    safe = np.where(step == 0, 1, step)
    codes = np.clip(np.round(x / safe) + zero, 1 if convention == "kbit" else 0, largest)
    return (codes - zero) * step, np.broadcast_to(step, x.shape)


def assert_equal_but_for_ties(found: Tensor, expected: Array, step: Array) -> None:
    off = np.abs(found.double().numpy() - expected)
    near = off <= 1e-5 * np.abs(expected) + 1e-6 * step
    assert near.mean() > 0.99
    assert (off[~near] <= 1.001 * step[~near]).all()


def numpy_of(values: Tensor) -> Array:
    return values.double().numpy()


@pytest.mark.parametrize("bit_width", [4, 6, 8])
@pytest.mark.parametrize(("convention", "symmetric"), FAMILY)
def test_per_token(convention: str, symmetric: bool, bit_width: int) -> None:
    values, is_token = batch()
    spec = spec_of(convention=convention, symmetric=symmetric, bit_width=bit_width)
    found = run(PER_TOKEN.module(spec, None), values, is_token)
    x = numpy_of(values)
    expected, step = levels_by_hand(x, x.min(-1, keepdims=True), x.max(-1, keepdims=True), bit_width, convention, symmetric)
    assert_equal_but_for_ties(found, expected, step)
    if convention not in ("awq", "deepspeed"):
        assert not found[1, 1].any(), "a token of zeros stays one"
    assert len(found[0, 0].unique()) <= 2**bit_width
    assert (found != values).any(), "something was lost"


@pytest.mark.parametrize(("convention", "symmetric"), FAMILY)
def test_per_tensor_is_of_each_sequence_without_its_padding(convention: str, symmetric: bool) -> None:
    values, is_token = batch()
    found = run(PER_TENSOR.module(spec_of("per_tensor", convention=convention, symmetric=symmetric), None), values, is_token)
    flat = run(PER_TENSOR.module(spec_of("per_tensor", convention=convention, symmetric=symmetric), None), values.flatten(0, 1), is_token)
    assert torch.equal(flat.view_as(found), found), "models that flatten their tokens"
    for b, length in enumerate(LENGTHS):
        x = numpy_of(values[b, :length])
        expected, step = levels_by_hand(x, x.min(keepdims=True), x.max(keepdims=True), 8, convention, symmetric)
        assert_equal_but_for_ties(found[b, :length], expected, step)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 100.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_is_at_percentiles_by_nearest_rank(percentile: float, symmetric: bool) -> None:
    values, is_token = batch()
    spec = spec_of("per_tensor", convention="gptq", symmetric=symmetric, clip_percentile=percentile)
    found = run(PER_TENSOR.module(spec, None), values, is_token)
    for b, length in enumerate(LENGTHS):
        x = numpy_of(values[b, :length])
        if symmetric:
            m = np.percentile(np.abs(x), percentile, method="inverted_cdf")
            low, high = max(x.min(), -m), min(x.max(), m)
        else:
            low, high = -np.percentile(-x, percentile, method="inverted_cdf"), np.percentile(x, percentile, method="inverted_cdf")
        expected, step = levels_by_hand(x, np.full((1, 1), low), np.full((1, 1), high), 8, "gptq", symmetric)
        assert_equal_but_for_ties(found[b, :length], expected, step)


DYNAMIC = {
    "per_token": (PER_TOKEN, spec_of("per_token")),
    "per_tensor": (PER_TENSOR, spec_of("per_tensor")),
    "per_tensor clipped": (PER_TENSOR, spec_of("per_tensor", clip_percentile=99.0)),
    "per_block": (PER_BLOCK, spec_of("per_block", block_size=16)),
    "nvfp4": (PER_BLOCK, spec_of("per_block", data_type="nvfp4", bit_width=4, block_size=16)),
    "llm_int8": (LLM_INT8, spec_of("llm_int8", options={"threshold": 6.0, "outlier_weights": "int8"})),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_request_alone_and_in_company_is_the_same(name: str) -> None:
    """Bit for bit, with louder neighbours and whatever stands in the padding; llm_int8's outliers too."""
    step, spec = DYNAMIC[name]
    module = step.module(spec, None)
    values, is_token = batch()
    values[0] *= 5
    together = run(module, values, is_token)
    for b, length in enumerate(LENGTHS):
        alone = values[b : b + 1, :length]
        assert torch.equal(run(module, alone, torch.ones(1, length, dtype=torch.bool)), together[b : b + 1, :length])
        pair = torch.cat([values[b], 7 * values[b]]).view(2, *values.shape[1:])
        both = torch.stack([is_token[b], torch.ones_like(is_token[b])])
        assert torch.equal(run(module, pair, both)[:1, :length], together[b : b + 1, :length])


@pytest.mark.parametrize("name", sorted(set(DYNAMIC) - {"per_token", "per_block"}))
def test_who_does_not_say_what_padding_is_is_refused(name: str) -> None:
    step, spec = DYNAMIC[name]
    values, is_token = batch()
    module = step.module(spec, None)
    with pytest.raises(QuantizationError, match="does not say which positions are padding"):
        module(values)
    with (
        tokens_are(is_token[:, :-1]),
        pytest.raises(QuantizationError, match="are not those of 3 sequences of 6 tokens"),
    ):
        module(values)


def inputs_of(values_TI: Tensor) -> Inputs:
    """What a calibration would have seen."""
    return SimpleNamespace(num_tokens=len(values_TI), min_I=values_TI.amin(0), max_I=values_TI.amax(0), sample_TI=values_TI)


@pytest.mark.parametrize(("convention", "symmetric"), FAMILY)
@pytest.mark.parametrize("percentile", [None, 95.0])
def test_static_ranges_are_those_of_the_calibration(convention: str, symmetric: bool, percentile: float | None) -> None:
    seen, values = batch(1)[0][0], batch(2)[0][0] * 2  # larger than what was seen: saturates
    spec = spec_of("per_tensor_static", convention=convention, symmetric=symmetric, clip_percentile=percentile)
    found = run(PER_TENSOR_STATIC.module(spec, inputs_of(seen)), values, torch.ones(1, 7, dtype=torch.bool))
    s, x = numpy_of(seen), numpy_of(values)
    low, high = s.min(), s.max()
    if percentile is not None and symmetric:
        m = np.percentile(np.abs(s), percentile, method="inverted_cdf")
        low, high = max(low, -m), min(high, m)
    elif percentile is not None:
        low, high = -np.percentile(-s, percentile, method="inverted_cdf"), np.percentile(s, percentile, method="inverted_cdf")
    expected, step = levels_by_hand(x, np.full((1, 1), low), np.full((1, 1), high), 8, convention, symmetric)
    assert_equal_but_for_ties(found, expected, step)
    assert np.abs(expected).max() < np.abs(x).max()


class TestGroupsOfChannels:
    """PEG."""

    def module(self, groups: int, permute: bool, seen: Tensor, **changes: Any) -> nn.Module:
        options = {"groups": groups, "permute": permute}
        return PER_EMBEDDING_GROUP.module(spec_of("per_embedding_group", options=options, convention="gptq", symmetric=False, **changes),
                                          inputs_of(seen))  # fmt: skip

    def test_one_group_is_one_range_for_all(self) -> None:
        seen, (values, is_token) = batch(1)[0][0], batch(2)
        static = PER_TENSOR_STATIC.module(spec_of("per_tensor_static", convention="gptq", symmetric=False), inputs_of(seen))
        assert torch.equal(run(self.module(1, True, seen), values, is_token), run(static, values, is_token))

    @pytest.mark.parametrize("permute", [True, False])
    def test_as_many_groups_as_channels_are_one_range_a_channel(self, permute: bool) -> None:
        seen, (values, is_token) = batch(1)[0][0], batch(2)
        x, s = numpy_of(values), numpy_of(seen)
        expected, step = levels_by_hand(x, s.min(0), s.max(0), 8, "gptq", False)
        assert_equal_but_for_ties(run(self.module(40, permute, seen), values, is_token), expected, step)

    @pytest.mark.parametrize("permute", [True, False])
    def test_groups_between(self, permute: bool) -> None:
        seen, (values, is_token) = batch(1)[0][0], batch(2)
        x, s = numpy_of(values), numpy_of(seen)
        order = np.argsort(s.max(0) - s.min(0), kind="stable") if permute else np.arange(40)
        low, high = np.empty(40), np.empty(40)
        for members in np.array_split(order, 6):
            low[members], high[members] = s[:, members].min(), s[:, members].max()
        expected, step = levels_by_hand(x, low, high, 8, "gptq", False)
        assert_equal_but_for_ties(run(self.module(6, permute, seen), values, is_token), expected, step)

    def test_more_groups_than_channels(self) -> None:
        with pytest.raises(QuantizationError, match="groups=41 are more than the 40 channels"):
            self.module(41, False, batch()[0][0])


@pytest.mark.parametrize(
    ("data_type", "bit_width", "options", "block_size"),
    [
        *[("mxfp", k, {"exponent_bits": None, "scale_mode": mode}, 32) for k in (4, 6, 8) for mode in ("floor", "rceil", "ceil", "even")],
        ("mxfp", 8, {"exponent_bits": 5, "scale_mode": "floor"}, 32),
        ("nvfp4", 4, {}, 16),
        *[("fp8", 8, {"format": form}, size) for form in ("e4m3", "e5m2") for size in (None, 16)],
        *[("int", k, {"convention": "absmax_full"}, 16) for k in (4, 8)],
    ],
)  # fmt: skip
def test_formats_are_those_of_weights(data_type: str, bit_width: int, options: dict[str, Any], block_size: int | None) -> None:
    """Of each sequence, seen as a weight with a row a token; widths that blocks do not divide too."""
    values, is_token = batch(3, width=72)
    form = {"data_type": data_type, "data_type_version": 1, "data_type_options": options_tuple(options), "bit_width": bit_width}
    scale_dtype = {"mxfp": "e8m0", "nvfp4": "e4m3"}.get(data_type, "float32")
    weights = QuantizationSpec(rounding=StepSpec("round_to_nearest", 1), **form, block_size=block_size, block_axis="input", symmetric=True,
                               scale_dtype=scale_dtype)  # fmt: skip
    step = PER_TOKEN if block_size is None else PER_BLOCK
    activation = ActivationSpec(step=StepSpec("any", 1), **form, symmetric=True, block_size=block_size)
    module = step.module(activation, None)
    found = run(module, values, is_token)
    for b, length in enumerate(LENGTHS):
        x = values[b, :length]
        torch.testing.assert_close(found[b, :length], fake_quantize(DATA_TYPES[data_type], x, weights), rtol=1e-6, atol=1e-12)


OPTIONS = {"threshold": 6.0, "outlier_weights": "int8"}


class TestInInt8:
    """LLM.int8()."""

    def weight(self) -> Tensor:
        return torch.randn(24, 40, generator=torch.Generator().manual_seed(5)) * 0.05

    def by_hand(self, x: Array, weight: Array, outlier_weight: Array, threshold: float) -> Array:
        """int32 products of int8 codes, outlier columns apart."""
        outliers = (np.abs(x) >= threshold).any(0)
        rest = np.where(outliers, 0, x)
        of_rows = np.abs(np.where(np.abs(x) >= threshold, 0, x)).max(1, keepdims=True)  # outlier columns' small values count
        of_weights = np.abs(weight).max(1, keepdims=True)
        codes = np.round(127 * rest / np.where(of_rows == 0, 1, of_rows)).astype(np.int8)
        weight_codes = np.round(127 * weight / of_weights).astype(np.int8)
        product = codes.astype(np.int32) @ weight_codes.astype(np.int32).T
        mixed: Array = product * (of_rows * of_weights.T) / 127**2 + x[:, outliers] @ outlier_weight[:, outliers].T
        return mixed

    def rounded(self, weight: Tensor) -> Array:
        w = numpy_of(weight)
        step = np.abs(w).max(1, keepdims=True) / 127
        result: Array = np.round(w / step) * step
        return result

    @pytest.mark.parametrize("outlier_weights", ["int8", "fp16"])
    @pytest.mark.parametrize("threshold", [6.0, 20.0, 0.0])
    def test_against_products_of_integers(self, outlier_weights: str, threshold: float) -> None:
        values, is_token = batch(4)
        weight = self.weight()
        spec = spec_of("llm_int8", options={"threshold": threshold, "outlier_weights": outlier_weights})
        LLM_INT8.check(spec)
        linear = nn.Linear(40, 24, bias=False)
        linear.weight.data.copy_(torch.from_numpy(self.rounded(weight)))
        keeps = LLM_INT8.keeps_weights(spec)
        assert keeps == (outlier_weights == "fp16")
        with tokens_are(is_token), torch.inference_mode():
            found = LLM_INT8.linear(spec, linear, weight)(values) if keeps else linear(LLM_INT8.module(spec, None)(values))
        for b, length in enumerate(LENGTHS):
            of_outliers = self.rounded(weight) if outlier_weights == "int8" else numpy_of(weight)
            expected = self.by_hand(numpy_of(values[b, :length]), numpy_of(weight), of_outliers, threshold or np.inf)
            # float32 codes may differ where float64's are ties: less than a step of one value
            np.testing.assert_allclose(found[b, :length].numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    def test_without_outliers_it_is_vector_wise(self) -> None:
        values, is_token = batch(4)
        without = LLM_INT8.module(spec_of("llm_int8", options={**OPTIONS, "threshold": 0.0}), None)
        assert torch.equal(run(without, values, is_token), run(PER_TOKEN.module(spec_of(), None), values, is_token))

    def test_outliers_are_those_of_a_sequence(self) -> None:
        values, is_token = torch.ones(2, 3, 8), torch.tensor([[True, True, False], [True, True, True]])
        values[0, 0, 2] = 6.0  # an outlier of the first sequence for all of its tokens
        values[0, 2, 5] = 9.0  # padding
        module = LLM_INT8.module(spec_of("llm_int8", options=OPTIONS), None)
        with tokens_are(is_token):
            _, outliers = module.parts(values)  # type: ignore[operator]
        assert outliers[0, :, 2].tolist() == [6.0, 1.0, 1.0]
        assert int((outliers != 0).sum()) == 3

    def test_against_bitsandbytes(self) -> None:
        """Its CPU path, one sequence a call: codes, scales, outlier columns, and the product that it serves."""
        pytest.importorskip("bitsandbytes")
        import bitsandbytes.functional as functional

        values = batch(6)[0][0].half()
        weight = self.weight().half()
        codes, of_rows, outliers = functional.int8_vectorwise_quant(values, threshold=6.0)
        weight_codes, of_weights, _ = functional.int8_vectorwise_quant(weight)
        spec = spec_of("llm_int8", options=OPTIONS)
        with tokens_are(torch.ones(1, 7, dtype=torch.bool)):
            rest, ours = LLM_INT8.module(spec, None).parts(values.float())  # type: ignore[operator]
        assert (ours != 0).any(0).nonzero().flatten().tolist() == sorted(outliers.tolist())
        theirs = codes.float() * of_rows[:, None] / 127
        theirs[:, outliers.long()] = 0
        close = torch.isclose(rest, theirs, rtol=1e-5, atol=1e-6)
        assert close.float().mean() > 0.99
        assert ((rest - theirs).abs() <= 1.001 * of_rows[:, None] / 127).all()
        served = functional.int8_mm_dequant(functional.int8_linear_matmul(codes, weight_codes), of_rows, of_weights)
        dequantized = weight_codes.float() * of_weights[:, None] / 127
        served = served.float() + values[:, outliers.long()].float() @ dequantized[:, outliers.long()].T
        product = (rest + ours) @ dequantized.T
        # theirs is rounded to float16 on the way
        torch.testing.assert_close(product, served, rtol=0, atol=2e-3 * float(served.abs().max()))


def test_smoothquants_fake_quantization() -> None:
    """Its formula (methods.md §3): s = max(max |x|, 1e-5) / 127, round, times s; per token and per tensor."""
    values = batch(7)[0][:1]
    x = numpy_of(values)
    for step, axis in ((PER_TOKEN, -1), (PER_TENSOR, (1, 2))):
        scale = np.maximum(np.abs(x).max(axis=axis, keepdims=True), 1e-5) / 127
        found = run(step.module(spec_of(), None), values, torch.ones(1, 7, dtype=torch.bool))
        assert_equal_but_for_ties(found, np.round(x / scale) * scale, np.broadcast_to(scale, x.shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_quantized_in_float32(dtype: torch.dtype) -> None:
    values, is_token = batch(8, dtype=dtype)
    module = PER_TOKEN.module(spec_of(), None)
    assert torch.equal(run(module, values, is_token), run(module, values.float(), is_token).to(dtype))


def test_numbers_are_buffers() -> None:
    """Modules that differ in numbers share compiled code: it is compiled once."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def quantize(module: nn.Module, values: Tensor) -> Tensor:
        result: Tensor = module(values)
        return result

    values = batch()[0]
    results = [quantize(PER_TOKEN.module(spec_of(bit_width=k), None), values) for k in (8, 6, 5, 4)]
    assert counter.frame_count == 1
    assert len({float(result.sum()) for result in results}) == 4
    for k, result in zip((8, 6, 5, 4), results, strict=True):
        assert torch.equal(result, PER_TOKEN.module(spec_of(bit_width=k), None)(values))


class TestRefusals:
    @pytest.mark.parametrize(
        ("step", "spec", "words"),
        [
            (PER_TOKEN, spec_of(sites=("linear", "keys")), "per_token does not quantize keys; activation.sites are linear, head, q"),
            (PER_TOKEN, spec_of(block_size=32), "activation=per_token has no blocks: leave activation.block_size out"),
            (PER_BLOCK, spec_of("per_block"), r"activation=per_block has blocks: activation\.block_size must be a number"),
            (PER_TOKEN, spec_of(data_type="nvfp4", bit_width=4), "no blocks, which nvfp4 is made of; use activation=per_block"),
            (PER_TOKEN, spec_of(symmetric=False), "convention=absmax_full are symmetric only; use one of gptq, awq, deepspeed"),
            (PER_TOKEN, spec_of(bit_width=9), "no symmetric int of 9 bits; choose int of 2 to 8"),
            (PER_TOKEN, spec_of(convention="nonsense"), "has no convention='nonsense'; choose from kbit"),
            (PER_TOKEN, spec_of(data_type="fp8", symmetric=False), "no asymmetric fp8 of 8 bits"),
            (PER_TOKEN, spec_of(data_type="quantile"), "no symmetric quantile of 8 bits"),
            (LLM_INT8, spec_of("llm_int8", options={"threshold": -1.0, "outlier_weights": "int8"}), "must be a number of at least 0"),
            (LLM_INT8, spec_of("llm_int8", options={"threshold": 6.0, "outlier_weights": "bf16"}), "is not one of int8, fp16"),
            (LLM_INT8, spec_of("llm_int8", convention="gptq", symmetric=False), "is symmetric int without clip_percentile"),
            (PER_EMBEDDING_GROUP, spec_of("x", options={"groups": 0, "permute": True}), "groups must be a whole number"),
        ],
    )  # fmt: skip
    def test_what_a_step_cannot_do(self, step: Any, spec: ActivationSpec, words: str) -> None:
        with pytest.raises(ConfigurationError, match=words):
            step.check(spec)

    def test_static_ranges_without_calibration(self) -> None:
        unseen = SimpleNamespace(**{**vars(inputs_of(torch.ones(2, 8))), "num_tokens": 0})  # an expert that no token was sent to
        for inputs in (None, unseen):
            with pytest.raises(QuantizationError, match="static ranges need calibration inputs"):
                PER_TENSOR_STATIC.module(spec_of("per_tensor_static"), inputs)

    def test_static_percentiles_without_a_sample(self) -> None:
        seen = SimpleNamespace(**{**vars(inputs_of(torch.ones(2, 8))), "sample_TI": torch.zeros(0, 8)})
        with pytest.raises(QuantizationError, match="needs a sample of inputs"):
            PER_TENSOR_STATIC.module(spec_of("per_tensor_static", clip_percentile=99.0), seen)
