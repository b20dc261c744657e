"""The factors of a trial as columns of the tables, and what they are in rows from before there were any.

A step's name stands in the column of its factor; `none` (for clipping `absmax`) where nothing was chosen, so that a filter
(`activation=none`) and a group of pandas mean the same.  Options of the rounding are in `method_options`, all others in `step_options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from quantsweep.trial.canonical import canonical_json
from quantsweep.trial.constraints import place_of
from quantsweep.trial.quantization import DEFAULT_STEPS, ActivationSpec, QuantizationSpec


@dataclass(frozen=True)
class Column:
    """One column of a table: the data dictionary (`results/README.md`) is printed from these."""

    name: str
    type: pa.DataType
    unit: str
    meaning: str


_TEXT, _INT = pa.string(), pa.int32()

FACTOR_COLUMNS = (
    Column("rounding", _TEXT, "name", "how weights became codes; none: they stayed (options: method_options)"),
    Column("transform", _TEXT, "names", "exact rewritings before it, in order, joined by +"),
    Column("clipping", _TEXT, "name", "the range that scales were made from; absmax clips nothing"),
    Column("correction", _TEXT, "name", "which error of earlier layers a layer answered for"),
    Column("tuning", _TEXT, "name", "what was trained afterwards"),
    Column("compensation", _TEXT, "name", "what is stored beside the codes"),
    Column("activation", _TEXT, "name", "how activations became codes; none: 16 bits"),
    Column("activation_bit_width", _INT, "bits", "bits of one of them; null where activation is none"),
    Column("kv_cache", _TEXT, "name", "how keys and values were kept; none: 16 bits"),
    Column("scope", _TEXT, "JSON", "layers with another format, by name pattern; none: those of the decoder blocks, all alike"),
    Column("step_options", _TEXT, "JSON", "options of all steps but the rounding, and formats of activations, under their dotted names"),
)


def factor_columns(quantization: QuantizationSpec) -> dict[str, Any]:
    """The factors of a trial by column."""
    names = {factor: "+".join(step.name for step in steps) for factor, steps in quantization.steps.items()}
    activation = quantization.activation
    return {
        **DEFAULT_STEPS,
        **names,
        "activation_bit_width": None if activation is None else activation.bit_width,
        "scope": canonical_json(dict(quantization.scope)) if quantization.scope else DEFAULT_STEPS["scope"],
        "step_options": canonical_json(_step_options(quantization)),
    }


def _step_options(quantization: QuantizationSpec) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for factor, steps in quantization.steps.items():
        if factor != "rounding":
            found |= {f"{place_of(factor, step.name)}.{key}": value for step in steps for key, value in step.options}
    for factor, spec in (("activation", quantization.activation), ("kv_cache", quantization.kv_cache)):
        if spec is not None:
            found |= {f"{factor}.{key}": value for key, value in _format(spec).items()}
            found |= {f"{factor}.{key}": value for key, value in spec.data_type_options}
    if quantization.kv_cache is not None:
        found["kv_cache.bits"] = quantization.kv_cache.bit_width
    return found


def _format(spec: ActivationSpec) -> Mapping[str, Any]:
    given = {"block_size": spec.block_size, "clip_percentile": spec.clip_percentile}
    return {
        "data_type": spec.data_type,
        "symmetric": spec.symmetric,
        "sites": "+".join(spec.sites),
        **{key: value for key, value in given.items() if value is not None},
    }


# --- rows from before ---------------------------------------------------------------------------------------------------

NEEDED_TO_FILL = {"rounding": ("method",)}
"""Other columns that filling a column looks at: once the method was its rounding."""
_FILLED = {column.name: DEFAULT_STEPS.get(column.name, "{}") for column in FACTOR_COLUMNS if column.type == _TEXT}


def filled(rows: pa.Table) -> pa.Table:
    """Rows of a table, texts plain or dictionary-encoded, with the factors that were none where an older version had no column for them."""
    for name, default in _FILLED.items():
        if name in rows.column_names and (column := rows.column(name)).null_count:
            instead = rows.column("method").cast(_TEXT) if name == "rounding" else pa.scalar(default)
            texts = pc.coalesce(column.cast(_TEXT), instead)
            is_encoded = pa.types.is_dictionary(column.type)
            rows = rows.set_column(rows.column_names.index(name), name, texts.dictionary_encode() if is_encoded else texts)
    return rows
