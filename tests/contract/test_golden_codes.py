"""Numbers do not change silently: hashes of what every data type makes of one fixed weight.

The weight is built from integers, the arithmetic is plain IEEE float32, and codes, scales, zero
points and levels are hashed, so the hashes hold across torch versions and processors.  After a
change that is meant: raise `version` in conf/data_type/<name>.yaml and run

    python tests/contract/test_golden_codes.py

which refuses to write other numbers under an old version.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from component_cases import combinations, component, data_type_named, describe, stems

from quantsweep.data_types._base import quantize_weight
from quantsweep.trial.constraints import reason_to_skip
from quantsweep.trial.specs import QuantizationSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "data_types.json"


def fixed_weight() -> torch.Tensor:
    """24 × 80 bell-shaped numbers of at most 20 bits, from a linear congruential generator; one row is small."""
    state, numbers = 1, []
    for _ in range(24 * 80):
        total = 0
        for _ in range(8):
            state = (state * 1664525 + 1013904223) % 2**32
            total += (state >> 15) - 2**16
        numbers.append(total / 2**20)
    weight = torch.tensor(numbers, dtype=torch.float32).reshape(24, 80)
    weight[5] /= 2**12
    return weight


def digest(name: str, spec: QuantizationSpec) -> str:
    """12 hexadecimal digits over codes, scales, zero points and levels (levels to 6 decimals: powers of ten may differ in the last bit)."""
    quantized = quantize_weight(data_type_named(name), fixed_weight(), spec)
    qparams = quantized.qparams
    zero = [] if qparams.zero_N1 is None else qparams.zero_N1.flatten().tolist()
    levels = [] if qparams.levels_L is None else [f"{level:.6f}" for level in qparams.levels_L.tolist()]
    parts = [quantized.layout.join(quantized.codes_NB).flatten().tolist(), qparams.scale_N1.flatten().tolist(), zero, levels]
    if qparams.tensor_scale is not None:
        parts.append([float(qparams.tensor_scale)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def found(name: str) -> dict[str, Any]:
    """Version and digests of everything that the yaml claims."""
    yaml = component("data_type", name)
    steps = {"rounding": component("rounding", "round_to_nearest")["capabilities"]}
    specs = [spec for spec in combinations(yaml) if reason_to_skip(spec, yaml["capabilities"], steps) is None]
    return {"version": yaml["version"], "digests": {describe(spec): digest(name, spec) for spec in specs}}


@pytest.mark.parametrize("name", sorted(stems("data_type")))
def test_numbers_change_with_the_version_only(name: str) -> None:
    """See the module for what to do when this fails."""
    golden = json.loads(GOLDEN.read_text())
    assert name in golden, "a new data type: run `python tests/contract/test_golden_codes.py`"
    assert found(name) == golden[name], (
        f"numbers of {name} changed: raise its version, then run `python tests/contract/test_golden_codes.py`"
    )


def write() -> None:
    """Write the golden file anew; numbers may be added under a version, not changed."""
    old = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    new = {name: found(name) for name in sorted(stems("data_type"))}
    for name, entry in new.items():
        before = old.get(name, {"version": None, "digests": {}})
        changed = [case for case, value in before["digests"].items() if entry["digests"].get(case) != value]
        if changed and before["version"] == entry["version"]:
            sys.exit(f"{name}: {len(changed)} numbers changed ({changed[0]}, …): raise `version` in conf/data_type/{name}.yaml first")
    GOLDEN.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
