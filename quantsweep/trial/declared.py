"""What the yaml of a step, a data type or a method must declare, checked before anything is planned with it.

A component of one's own is a file that somebody wrote by hand: a version that is text, or a capability that is missing,
would end a launch at its first trial or its first table, far from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantsweep.errors import ConfigurationError, did_you_mean
from quantsweep.trial.quantization import FACTORS, FORMAT, NONE

Types = type | tuple[type, ...]
_NOTHING = type(None)
_STEP: Mapping[str, Types] = {"needs_calibration": bool, "uses_seed": bool}
CAPABILITIES: Mapping[str, Mapping[str, Types]] = {
    **dict.fromkeys(FACTORS, _STEP),
    "rounding": {**_STEP, "needs_data_type": bool, "data_types": (list, _NOTHING)},
    "data_type": {
        "bit_widths": list,
        "block_axes": list,
        "block_axis": str,
        "block_size": (int, str, _NOTHING),
        "symmetric": list,
        "scale_dtypes": list,
        "scale_dtype": str,
    },
}
"""What each kind of component declares under `capabilities`, and as what."""
OPTIONAL: Mapping[str, type] = {"options": dict, "ranges": dict, "bounds": dict, "needs": list, "excludes": list, "needs_anatomy": bool}
"""What a step may declare besides."""
COMPANY = (*FACTORS, "data_type", *FORMAT)
"""What `needs` and `excludes` may name, beside `options.<name>` of the step."""
OF_ACTIVATIONS: Mapping[str, Types] = {
    **{"data_type": str, "data_type_options": dict, "bit_width": int, "symmetric": bool, "block_size": (int, _NOTHING)},
    **{"clip_percentile": (int, float, _NOTHING), "sites": list},
}
"""What the yaml of an activation's or a cache's quantizer says beside its options."""
EXAMPLES = {**dict.fromkeys(FACTORS, "none"), "rounding": "round_to_nearest", "data_type": "af4"}
_WORDS = {
    bool: "true or false",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    dict: "keys and values",
    _NOTHING: "null",
}


def check_component(kind: str, config: Mapping[str, Any]) -> None:
    """Raise ConfigurationError where the yaml of a step or data type is not whole."""
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
    _check_types(f"{whom} must give capabilities", capabilities, declared)
    if kind in FACTORS:
        _check_step(kind, config, whom)


def _check_step(kind: str, config: Mapping[str, Any], whom: str) -> None:
    capabilities, options = config["capabilities"], config["options"]
    known = (*CAPABILITIES[kind], *OPTIONAL)
    if unknown := [key for key in capabilities if key not in known]:
        raise ConfigurationError(f"{whom}: {did_you_mean('capability', str(unknown[0]), known)}")
    _check_types(f"{whom} must give capabilities", capabilities, {key: OPTIONAL[key] for key in OPTIONAL if key in capabilities})
    named = {"no_op": config.get("no_op") or {}} | {key: capabilities.get(key) or {} for key in ("options", "ranges", "bounds")}
    for key, values in named.items():
        if unknown := [option for option in values if option not in options]:
            raise ConfigurationError(f"{whom}: {key} names {did_you_mean('option', str(unknown[0]), options)}")
    _check_company(capabilities, (*COMPANY, *(f"options.{option}" for option in options)), whom)
    if kind in ("activation", "kv_cache") and config["name"] != NONE:
        if missing := [key for key in OF_ACTIVATIONS if key not in config]:
            raise ConfigurationError(f"{whom} lacks {', '.join(missing)}")
        _check_types(f"{whom} must give", config, OF_ACTIVATIONS)


def _check_company(capabilities: Mapping[str, Any], known: tuple[str, ...], whom: str) -> None:
    """`known`: the keys that entries of `needs` and `excludes` may name."""
    for key in ("needs", "excludes"):
        for entry in capabilities.get(key) or ():
            if not _is_entry(entry):
                raise ConfigurationError(
                    f"{whom}: each of capabilities.{key} is {{KEY: [VALUES], because: REASON}}, "
                    f"with or without when: {{KEY: [VALUES]}}; got {entry!r}"
                )
            if unknown := [name for name in (*entry, *entry.get("when", {})) if name not in (*known, "when", "because")]:
                raise ConfigurationError(f"{whom}: capabilities.{key} names {did_you_mean('key', str(unknown[0]), known)}")


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("because"), str) or not isinstance(entry.get("when", {}), Mapping):
        return False
    conditions = {key: values for key, values in entry.items() if key not in ("when", "because")}
    return bool(conditions) and all(isinstance(values, list) for values in (*conditions.values(), *entry.get("when", {}).values()))


def _check_types(whom: str, values: Mapping[str, Any], declared: Mapping[str, Types]) -> None:
    for key, types in declared.items():
        allowed = types if isinstance(types, tuple) else (types,)
        if type(values[key]) not in allowed:
            words = " or ".join(_WORDS[each] for each in allowed)
            dot = "." if whom.endswith("capabilities") else " "
            raise ConfigurationError(f"{whom}{dot}{key} as {words}, got {values[key]!r}")
