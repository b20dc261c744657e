"""Claims of papers, tested on a table of results: what a claim is, what a verdict is, and how one is reached.

A claim is put as one or several statements "this quantity is above 0", each quantity a weighted sum of trials' scores
(`analysis.uncertainty`), so that it has a standard error over the examples:

    supported             all statements hold: each lower limit of 95 % is above 0, and no trial is missing for any
    contradicted          one fails: its upper limit is below 0, at a level of 95 % for all statements of the claim together
    not enough evidence   anything else; `missing` says which trials are not there

A claim needs all of its statements, so each may have the full 5 % to be wrong; it falls with any of them, so for
contradiction the 5 % are shared out (Bonferroni).  "No effect" is a statement too: the effect is below a margin.
Intervals are over examples (t, `analysis.uncertainty`).  A verdict is about the families and sizes it was found on, which `scope` names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from analysis.uncertainty import LEVEL, Scoreboard, Weights, half_width

SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "not enough evidence"


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A quantity that the claim says is above 0, its standard error with its degrees of freedom, and the trials it was computed from."""

    text: str
    estimate: float
    stderr: float
    degrees: float
    trials: frozenset[str]

    def margin(self, level: float = LEVEL) -> float:
        """Half width of its interval."""
        return half_width(self.stderr, self.degrees, level)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A claim of the paper: its words, and the scores on which it can be tested."""

    id: str
    text: str
    source: str
    scores: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a table says about a claim.

    effect, low, high: the statement that decides (the one nearest to failing), with its 95 % interval; NaN where there is none.
    num_models, num_trials: behind all statements.  scope: families and sizes.  missing: what a verdict would need and the
    table lacks.
    """

    claim: Claim
    score: str
    verdict: str
    decides: str
    effect: float
    low: float
    high: float
    num_models: int
    num_trials: int
    scope: str
    missing: tuple[str, ...]
    statements: tuple[Statement, ...]


@dataclass(slots=True)
class Case:
    """The statements of one claim, as they are gathered."""

    board: Scoreboard
    statements: list[Statement] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def table(self) -> pd.DataFrame:
        """One row a trial."""
        return self.board.table

    def state(self, text: str, weights: Weights, *, constant: float = 0.0, lacking: str) -> None:
        """Add "Σ w · score + constant > 0", more score being better; without weights or an error, note what is lacking."""
        stderr = self.board.stderr(weights) if weights else math.nan
        if math.isnan(stderr):
            self.missing.append(lacking)
        elif stderr == 0:  # all examples agree: too few to say how rarely they would not
            self.missing.append(f"more examples (no answer differs): {text}")
        else:
            estimate = self.board.sign * self.board.value(weights) + constant
            degrees = self.board.degrees(weights)
            self.statements.append(Statement(text=text, estimate=estimate, stderr=stderr, degrees=degrees, trials=frozenset(weights)))


def decide(claim: Claim, case: Case) -> Finding:
    """The verdict on the statements that were gathered."""
    statements = case.statements
    shared = 1 - (1 - LEVEL) / max(len(statements), 1)
    if any(s.estimate + s.margin(shared) < 0 for s in statements):
        verdict = CONTRADICTED
    elif statements and not case.missing and all(s.estimate - s.margin() > 0 for s in statements):
        verdict = SUPPORTED
    else:
        verdict = OPEN
    weakest = min(statements, key=lambda s: s.estimate / s.margin(), default=None)
    effect, half = (weakest.estimate, weakest.margin()) if weakest else (math.nan, math.nan)
    trials = frozenset[str]().union(*(s.trials for s in statements))
    return Finding(
        claim=claim,
        score=case.board.score,
        verdict=verdict,
        decides=weakest.text if weakest else "",
        effect=effect,
        low=effect - half,
        high=effect + half,
        num_models=int(case.table.loc[sorted(trials), "model"].nunique()),
        num_trials=len(trials),
        scope=scope(case.table.loc[sorted(trials)]),
        missing=tuple(dict.fromkeys(case.missing)),
        statements=tuple(statements),
    )


def scope(rows: pd.DataFrame) -> str:
    """The families of trials and the sizes of their models, in words; rows of `analysis.scores.scores`."""
    sizes = rows["num_parameters"].groupby(rows["family"]).agg(["min", "max"]) / 1e6
    return ", ".join(f"{family} ({low:.3g} to {high:.3g} million parameters)" for family, (low, high) in sizes.iterrows())
