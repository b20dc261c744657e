"""What planning costs at tens of thousands of trials, and where the time goes.

    python -m tests.benchmarks.planning [--trials 35112 43008 100128] [--output planning.txt]       as root: it starts a real cluster

For each size: plan and submit on a cluster, then cancel; plan a sweep that is half done, and one that is finished; `status`
of it.  Every command runs in a process of its own, as a user's would.  The breakdown is of the first:
wall seconds inside each step, steps inside it not counted.
"""

from __future__ import annotations

import functools
import importlib
import json
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import PROGRAMS, ROOT, Measured, Shims, output_parser, run, say, table, work_folder
from tests.slurm.cluster import Cluster

SIZES = {
    35_112: ("model=glob(mini-*)", "data_type=int,fp,quantile,dynamic", "bit_width=range(3,9)", "block_size=range(16,3360,16)"),
    43_008: ("model=glob(mini-*)", "data_type=int,fp,quantile,dynamic", "bit_width=range(3,9)", "block_size=range(16,4112,16)"),
    100_128: ("model=glob(mini-*)", "data_type=int,fp,quantile,dynamic", "bit_width=range(3,9)", "block_size=range(16,4784,8)"),
}
"""Trials → grid; 168 combinations times block sizes."""
REST = ("task=mini_ppl", "limit=1", "cluster=slurm", "cluster.partition=main", "results_dir=results", "sweep=big")

SETTLED_SECONDS = 240.0

STEPS = (
    ("compose (Hydra)", "hydra._internal.config_loader_impl", "ConfigLoaderImpl.load_configuration"),
    ("read the grid", "quantsweep.composing.composition", "make_request"),
    ("expand to trials", "quantsweep.planning.plan", "expand"),
    ("past trials", "quantsweep.operations.prediction", "Predictor.from_tables"),
    ("what is done", "quantsweep.tables.records", "read_done"),
    ("subtract and cut", "quantsweep.planning.plan", "build_plan"),
    ("say it", "quantsweep.operations.messages", "plan_text"),
    ("plan file", "quantsweep.planning.plan_files", "write_plan"),
    ("code snapshot", "quantsweep.launching.snapshot", "take"),
    ("settle", "quantsweep.launching.settle", "settle"),
    ("submit", "quantsweep.launching.refill", "submit_waiting"),
)
"""What is timed inside a launch: label, module, function.  One that is not there is said to be missing."""


# --- inside the process that is timed ------------------------------------------------------------------------------------


class Clock:
    """Wall seconds by step, steps inside a step not counted in it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Time one step."""
        started = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - started
            self.seconds[label] = self.seconds.get(label, 0.0) + whole - self._inside.pop()
            if self._inside:
                self._inside[-1] += whole

    def wrap(self, label: str, module_name: str, path: str) -> bool:
        """Time every call of a function, whoever has imported it; False if there is none of that name."""
        try:
            owner: Any = importlib.import_module(module_name)
            *classes, name = path.split(".")
            for part in classes:
                owner = getattr(owner, part)
            kept = vars(owner)[name]
        except (ImportError, AttributeError, KeyError):
            return False
        if isinstance(kept, classmethod):
            setattr(owner, name, classmethod(self._timed(label, kept.__func__)))
            return True
        timed = self._timed(label, kept)
        setattr(owner, name, timed)
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("quantsweep") and vars(module).get(name) is kept:
                setattr(module, name, timed)
        return True

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.step(label):
                return function(*arguments, **keywords)

        return timed

    def wrap_slurm(self) -> None:
        """Time the programs of Slurm by name."""
        real = subprocess.run

        def timed(argv: Any, *arguments: Any, **keywords: Any) -> Any:
            name = Path(argv[0]).name if isinstance(argv, (list, tuple)) else ""
            if name not in PROGRAMS:
                return real(argv, *arguments, **keywords)
            with self.step(name):
                return real(argv, *arguments, **keywords)

        subprocess.run = timed  # type: ignore[assignment]


def timed_launch(report: Path, started: float, arguments: Sequence[str]) -> None:
    """Run launch.py in this process with every step timed, and write the seconds to `report`."""
    clock = Clock()
    importlib.import_module("quantsweep.hydra_plugin.sweeper")
    importlib.import_module("quantsweep.hydra_plugin.launcher")
    missing = [f"{module}.{name}" for label, module, name in STEPS if not clock.wrap(label, module, name)]
    clock.wrap_slurm()
    imports = time.time() - started
    sys.argv = [str(ROOT / "launch.py"), *arguments]
    began = time.perf_counter()
    runpy.run_path(sys.argv[0], run_name="__main__")
    whole = time.perf_counter() - began
    seconds = {"start Python, import": imports, **clock.seconds}
    seconds["everything else"] = whole - sum(clock.seconds.values())
    report.write_text(json.dumps({"seconds": seconds, "missing": missing}))


# --- outside -------------------------------------------------------------------------------------------------------------


def quantsweep_command(*arguments: str) -> list[str]:
    """The command line tool, by this interpreter."""
    return [sys.executable, "-c", "import sys; from quantsweep.cli.main import main; sys.exit(main())", *arguments]


def benchmark(size: int, folder: Path, cluster: Cluster, shims: Shims) -> tuple[list[tuple[str, ...]], list[str]]:
    """All commands at one size: rows of the table, and the lines of the breakdown."""
    from quantsweep.planning.plan_files import read_asked
    from quantsweep.storage.paths import SweepFolder
    from tests.benchmarks.synthetic import write_done

    folder.mkdir()
    env = shims.environment(cluster) | {"PYTHONPATH": str(ROOT)}
    overrides = (*SIZES[size], *REST)
    launch = [sys.executable, str(ROOT / "launch.py"), "-m", *overrides]
    plan = quantsweep_command("plan", *overrides)
    rows = []

    def measure(what: str, argv: Sequence[str], expected: str) -> None:
        measured = run(argv, cwd=folder, env=env)
        if expected not in measured.output:
            raise RuntimeError(f"{what}: '{expected}' is not in\n{measured.output}")
        rows.append(_row(size, what, measured))

    measure("plan, nothing done", plan, f"{size:,}")
    measure("plan and submit", launch, "submitted")
    _cancel(plan, folder, env, cluster)
    sweep = SweepFolder(folder / "results" / "big")
    asked = read_asked(sweep.plan)
    half = size // 2
    write_done(sweep, asked[:half])
    measure("plan, half done", plan, f"{half:,}")
    measure("plan and submit the rest", launch, "submitted")
    _cancel(plan, folder, env, cluster)
    write_done(SweepFolder(folder / "results" / "rest"), asked[half:])
    for name in ("trials", "metrics"):
        for file in (folder / "results" / "rest" / name).iterdir():
            file.rename(sweep.table(name) / f"rest-{file.name}")
    measure("plan, all done", plan, "nothing left to run")
    measure("launch, all done", launch, "nothing left to run")
    measure("status", quantsweep_command("status", "big"), f"{size:,}")
    return rows, _breakdown(size, folder, env, overrides, cluster)


def _cancel(plan: Sequence[str], folder: Path, env: dict[str, str], cluster: Cluster) -> None:
    """Cancel the sweep, and wait until planning knows it: accounting tells what became of a job some seconds later."""
    run(quantsweep_command("cancel", "big"), cwd=folder, env=env)
    deadline = time.monotonic() + SETTLED_SECONDS
    while queued := cluster.run(["squeue", "--noheader", "--format=%i %j %T %r"]).stdout:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{SETTLED_SECONDS:.0f} s after cancel, the queue holds:\n{queued}")
        cluster.run(["scancel", "--user", "root"])
        time.sleep(2)
    while json.loads(run([*plan, "--json"], cwd=folder, env=env).output)["in_flight"]:
        if time.monotonic() > deadline:
            jobs = cluster.run(["sacct", "--allocations", "--format=JobID%12,JobName%30,State%24,Start,End"]).stdout
            said = run(quantsweep_command("status", "big"), cwd=folder, env=env).output
            raise RuntimeError(f"{SETTLED_SECONDS:.0f} s after cancel, trials are in flight:\n{said}{jobs}")
        time.sleep(2)


def _breakdown(size: int, folder: Path, env: dict[str, str], overrides: Sequence[str], cluster: Cluster) -> list[str]:
    report = folder / "report.json"
    again = [word for word in overrides if not word.startswith("sweep=")] + ["sweep=again"]
    code = (
        "import time; started = time.time(); import sys; from pathlib import Path; from tests.benchmarks.planning import timed_launch; "
        "timed_launch(Path(sys.argv[1]), started, sys.argv[2:])"
    )
    run([sys.executable, "-c", code, str(report), "-m", *again], cwd=folder, env=env)
    run(quantsweep_command("cancel", "again"), cwd=folder, env=env)
    cluster.cancel_all()
    said = json.loads(report.read_text())
    lines = [f"where the time goes, plan and submit {size:,} trials:"]
    lines += [f"  {seconds:8.2f} s  {label}" for label, seconds in sorted(said["seconds"].items(), key=lambda item: -item[1])]
    return [*lines, *(f"  not found: {name}" for name in said["missing"])]


def _row(size: int, what: str, measured: Measured) -> tuple[str, ...]:
    return (what, f"{size:,}", f"{measured.wall:.2f}", f"{measured.cpu:.2f}", f"{measured.peak_mb:.0f}")


def main() -> int:
    """Run everything and print it."""
    parser = output_parser(__doc__)
    parser.add_argument("--trials", type=int, nargs="*", choices=sorted(SIZES), default=sorted(SIZES))
    arguments = parser.parse_args()
    with work_folder() as folder, Cluster(root=folder) as cluster:
        shims = Shims(folder / "shims")
        parts = [benchmark(size, folder / str(size), cluster, shims) for size in arguments.trials]
    rows = [row for part, _ in parts for row in part]
    breakdowns = [line for _, lines in parts for line in lines]
    text = "\n".join([table(("command", "trials", "wall s", "CPU s", "peak MB"), rows), *breakdowns])
    say(text, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
