"""The house's walls: imports point one way, planning is light, nothing is listed twice."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from quantsweep.registry import DATA_TYPES, METHODS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "quantsweep"

FORBIDDEN = {
    # (files, relative to the package) → third-party modules that they may not import, at any depth of the file
    (
        "errors.py",
        "checks.py",
        "specs.py",
        "registry.py",
        "constraints.py",
        "convert.py",
        "declared.py",
        "failures.py",
        "slurm.py",
        "identity.py",
        "checkpoint.py",
        "planned_layers.py",
        "task_identity.py",
    ): {
        "torch",
        "hydra",
        "pandas",
        "transformers",
        "pyarrow",
        "omegaconf",
        "submitit",
        "lm_eval",
    },
    (
        "schema.py",
        "inapplicable.py",
        "grid.py",
        "plan.py",
        "shards.py",
        "records.py",
        "files.py",
        "messages.py",
        "prediction.py",
    ): {
        "torch",
        "transformers",
        "submitit",
        "hydra",
        "lm_eval",
    },
    ("worker.py", "child_process.py", "stopping.py", "heartbeat.py"): {
        "torch",
        "transformers",
        "submitit",
        "hydra",
        "lm_eval",
    },
    ("hydra_plugin", "_plugins", "launching", "cli"): {"torch", "transformers", "lm_eval"},
    ("numerics", "data_types", "methods"): {"hydra", "transformers", "pyarrow", "pandas", "omegaconf", "lm_eval"},
    ("models", "evaluation", "child.py"): {"hydra", "omegaconf", "submitit"},
}
LAYERS = [  # lowest first: a module may import its own layer and those below it
    ("words", "redaction", "exit_status", "time_left", "fitting", "share"),
    ("program",),
    ("errors",),
    ("typed",),
    ("checks",),
    ("signs", "causes"),
    ("specs", "registry"),
    ("conditions", "constraints", "convert", "declared", "identity", "task_identity", "slurm", "failures", "files", "pins"),
    ("checkpoint", "planned_layers"),
    ("grid", "schema", "paths", "sources"),
    ("inapplicable",),
    ("workers",),
    ("stopping", "heartbeat"),
    ("numerics",),
    ("data_types",),
    ("methods",),
    ("models",),
    ("evaluation",),
    ("shards",),
    ("plan",),
    ("order",),
    ("forgetting",),
    ("table_files",),
    ("records",),
    ("filters",),
    ("holds",),
    ("effective", "wanted"),
    ("launches",),
    ("results", "prediction"),
    ("environment", "tracking", "budget"),
    ("attempts", "breaker", "retries", "snapshot"),
    ("child", "child_process", "prewarm_child"),
    ("worker", "prewarm", "doctor"),
    ("launching",),
    ("slurm_job",),
    ("messages",),
    ("hydra_plugin",),
    ("cli", "_plugins"),
]


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


def files(name: str) -> list[Path]:
    """The files behind a name of FORBIDDEN."""
    path = PACKAGE / name
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize(("names", "modules"), FORBIDDEN.items(), ids=lambda v: "-".join(sorted(v))[:40])
def test_layers_do_not_import_what_they_must_not(names: tuple[str, ...], modules: set[str]) -> None:
    for name in names:
        for path in files(name):
            bad = {module for module in imports(path) if module.split(".")[0] in modules}
            assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def layer_of(module: str) -> int | None:
    part = module.split(".")[1] if module.startswith("quantsweep.") else None
    return next((i for i, layer in enumerate(LAYERS) if part in layer), None)


def test_imports_point_one_way() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if "mini" in path.relative_to(PACKAGE).parts:
            continue  # the training scripts of the bundled models use the product; nothing uses them
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        own = layer_of(name)
        if path.name == "__init__.py" and path.parent == PACKAGE:
            continue
        assert own is not None, f"{name} is in no layer: add it to LAYERS"
        for module in imports(path):
            other = layer_of(module)
            assert other is None or other <= own, f"{name} imports {module}, which lies above it"


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
        ("import quantsweep.worker", {"torch", "transformers", "lm_eval", "hydra", "wandb"}),
    ],
)
def test_imports_are_lean(code: str, heavy: set[str]) -> None:
    probe = f"{code}; import sys; print([m for m in {sorted(heavy)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("registry", "folder"), [(DATA_TYPES, "data_type"), (METHODS, "method")])
def test_every_component_has_one_file_and_one_yaml(registry: object, folder: str) -> None:
    yamls = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / folder).glob("*.yaml")}
    behind = {"codebook" if "levels" in content["options"] else stem for stem, content in yamls.items()}
    assert behind == set(registry.names())  # type: ignore[attr-defined]


def test_public_names() -> None:
    import quantsweep

    assert sorted(quantsweep.__all__) == ["__version__", "load_layers", "load_results", "load_samples", "load_trials"]
    for name in quantsweep.__all__:
        assert getattr(quantsweep, name) is not None


def test_launch_is_short() -> None:
    assert len((ROOT / "launch.py").read_text().splitlines()) <= 32
