"""The claims of the k-bit inference paper as data, and a function for each that tests it on a table of results.

How a verdict is reached is in `analysis.claims`; here stand the statements that each claim is made of, and the
thresholds where the paper has words ("near", "nearly", "nothing").

Source: Dettmers & Zettlemoyer 2022, arXiv:2212.09720.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.claims import CONTRADICTED, OPEN, SUPPORTED, Case, Claim, Finding, decide, scope
from analysis.correlation import LEAST_MODELS, correlation
from analysis.curves import Curve, combine, contenders, curves, mean_lead
from analysis.effects import Setting, contrast, paired
from analysis.equal_bits import GRID_POINTS
from analysis.scores import ACCURACY, BITS_PER_BYTE, scores
from analysis.selection import BASELINE, BASELINE_BITS, PLAIN_METHOD, PROXY_METHOD, one_variant
from analysis.uncertainty import Scoreboard, Weights

WIDTHS = (3, 4, 5, 6, 7, 8, BASELINE_BITS)
"""What 4 bit must be better than: all widths of the paper."""
SMALL_BLOCK, LARGE_BLOCK = "64", "1024"
TYPES = ("int", "fp", "quantile", "dynamic")
MIN_FAMILIES, MIN_MODELS = 2, 2
"""A curve needs two models; what holds "almost universally" must have been seen in more than one family."""
PAPER_TASKS = {"lambada_openai", "piqa", "winogrande", "hellaswag"}
PAPER_RANDOM = 0.35
"""Mean accuracy that the paper calls random for its four tasks (chance alone is 0.3125)."""
CHANCE = {
    "lambada_openai": 0.0,
    "mini_cloze": 0.0,
    "piqa": 0.5,
    "winogrande": 0.5,
    "copa": 0.5,
    "rte": 0.5,
    "hellaswag": 0.25,
    "mini_continuation": 0.25,
    "arc_easy": 0.25,
    "arc_challenge": 0.25,
    "openbookqa": 0.25,
}
"""Chance of the right answer: one over the number of choices, 0 where a word must be found."""
KEPT = 0.5
"""A model is unstable at a bit width that keeps less than half of what its baseline has above the random level."""
UNSTABLE_FAMILIES, LARGE_MODEL = ("opt", "pythia"), 10_000_000_000
"""Whose 3-bit instability is claimed "at the largest sizes": both families have models above 10 billion parameters."""
NEARLY = 0.8
"""Block 1024 → 64 gains "nearly as much" as 4 → 5 bit: at least four fifths of it, our reading of "nearly"."""
NEGLIGIBLE = {ACCURACY: 0.005, BITS_PER_BYTE: 0.01}
"""Gains below this are none.  Accuracy: one standard error of the mean of the paper's four tasks, √(Σ ¼/n) / 4 with n = 5,153,
1,838, 1,267 and 10,042 examples.  Bits per byte: 0.7 % of a byte's perplexity."""
STRONG = -0.9
"""The paper's r is −0.94; weaker than this would no longer justify its use of one score for the other."""


_SOURCE = "arXiv:2212.09720"
_BOTH = (ACCURACY, BITS_PER_BYTE)
CLAIMS = (
    Claim(
        id="a",
        text="4 bit is almost universally optimal at equal total model bits (the exception, 3 bit at BLOOM-176B, is not tested here)",
        source=_SOURCE,
        scores=_BOTH,
    ),
    Claim(
        id="b",
        text="3 bit is unstable for OPT and Pythia: near the random level at the largest sizes",
        source=_SOURCE,
        scores=(ACCURACY,),
    ),
    Claim(
        id="c",
        text="At 4 bit small blocks and Float and Quantile help, Quantile most; block 1024 → 64 gains nearly as much as 4 → 5 bit",
        source=_SOURCE,
        scores=_BOTH,
    ),
    Claim(
        id="d",
        text="No block size and no data type helps 6 to 8 bit",
        source=_SOURCE,
        scores=_BOTH,
    ),
    Claim(
        id="e",
        text="Proxy quantization removes the 3-bit instability, does not beat 4 bit, and brings nothing at 4 bit",
        source=_SOURCE,
        scores=(ACCURACY,),
    ),
    Claim(
        id="f",
        text="Perplexity and zero-shot accuracy are strongly correlated (r = −0.94)",
        source=_SOURCE,
        scores=(ACCURACY,),
    ),
)


def claims(results: pd.DataFrame, samples: pd.DataFrame | None = None, *, score: str = ACCURACY) -> list[Finding]:
    """What `results` says about each claim that can be tested on `score`.

    results, samples: frames of `quantsweep.load_results` and `load_samples`; with samples, differences are paired by example.
    Raises ConfigurationError where planted and plain models are mixed.
    """
    table = scores(results, samples)
    one_variant(table)
    board = Scoreboard(table, score, samples)
    return [_TESTS[claim.id](claim, _KBitCase(board)) for claim in CLAIMS if score in claim.scores]


@dataclass(slots=True)
class _KBitCase(Case):
    """The table, by what was added to round to nearest."""

    @property
    def plain(self) -> pd.DataFrame:
        """Trials that are the baseline or round to nearest with nothing added."""
        table = self.table
        plain = (table["outlier_fraction"] == 0) & ~table["centered"] & table["method"].isin((BASELINE, PLAIN_METHOD))
        return table[plain]

    @property
    def proxy(self) -> pd.DataFrame:
        return self.table[(self.table["outlier_fraction"] > 0) & ~self.table["centered"]]

    def curves(self, rows: pd.DataFrame) -> list[Curve]:
        """Curves of two models or more, all of whose trials are in `rows`."""
        trials = set(rows.index)
        return [curve for curve in curves(self.board) if trials.issuperset(curve.trials) and len(curve.models) >= MIN_MODELS]


# --- one function a claim -----------------------------------------------------------------------------------------------


def _four_bit_wins(claim: Claim, case: _KBitCase) -> Finding:
    return _four_bit_leads(claim, case, case.curves(case.plain), SMALL_BLOCK, WIDTHS)


def four_bit_wins(board: Scoreboard) -> Finding:
    """Claim (a) on any table (`analysis.boards.board`): the best configuration of 4 bit against that of every other precision there is."""
    found = [curve for curve in curves(board) if len(curve.models) >= MIN_MODELS]
    widths = sorted({*WIDTHS, *(curve.bits for curve in found)})
    return _four_bit_leads(CLAIMS[0], Case(board), found, None, widths)


def _four_bit_leads(claim: Claim, case: Case, found: Sequence[Curve], block: str | None, widths: Sequence[float]) -> Finding:
    where = f"block {block}" if block else "any block"
    with_four = 0
    for family in sorted({curve.family for curve in found}):
        best = contenders(found, case.board.sign, family=family, block=block)
        if 4 not in best:
            continue
        with_four += 1
        for bits in widths:
            if bits != 4:
                lead = mean_lead(best[4], best[bits], GRID_POINTS) if bits in best else {}
                lacking = f"{family} at {bits} bit ({where}, {MIN_MODELS} models or more, some sizes shared with 4 bit)"
                case.state(f"{family}: mean lead of 4 bit over {bits} bit at equal bits", lead, lacking=lacking)
    if with_four < MIN_FAMILIES:
        case.missing.append(f"4-bit trials at {where} of {MIN_FAMILIES - with_four} more families, two models or more each")
    return decide(claim, case)


def _three_bit_is_unstable(claim: Claim, case: _KBitCase) -> Finding:
    level = _random_level(case)
    plain = case.plain
    for family in UNSTABLE_FAMILIES:
        lacking = f"{family} models above {LARGE_MODEL / 1e9:g} billion parameters at 3 bit (block {SMALL_BLOCK}) and 16 bit"
        rows = plain[(plain["family"] == family) & (plain["num_parameters"] >= LARGE_MODEL)].sort_values("num_parameters")
        both = [model for model in rows["model"].unique() if _baseline(rows, model) and _three_bit(rows, model)]
        if not both or level is None:
            case.missing.append(lacking)
            continue
        model = both[-1]
        loss = _loss(_baseline(rows, model), _three_bit(rows, model))
        if _above(case, dict.fromkeys(_baseline(rows, model), 1.0), level):
            text = f"{model}: 3 bit loses more than half of the accuracy above random"
            case.state(text, loss, constant=(1 - KEPT) * level, lacking=lacking)
        else:
            case.missing.append(f"a baseline of {model} that is above the random level {level:.3g}")
    return decide(claim, case)


def _small_blocks_help_four_bit(claim: Claim, case: _KBitCase) -> Finding:
    blocks = _block_gain(case, 4)
    case.state("4 bit: gain of block 64 over 1024", blocks, lacking="4-bit trials at blocks 64 and 1024")
    for label, against in (("fp", "int"), ("quantile", "int"), ("quantile", "fp")):
        lacking = f"4-bit trials of {label} and {against} at block {SMALL_BLOCK}"
        case.state(f"4 bit, block {SMALL_BLOCK}: gain of {label} over {against}", _type_gain(case, 4, label, against), lacking=lacking)
    factors = ((4, SMALL_BLOCK, 1.0), (4, LARGE_BLOCK, NEARLY - 1.0), (5, LARGE_BLOCK, -NEARLY))
    ratio = _mean(contrast(case.board, *((_at(bits, label, block), factor) for bits, block, factor in factors)) for label in TYPES)
    text = f"gain of block 1024 → 64 at 4 bit, less {NEARLY:g} × the gain of 4 → 5 bit at block 1024"
    case.state(text, ratio, lacking="models with 4-bit trials at blocks 64 and 1024 and 5-bit trials at block 1024")
    return decide(claim, case)


def _nothing_helps_wide(claim: Claim, case: _KBitCase) -> Finding:
    margin = NEGLIGIBLE[case.board.score]
    for bits in (6, 7, 8):
        gains = {f"block {SMALL_BLOCK} over {LARGE_BLOCK}": _block_gain(case, bits)}
        gains |= {
            f"{label} over int at block {block}": _type_gain(case, bits, label, "int", block)
            for block in (SMALL_BLOCK, LARGE_BLOCK)
            for label in TYPES
            if label != "int"
        }
        for name, gain in gains.items():
            text = f"{bits} bit: {margin:g} less the gain of {name}"
            case.state(text, combine((gain, -1.0)), constant=margin, lacking=f"{bits}-bit trials of {name}")
    return decide(claim, case)


def _proxy_mends_three_bit_only(claim: Claim, case: _KBitCase) -> Finding:
    _state_mended(case)
    proxy, plain = case.proxy, case.plain
    found = case.curves(pd.concat([proxy[proxy["bits"] == 3], plain[plain["bits"] == 4]]))
    families = [
        contenders(found, case.board.sign, family=family, block=SMALL_BLOCK) for family in sorted({curve.family for curve in found})
    ]
    both = [best for best in families if {3, 4} <= set(best)]
    for best in both or [{}]:
        lead = mean_lead(best[4], best[3], GRID_POINTS) if best else {}
        lacking = f"3-bit proxy and 4-bit plain trials of one family at block {SMALL_BLOCK}, two models or more"
        family = best[4].family if best else ""
        case.state(f"{family}: mean lead of 4 bit over 3-bit proxy at equal bits", lead, lacking=lacking)
    gain = _mean({proxy_id: 1.0, plain_id: -1.0} for proxy_id, plain_id in _counterparts(case, 4))
    margin = NEGLIGIBLE[ACCURACY]
    text = f"4 bit: {margin:g} less the gain of proxy"
    case.state(text, combine((gain, -1.0)), constant=margin, lacking="4-bit proxy trials (method outlier_dependent) and the same without")
    return decide(claim, case)


def _state_mended(case: _KBitCase) -> None:
    """Proxy keeps more than half where plain 3 bit does not, over the models where that is so beyond chance."""
    level = _random_level(case)
    if level is None:
        return
    mended, trials = [], _counterparts(case, 3)
    for model in sorted({str(case.table.loc[plain, "model"]) for _, plain in trials}):
        pairs = [pair for pair in trials if case.table.loc[pair[1], "model"] == model]
        baseline = _baseline(case.plain, model)
        if not baseline or not _above(case, dict.fromkeys(baseline, 1.0), level):
            continue
        if _above(case, _loss(baseline, [plain for _, plain in pairs]), -(1 - KEPT) * level):
            mended.append(combine((_loss(baseline, [proxy for proxy, _ in pairs]), -1.0)))
    lacking = "models that are unstable at 3 bit, with 16-bit trials and 3-bit proxy trials (method outlier_dependent)"
    text = "3-bit proxy keeps more than half of the accuracy above random where plain 3 bit does not"
    case.state(text, _mean(mended), constant=-(1 - KEPT) * level, lacking=lacking)


def _perplexity_tells_accuracy(claim: Claim, case: _KBitCase) -> Finding:
    found = correlation(case.table)
    rows = case.table.dropna(subset=["cross_entropy", ACCURACY])
    verdict, missing = OPEN, ""
    if math.isnan(found.low):
        missing = f"trials of {LEAST_MODELS} or more models with accuracies and bits per byte that both vary"
    elif case.table.attrs["cross_entropy_per"] != "token":
        missing = "the samples: perplexity is a token's, and the tables alone have bits per byte"
    elif found.high < STRONG:
        verdict = SUPPORTED
    elif found.low > STRONG * math.sqrt(_reliability(case.board, rows)):
        verdict = CONTRADICTED
    else:
        missing = "more trials or more examples: errors of the accuracies weaken the correlation"
    return Finding(
        claim=claim,
        score=ACCURACY,
        verdict=verdict,
        decides=f"r of capped cross entropy (nats a {case.table.attrs['cross_entropy_per']}) and mean accuracy; strong is below {STRONG:g}",
        effect=found.r,
        low=found.low,
        high=found.high,
        num_models=int(rows["model"].nunique()),
        num_trials=found.n,
        scope=scope(rows),
        missing=(missing,) if missing else (),
        statements=(),
    )


_TESTS: dict[str, Callable[[Claim, _KBitCase], Finding]] = {
    "a": _four_bit_wins,
    "b": _three_bit_is_unstable,
    "c": _small_blocks_help_four_bit,
    "d": _nothing_helps_wide,
    "e": _proxy_mends_three_bit_only,
    "f": _perplexity_tells_accuracy,
}


def _reliability(board: Scoreboard, rows: pd.DataFrame) -> float:
    """Share of the variance of accuracy over trials that is not error over examples; errors weaken r by its root (Spearman 1904)."""
    return max(0.0, 1.0 - board.noise(list(rows.index)) / float(rows[ACCURACY].var()))


# --- quantities ---------------------------------------------------------------------------------------------------------


def _at(bits: int, label: str, block: str) -> Setting:
    return Setting(bits=bits, label=label, block=block)


def _mean(sums: Iterable[Weights]) -> Weights:
    """Mean of the sums that are there."""
    there = [weights for weights in sums if weights]
    return combine(*((weights, 1.0 / len(there)) for weights in there))


def _block_gain(case: _KBitCase, bits: int) -> Weights:
    return _mean(paired(case.board, _at(bits, label, SMALL_BLOCK), _at(bits, label, LARGE_BLOCK)) for label in TYPES)


def _type_gain(case: _KBitCase, bits: int, label: str, against: str, block: str = SMALL_BLOCK) -> Weights:
    return paired(case.board, _at(bits, label, block), _at(bits, against, block))


def _random_level(case: _KBitCase) -> float | None:
    """Mean accuracy without knowledge: the paper's for its tasks, chance for others; None (and noted) where it is not known."""
    tasks = {key.split("@")[0] for key in case.table.attrs["accuracy_tasks"]}
    if tasks == PAPER_TASKS:
        return PAPER_RANDOM
    unknown = sorted(tasks - set(CHANCE))
    if unknown or not tasks:
        case.missing.append(f"the random level of {', '.join(unknown)}" if unknown else "accuracy tasks")
        return None
    return float(np.mean([CHANCE[task] for task in sorted(tasks)]))


def _baseline(rows: pd.DataFrame, model: str) -> list[str]:
    return list(rows.index[(rows["model"] == model) & (rows["label"] == BASELINE)])


def _three_bit(rows: pd.DataFrame, model: str) -> list[str]:
    of_model = (rows["model"] == model) & (rows["bits"] == 3) & (rows["block"] == SMALL_BLOCK) & rows["label"].isin(TYPES)
    return list(rows.index[of_model])


def _loss(baseline: Iterable[str], quantized: Iterable[str]) -> Weights:
    """KEPT · baseline − mean of quantized; above −(1 − KEPT) · level, less than KEPT of what is above the level was kept."""
    return combine((_mean({trial: 1.0} for trial in baseline), KEPT), (_mean({trial: 1.0} for trial in quantized), -1.0))


def _above(case: _KBitCase, weights: Weights, level: float) -> bool:
    low, _ = case.board.interval(weights)
    return low > level


def _counterparts(case: _KBitCase, bits: int) -> list[tuple[str, str]]:
    """Pairs (trial with proxy outliers, the same trial without), of one bit width."""
    plain, proxy = (rows[rows["bits"] == bits] for rows in (case.plain, case.proxy))
    same = {key: str(trial) for key, trial in zip(_cells(plain), plain.index, strict=True)}
    return [(str(trial), same[key]) for key, trial in zip(_cells(proxy), proxy.index, strict=True) if key in same]


def _cells(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """Model, block and label without the proxy's own part: what a trial and its counterpart have in common."""
    labels = rows["label"].str.replace(rf" {PROXY_METHOD}( fraction=\S+)?", "", regex=True)
    return list(zip(rows["family"], rows["model"], rows["block"], labels, strict=True))
