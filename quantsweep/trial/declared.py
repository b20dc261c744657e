"""What the yaml of a method or a data type must declare, checked before anything is planned with it.

A component of one's own is a file that somebody wrote by hand: a version that is text, or a capability that is missing,
would end a launch at its first trial or its first table, far from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantsweep.errors import ConfigurationError

CAPABILITIES: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "method": {"needs_data_type": bool, "needs_calibration": bool, "uses_seed": bool, "data_types": (list, type(None))},
    "data_type": {
        "bit_widths": list,
        "block_axes": list,
        "block_axis": str,
        "block_size": (int, str, type(None)),
        "symmetric": list,
        "scale_dtypes": list,
        "scale_dtype": str,
    },
}
"""What each kind of component declares under `capabilities`, and as what."""
EXAMPLES = {"method": "round_to_nearest", "data_type": "af4"}
_WORDS = {bool: "true or false", list: "a list", str: "text", int: "a whole number", type(None): "null"}


def check_component(kind: str, config: Mapping[str, Any]) -> None:
    """Raise ConfigurationError where the yaml of a method or data type is not whole."""
    whom, remedy = f"{kind} {config.get('name')}: its yaml", f"conf/{kind}/{EXAMPLES[kind]}.yaml has all"
    if missing := [key for key in ("name", "version", "options", "capabilities") if key not in config]:
        raise ConfigurationError(f"{whom} lacks {', '.join(missing)}; {remedy}")
    version = config["version"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigurationError(f"{whom} must say version: 1 (a whole number, raised when its numbers change), got {version!r}")
    for key in ("options", "capabilities"):
        if not isinstance(config[key], Mapping):
            raise ConfigurationError(f"{whom} must have keys and values under {key} ({{}} for none), got {config[key]!r}")
    capabilities, declared = config["capabilities"], CAPABILITIES[kind]
    if missing := [key for key in declared if key not in capabilities]:
        raise ConfigurationError(f"{whom} lacks capabilities.{', capabilities.'.join(missing)}; {remedy}")
    for key, types in declared.items():
        allowed = types if isinstance(types, tuple) else (types,)
        if type(capabilities[key]) not in allowed:
            words = " or ".join(_WORDS[each] for each in allowed)
            raise ConfigurationError(f"{whom} must give capabilities.{key} as {words}, got {capabilities[key]!r}")
