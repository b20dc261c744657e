"""The house's walls: imports point one way, planning is light, nothing is listed twice."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from quantsweep.trial.quantization import DEFAULT_STEPS
from quantsweep.trial.registry import DATA_TYPES, STEPS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "quantsweep"

GROUND = 0
FLOORS = {  # a room may import itself and what lies on a lower floor; modules of the package itself are the ground
    "trial": 1,
    "storage": 2,
    "numerics": 2,
    "checkpoints": 3,
    "texts": 4,
    "data_types": 3,
    "activations": 4,
    "planning": 4,
    "models": 4,
    "calibration": 5,
    "tables": 5,
    "tasks": 5,
    "pipeline": 6,
    "evaluation": 6,
    "failures": 6,
    "clipping": 7,
    "compensations": 7,
    "rounding": 7,
    "transforms": 7,
    "running": 7,
    "operations": 8,
    "launching": 9,
    "crew": 10,
    "composing": 11,
    "hydra_plugin": 12,
    "cli": 13,
    "_plugins": 13,
}
MOST_MODULES = 10
"""More in one room, and a newcomer no longer sees what happens where; the formats and the doors of commands are lists."""
LISTS = {"data_types", "rounding", "cli", "mini"}
FORBIDDEN = {
    # rooms ("ground": modules of the package itself) and single modules →
    # third-party modules that they may not import, at any depth of the file
    ("ground", "trial"): {"torch", "hydra", "pandas", "transformers", "pyarrow", "omegaconf", "submitit", "lm_eval"},
    ("storage", "tables", "planning", "failures", "running"): {"torch", "transformers", "submitit", "hydra", "lm_eval"},
    ("launching", "crew", "operations", "composing", "hydra_plugin", "_plugins", "cli"): {"torch", "transformers", "lm_eval"},
    ("checkpoints",): {"hydra", "omegaconf", "submitit", "lm_eval", "pandas"},
    ("checkpoints.headers", "checkpoints.planned_layers", "checkpoints.pins"): {"torch", "transformers"},
    ("numerics", "data_types"): {"hydra", "transformers", "pyarrow", "pandas", "omegaconf", "lm_eval"},
    ("rounding", "clipping", "compensations", "transforms"): {"hydra", "transformers", "pyarrow", "pandas", "omegaconf", "lm_eval"},
    ("models", "calibration", "pipeline", "tasks", "evaluation"): {"hydra", "omegaconf", "submitit"},
}
CHILDREN = {"running.child", "operations.prewarm_child"}
"""Programs of their own: there torch and the hub's libraries are at home."""


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    skip = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules() -> dict[str, Path]:
    """Every module but the training scripts, by its name below the package ("trial.specs"; a room's own file: "trial")."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "mini" and parts != ("__init__",):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    return module.split(".")[0] if (PACKAGE / module.split(".")[0]).is_dir() else "ground"


def own_imports(module: str) -> set[str]:
    """The product's modules that a module imports."""
    names = {name.removeprefix("quantsweep.") for name in imports(MODULES[module]) if name.startswith("quantsweep.")}
    return {name for name in names if name in MODULES and name != module}


@pytest.mark.parametrize(("rooms", "libraries"), FORBIDDEN.items(), ids=lambda v: "-".join(sorted(v))[:40])
def test_rooms_do_not_import_what_they_must_not(rooms: tuple[str, ...], libraries: set[str]) -> None:
    for module, path in MODULES.items():
        if {room(module), module} & set(rooms) and module not in CHILDREN:
            bad = {name for name in imports(path) if name.split(".")[0] in libraries}
            assert not bad, f"{module} imports {bad}"


def test_imports_go_downstairs() -> None:
    for module in MODULES:
        own = FLOORS.get(room(module), GROUND)
        assert room(module) in {*FLOORS, "ground"}, f"{module} is in a room without a floor: add it to FLOORS"
        for other in own_imports(module):
            lower = FLOORS.get(room(other), GROUND) < own
            assert lower or room(other) == room(module), f"{module} imports {other}, which does not lie below it"


def test_no_module_imports_itself_by_a_detour() -> None:
    tuple(TopologicalSorter({module: own_imports(module) for module in MODULES}).static_order())


def test_no_room_is_crowded() -> None:
    count = Counter(room(module) for module in MODULES if "." in module)
    assert {name for name, number in count.items() if number > MOST_MODULES} <= LISTS


def test_nothing_of_the_product_imports_the_training_scripts() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if "mini" not in path.relative_to(PACKAGE).parts:
            assert not any(module.startswith("quantsweep.mini") for module in imports(path)), path


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import quantsweep", {"torch", "hydra", "pandas", "pyarrow", "transformers"}),
        # (pyarrow.dataset imports pandas by itself, so whoever reads tables has it)
        ("import quantsweep.hydra_plugin.sweeper, quantsweep.hydra_plugin.launcher", {"torch", "transformers", "lm_eval", "wandb"}),
        ("import quantsweep.cli.main, quantsweep.cli.status", {"torch", "transformers", "lm_eval", "hydra"}),
        ("import quantsweep.running.worker", {"torch", "transformers", "lm_eval", "hydra", "wandb"}),
    ],
)
def test_imports_are_lean(code: str, heavy: set[str]) -> None:
    probe = f"{code}; import sys; print([m for m in {sorted(heavy)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("registry", "folder"), [(DATA_TYPES, "data_type"), *((steps, factor) for factor, steps in STEPS.items())])
def test_every_component_has_one_file_and_one_yaml(registry: object, folder: str) -> None:
    yamls = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / folder).glob("*.yaml")}
    behind = {"codebook" if "levels" in content["options"] else stem for stem, content in yamls.items()}
    if folder in DEFAULT_STEPS and folder != "rounding":
        behind.remove(DEFAULT_STEPS[folder])  # nothing to do, and no code that does it
    code = set(registry.names())  # type: ignore[attr-defined]
    assert behind <= code if folder == "kv_cache" else behind == code  # activations have the code of both


def test_public_names() -> None:
    import quantsweep

    assert sorted(quantsweep.__all__) == ["__version__", "load_layers", "load_results", "load_samples", "load_trials"]
    for name in quantsweep.__all__:
        assert getattr(quantsweep, name) is not None


def test_launch_is_short() -> None:
    assert len((ROOT / "launch.py").read_text().splitlines()) <= 32
