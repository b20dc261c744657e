"""Which trials a person means: `model=mini-* bit_width=3,4 status=failed`.

Terms are joined by *and*, the values of one term by *or*.  A value is the text of a column's value, or
a pattern of it (`*`, `?`, `[…]`); `null` is the empty value; a hash may be cut short, as git does it;
numbers are compared as numbers.  A value that nothing has is refused, also where other values of its list
are met: who misspells one of two models means both.
The columns are those of the tables (`quantsweep.tables.records`), so what one sees in pandas is what one types.

A plan knows the axes and the tasks of a trial, rows also know how it went and on what: `PLAN_COLUMNS`
and `ROW_COLUMNS`.  A column that cannot be known where a filter is used is refused, not ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.tables import records
from quantsweep.trial.specs import PlannedTrial

TASK_COLUMNS = tuple(column.name for column in records.TASK)
PLAN_COLUMNS = (*(column.name for column in records.IDENTITY), *TASK_COLUMNS)
"""What is known of a trial before it ran."""
OUTCOME_COLUMNS = ("status", "failure_class", "failure_fingerprint")
"""How an attempt ended: columns of `trials` only."""
RUN_COLUMNS = (
    "attempt",
    "shard_id",
    "plan",
    "tag",
    "host",
    "device",
    "driver",
    "slurm_job",
    "code_commit",
    "code_diff",
    "code_hash",
    "schema_version",
)
"""What ran it: columns of every table."""
ROW_COLUMNS = (*PLAN_COLUMNS, *RUN_COLUMNS, *OUTCOME_COLUMNS)
"""What is known of a trial that ran."""

_TYPES = {column.name: column.type for table in records.COLUMNS.values() for column in table}
_HASHES = frozenset({"trial_id", "model_content", "failure_fingerprint", "attempt", "code_commit", "code_diff", "code_hash"})
_PATTERN = re.compile(r"[*?\[]")
_NUMBER = re.compile(r"-?\d+(\.0+)?")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One `column=value,value`: a row passes that has any of the values."""

    column: str
    values: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        """True if a value of the column (as Python has it; None is `null`) is one of those asked for."""
        text = _text(value)
        return any(self.is_met(text, wanted) for wanted in self.values)

    def is_met(self, text: str, wanted: str) -> bool:
        """True if the text of a value of the column is what one of the filter's values means."""
        if _PATTERN.search(wanted):
            return fnmatchcase(text, wanted)
        return text == wanted or (self.column in _HASHES and text.startswith(wanted))

    def __str__(self) -> str:
        return f"{self.column}={','.join(self.values)}"


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Several terms that must all hold; without terms everything passes."""

    terms: tuple[Term, ...]

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the terms look at."""
        return frozenset(term.column for term in self.terms)

    def matches(self, columns: Mapping[str, Any]) -> bool:
        """True for a row, given as column → value; raises KeyError for a column that the row does not have."""
        return all(term.accepts(columns[term.column]) for term in self.terms)

    def matches_planned(self, planned: PlannedTrial) -> bool:
        """True for a planned trial; terms on tasks hold if one of its tasks meets all of them."""
        return any(map(self.matches, planned_rows(planned)))

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """One flag a row of an Arrow table that has the filter's columns."""
        passed = np.ones(table.num_rows, np.bool_)
        for term in self.terms:
            values, codes = _distinct(table.column(term.column))
            accepted = np.fromiter((term.accepts(value) for value in values), np.bool_, len(values))
            passed &= accepted[codes]
        return passed

    def values(self, table: pa.Table) -> dict[str, list[Any]]:
        """The distinct values that an Arrow table has in the filter's columns."""
        return {column: _distinct(table.column(column))[0] for column in self.columns}

    def refuse_unmet(self, there: Mapping[str, Iterable[Any]], where: str) -> None:
        """Raise ConfigurationError for values that nothing has, each with the nearest; `there`: the values of the filter's columns."""
        unmet = []
        for term in self.terms:
            known = {_text(value) for value in there[term.column]}
            missing = [one for one in term.values if not any(term.is_met(text, one) for text in known)]
            unmet += [did_you_mean(term.column, one, known) if known else f"nothing has a {term.column} there" for one in missing]
        if unmet:
            raise ConfigurationError("\n".join([f"nothing was done, since {where} does not have all that {self} names:", *unmet]))

    def __str__(self) -> str:
        return " ".join(str(term) for term in self.terms) or "(everything)"


def parse(texts: Iterable[str], columns: Iterable[str] = ROW_COLUMNS) -> Filter:
    """A filter from what was typed; raises ConfigurationError for a column not in `columns`, or a value that it cannot have."""
    known = tuple(columns)
    terms: dict[str, Term] = {}
    for text in texts:
        term = _term(text, known)
        if term.column in terms:
            raise ConfigurationError(f"filter {term.column} is given twice; write its values with commas: {term.column}=a,b")
        terms[term.column] = term
    return Filter(terms=tuple(terms.values()))


def _term(text: str, known: tuple[str, ...]) -> Term:
    column, equals, wanted = text.partition("=")
    if not equals:
        raise ConfigurationError(f"filter '{text}' is not of the form column=value, such as model=mini-* or bit_width=3,4")
    if column not in known:
        if column in ROW_COLUMNS:
            raise ConfigurationError(f"filter {text}: {column} is known only of trials that ran. Known here: {', '.join(sorted(known))}")
        raise ConfigurationError(did_you_mean("filter column", column, known, limit=len(known)))
    return Term(column=column, values=tuple(_checked(text, column, value.strip()) for value in wanted.split(",")))


def _checked(text: str, column: str, value: str) -> str:
    """The value, a number as `_text` writes it: 4, 4.0 and 04 are one number."""
    if not value:
        raise ConfigurationError(f"filter '{text}' has an empty value; the empty value of a table is null: {column}=null")
    if value == "null" or _PATTERN.search(value):
        return value
    if pa.types.is_integer(_TYPES[column]):
        if not _NUMBER.fullmatch(value):
            hint = " (channel and tensor are values of granularity)" if column == "block_size" else ""
            raise ConfigurationError(f"filter '{text}': {column} is a whole number or null, not '{value}'{hint}")
        return _text(int(value.partition(".")[0]))
    if pa.types.is_floating(_TYPES[column]):
        try:
            return _text(float(value))
        except ValueError:
            raise ConfigurationError(f"filter '{text}': {column} is a number or null, not '{value}'") from None
    if pa.types.is_boolean(_TYPES[column]) and value not in ("true", "false"):
        raise ConfigurationError(f"filter '{text}': {column} is true, false or null, not '{value}'")
    if column == "status" and value not in ("done", "failed"):
        raise ConfigurationError(f"filter '{text}': {did_you_mean('status', value, ('done', 'failed'))}")
    return value


def planned_rows(planned: PlannedTrial) -> Iterator[dict[str, Any]]:
    """A planned trial as its rows will be, one a task: PLAN_COLUMNS."""
    trial = records.identity_columns(planned.trial)
    return ({**trial, **records.task_columns(task)} for task in planned.tasks)


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return str(value).removesuffix(".0")  # 16 is what one types for 16.0
    return str(value).lower() if isinstance(value, bool) else str(value)


def _distinct(column: pa.ChunkedArray) -> tuple[list[Any], npt.NDArray[np.int64]]:
    """The distinct values of a column (null is one of them, at the end), and the place of each row's value among them."""
    encoded = records.encoded(column)
    values = encoded.dictionary.to_pylist()
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), len(values)).to_numpy(zero_copy_only=False)
    return ([*values, None] if encoded.null_count else values), codes
