"""SmoothQuant: what is hard to quantize in activations is moved into the weights that read them.

    s_j = max |x_j|^α / max |w_j|^(1 - α)      for each channel j that a norm puts out
    norm gain and bias ÷ s_j,  column j of all that reads the norm × s_j

max |x_j| is over the calibration text, in the model as it is before rounding; max |w_j| over all weights that read the norm, those of
experts and of their router among them; both are at least 1e-5, and s_j is too.  α = 1 moves all difficulty into the weights, α = 0 none of
the activations' (s_j = 1 / max |w_j|).  Attention output and the second MLP layer are not smoothed: no norm feeds them.

`search` tries instead of `alpha` that many values, i / (search + 1), and takes the one for which the outputs of the layers that read
norms, quantized as the trial says, are nearest to what they were:

    Σ over norms   Σ over readers ‖X Wᵀ - Q_x(X / s) Q_w(W · s)ᵀ‖² / Σ over readers ‖X Wᵀ‖²

on windows of the calibration text that the maxima are not from (`held_out` of them, the last ones).

Source: Xiao et al., arXiv:2211.10438, and mit-han-lab/smoothquant.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantsweep.calibration.inputs import LayerInputs
from quantsweep.calibration.statistics import read
from quantsweep.data_types._base import fake_quantize
from quantsweep.errors import ConfigurationError, QuantizationError
from quantsweep.models.folding import Pair, columns_of_readers, fold, pairs
from quantsweep.models.session import Session
from quantsweep.numerics.tokens import tokens_are
from quantsweep.pipeline.interface import RANGE_TOKENS, Help, TransformRecord
from quantsweep.trial.registry import ACTIVATIONS, data_type_of
from quantsweep.trial.specs import QuantizationSpec, StepSpec

LEAST = 1e-5
MOST_TOKENS = 64
"""Tokens of each held-out window that a search looks at."""


def smoothing_scales(max_abs_I: Tensor, max_weight_I: Tensor, alpha: float) -> Tensor:
    """s, (I,) float64."""
    activations_I, weights_I = (values.double().clamp(min=LEAST) for values in (max_abs_I, max_weight_I))
    return (activations_I**alpha / weights_I ** (1 - alpha)).clamp(min=LEAST)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Place:
    """A norm whose readers are quantized: what it puts out on the calibration text, largest magnitudes of readers' columns; on the host."""

    pair: Pair
    inputs: LayerInputs
    max_weight_I: Tensor

    def scales(self, alpha: float) -> Tensor:
        return smoothing_scales(self.inputs.max_abs_I, self.max_weight_I, alpha)


class Smooth:
    """See the module."""

    def check(self, spec: QuantizationSpec, step: StepSpec) -> None:
        """Raise ConfigurationError for options that cannot be."""
        alpha, search, held_out = (step.option(name) for name in ("alpha", "search", "held_out"))
        if not isinstance(alpha, float) or not 0 <= alpha <= 1:
            raise ConfigurationError(f"transform.smooth.options.alpha must be a number from 0 to 1, got {alpha!r}")
        if not isinstance(search, int) or search < 0:
            raise ConfigurationError(f"transform.smooth.options.search must be a whole number (0: alpha as given), got {search!r}")
        if not isinstance(held_out, float) or not 0 < held_out < 1:
            raise ConfigurationError(f"transform.smooth.options.held_out must be a share between 0 and 1, got {held_out!r}")

    def apply(self, session: Session, spec: QuantizationSpec, step: StepSpec, help: Help) -> tuple[TransformRecord, ...]:
        """Fold the scales into all norms that feed quantizable layers.

        Raises QuantizationError for a model whose norms cannot be scaled, and where a search has no windows to look at.
        """
        self.check(spec, step)
        if help.tokens_NT is None:
            raise QuantizationError("smooth looks at calibration text, and the trial has none")
        alpha, tries = float(str(step.option("alpha"))), int(str(step.option("search")))
        if not tries:
            return _fold_all(session, _places(session, help.tokens_NT, help), alpha, f"alpha {alpha:g}")
        held_out = max(1, round(len(help.tokens_NT) * float(str(step.option("held_out")))))
        if held_out >= len(help.tokens_NT):
            raise QuantizationError(f"smooth.options.search needs at least 2 windows of calibration text, got {len(help.tokens_NT)}")
        places = _places(session, help.tokens_NT[:-held_out], help, sample_tokens=_sample_tokens(spec))
        alphas = [number / (tries + 1) for number in range(1, tries + 1)]
        errors = _errors(session, spec, places, alphas, help.tokens_NT[-held_out:], help)
        alpha = min(zip(errors, alphas, strict=True))[1]
        return _fold_all(session, places, alpha, f"alpha {alpha:g}, the best of {tries} on {held_out} windows held out")


def _sample_tokens(spec: QuantizationSpec) -> int:
    """Inputs themselves that a search needs: a static range that ends at a percentile is taken from some."""
    if spec.activation is None or spec.activation.clip_percentile is None:
        return 0
    return RANGE_TOKENS if ACTIVATIONS[spec.activation.step.name].needs_ranges else 0


def _places(session: Session, tokens_NT: Tensor, help: Help, sample_tokens: int = 0) -> list[_Place]:
    inputs = help.statistics.inputs(session, tokens_NT, help.progress, sample_tokens=sample_tokens)
    found = []
    for pair in pairs(session.model, "norm"):
        measured = [inputs[reader] for reader in pair.readers if reader in inputs]
        if not measured:  # none of the readers is quantized
            continue
        weights = [matrix_OI.abs().amax(dim=0).to("cpu", torch.float32) for matrix_OI in columns_of_readers(session.model, pair)]
        found.append(_Place(pair=pair, inputs=_together(measured), max_weight_I=torch.stack(weights).amax(dim=0)))
    return found


def _together(measured: Sequence[LayerInputs]) -> LayerInputs:
    """What went to several readers: experts are sent some of the tokens each."""
    low_I = torch.stack([each.min_I for each in measured]).amin(dim=0)
    high_I = torch.stack([each.max_I for each in measured]).amax(dim=0)
    return replace(measured[0], num_tokens=max(each.num_tokens for each in measured), min_I=low_I, max_I=high_I)


def _fold_all(session: Session, places: Sequence[_Place], alpha: float, detail: str) -> tuple[TransformRecord, ...]:
    for place in places:
        fold(session.model, place.pair, place.scales(alpha), session.write)
    return tuple(TransformRecord(name=place.pair.source, detail=detail) for place in places)


def _errors(
    session: Session, spec: QuantizationSpec, places: Sequence[_Place], alphas: Sequence[float], tokens_NT: Tensor, help: Help
) -> list[float]:
    """The sum of relative output errors over all norms, for each α."""
    samples = _samples(session, places, tokens_NT, help)
    return [sum(_error(session, spec, place, sample_NTI, alpha, help) for place, sample_NTI in samples) for alpha in alphas]


def _error(session: Session, spec: QuantizationSpec, place: _Place, sample_NTI: Tensor, alpha: float, help: Help) -> float:
    scale_I = place.scales(alpha).to(sample_NTI.device, torch.float32)
    used_NTI = _activations(spec, place, sample_NTI / scale_I, scale_I)
    error, size = 0.0, 0.0
    for weight_OI in columns_of_readers(session.model, place.pair):
        help.progress()
        exact = sample_NTI @ weight_OI.float().T
        smoothed_OI = weight_OI.float() * scale_I
        used_OI = fake_quantize(data_type_of(spec), smoothed_OI, spec) if spec.data_type is not None else smoothed_OI
        error += float((exact - used_NTI @ used_OI.T).square().sum(dtype=torch.float64))
        size += float(exact.square().sum(dtype=torch.float64))
    return error / size if size else 0.0


def _activations(spec: QuantizationSpec, place: _Place, smoothed_NTI: Tensor, scale_I: Tensor) -> Tensor:
    """What enters the readers once activations are quantized too, where these are the activations that are."""
    if spec.activation is None or "linear" not in spec.activation.sites:
        return smoothed_NTI
    of_scale_I = scale_I.cpu()
    seen = place.inputs
    ranges = replace(seen, min_I=seen.min_I / of_scale_I, max_I=seen.max_I / of_scale_I, sample_TI=seen.sample_TI / of_scale_I)
    quantizer: nn.Module = ACTIVATIONS[spec.activation.step.name].module(spec.activation, ranges).to(smoothed_NTI.device)
    with tokens_are(torch.ones(smoothed_NTI.shape[:2], dtype=torch.bool)):
        quantized: Tensor = quantizer(smoothed_NTI)
    return quantized


def _samples(session: Session, places: Sequence[_Place], tokens_NT: Tensor, help: Help) -> list[tuple[_Place, Tensor]]:
    """What each norm puts out at some tokens of each window, evenly spaced: (N, T, I) float32."""
    found: dict[str, list[Tensor]] = {place.pair.source: [] for place in places}
    every = -(-tokens_NT.shape[1] // MOST_TOKENS)

    def hear(name: str, output: Tensor) -> None:
        found[name].append(output.view(tokens_NT.shape[1], -1)[::every].to(torch.float32, copy=True))

    with ExitStack() as stack:
        for name in found:
            norm = session.model.get_submodule(name)
            stack.callback(norm.register_forward_hook(lambda _m, _i, output, name=name: hear(name, output)).remove)
        read(session, tokens_NT, help.progress)
    return [(place, torch.stack(found[place.pair.source])) for place in places]


TRANSFORM = Smooth()
