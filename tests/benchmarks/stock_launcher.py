"""What submission costs: the stock `hydra/launcher=submitit_slurm` against ours, in one run on one real cluster.

    python -m tests.benchmarks.stock_launcher --output benchmark.txt        some 8 minutes on two idle cores, as root

The stock launcher runs n jobs of an app that does nothing; ours runs n real trials (the smallest
model, one document).  Both run to their end, so that the files that they leave are complete.  The
stock launcher blocks until the last job ends: its cost is therefore given twice, until `sbatch`
answered and in total.  Then ours alone submits 35,112 trials, and cancels them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq

import quantsweep
from tests.benchmarks.measure import JOBS, LAUNCHER, ROOT, Measured, Shims, num_files, output_parser, run, say, table, work_folder
from tests.slurm.cluster import Cluster

APP = """\
import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=None)
def main(cfg: DictConfig) -> None:
    pass


main()
"""
STOCK = (
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.partition=main",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1",
    "hydra.launcher.timeout_min=20",
    "hydra.launcher.array_parallelism=4",
)
"""Few at a time: two cores start some three Python processes a second."""
OURS = ("cluster=slurm", "cluster.partition=main", "task=mini_ppl", "limit=1", "results_dir=results")
MANY = ("model=glob(mini-*)", "data_type=int,fp,quantile,dynamic", "bit_width=range(3,9)", "block_size=range(16,3360,16)")
"""7 models × 4 data types × 6 bit widths × 209 block sizes = 35,112 trials."""
MINUTES_TO_END = 15.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What launching n trials came to; `submitted_*`: until the last sbatch answered; has_ended: they were run, not cancelled."""

    launcher: str
    trials: int
    submitted_wall: float
    submitted_cpu: float
    whole: Measured
    files: int
    calls: str
    calls_of_jobs: str
    has_ended: bool = True

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        return (
            self.launcher,
            f"{self.trials:,}",
            f"{self.submitted_wall:.1f}",
            f"{self.whole.wall:.1f}",
            f"{self.submitted_cpu:.1f}",
            f"{self.whole.cpu:.1f}",
            f"{self.whole.cpu / self.trials * 1000:.2f}",
            f"{self.whole.peak_mb:.0f}",
            f"{self.files:,}",
            f"{self.files / self.trials:.4f}",
            self.calls,
            self.calls_of_jobs,
        )


HEADER = (
    "launcher",
    "trials",
    "submitted s",
    "returned s",
    "CPU s to submit",
    "CPU s",
    "CPU ms/trial",
    "peak MB",
    "files",
    "files/trial",
    "calls",
    "calls of jobs",
)


def stock(n: int, folder: Path, cluster: Cluster, shims: Shims) -> Cost:
    """n jobs that do nothing, by the stock launcher."""
    folder.mkdir()
    app = folder / "app.py"
    app.write_text(APP)
    shims.reset()
    whole = run([sys.executable, "app.py", "-m", *STOCK, f"+x=range(0,{n})"], cwd=folder, env=shims.environment(cluster))
    app.unlink()
    return _cost("stock submitit_slurm", n, whole, folder, shims)


def ours(n: int, folder: Path, cluster: Cluster, shims: Shims) -> Cost:
    """n trials by ours, on to the end of the last one; raises RuntimeError unless all of them are done."""
    folder.mkdir()
    grid = ("model=mini-neox-0.3m", "data_type=int", "bit_width=4,8", f"block_size=range(16,{16 + 16 * (n // 2)},16)")
    shims.reset()
    whole = _launch((*grid, "sweep=few"), folder, cluster, shims)
    submitted = _cost("quantsweep", n, whole, folder, shims)
    cluster.wait_until(lambda: not cluster.run(["squeue", "--noheader"]).stdout, "the end of our trials", timeout=MINUTES_TO_END * 60)
    done = int((quantsweep.load_trials(folder / "results" / "few").status == "done").sum())
    if done != n:
        raise RuntimeError(f"{done} of {n} trials are done")
    after = _cost("quantsweep", n, whole, folder, shims)
    return replace(submitted, files=after.files, calls_of_jobs=after.calls_of_jobs)


def ours_many(folder: Path, cluster: Cluster, shims: Shims) -> Cost:
    """35,112 trials by ours, cancelled as soon as they are submitted."""
    folder.mkdir()
    shims.reset()
    whole = _launch((*MANY, "sweep=many"), folder, cluster, shims)
    cost = replace(_cost("quantsweep", _planned(folder / "results" / "many"), whole, folder, shims), has_ended=False)
    _quantsweep("cancel", "many", folder=folder, cluster=cluster, shims=shims)
    cluster.cancel_all()
    return cost


def _launch(arguments: Sequence[str], folder: Path, cluster: Cluster, shims: Shims) -> Measured:
    return run([sys.executable, str(ROOT / "launch.py"), "-m", *OURS, *arguments], cwd=folder, env=shims.environment(cluster))


def _quantsweep(*arguments: str, folder: Path, cluster: Cluster, shims: Shims) -> Measured:
    code = "import sys; from quantsweep.cli.main import main; sys.exit(main())"
    return run([sys.executable, "-c", code, *arguments], cwd=folder, env=shims.environment(cluster))


def _planned(sweep: Path) -> int:
    """Distinct trials that have a shard, as the plan files say."""
    ids: set[str] = set()
    for path in (sweep / "plan").glob("plan-*.parquet"):
        rows = pq.read_table(path, columns=["trial_id", "shard_id"], filters=[("shard_id", ">=", 0)])
        ids.update(rows.column("trial_id").to_pylist())
    return len(ids)


def _cost(launcher: str, trials: int, whole: Measured, folder: Path, shims: Shims) -> Cost:
    last = [call for call in shims.calls() if call.program == "sbatch"][-1]
    return Cost(
        launcher=launcher,
        trials=trials,
        submitted_wall=last.time - whole.started,
        submitted_cpu=last.caller_cpu,
        whole=whole,
        files=num_files(folder),
        calls=_listed(shims, LAUNCHER),
        calls_of_jobs=_listed(shims, JOBS),
    )


def _listed(shims: Shims, by: str) -> str:
    return " ".join(f"{program} {count}" for program, count in sorted(shims.counts(by).items())) or "none"


def ratios(costs: Sequence[Cost]) -> list[str]:
    """Stock over ours, at equal n, and against ours at scale."""
    pairs = [(s, o) for s in costs for o in costs if s.launcher != o.launcher == "quantsweep" and (o.trials == s.trials or not o.has_ended)]
    return [_ratio(s, o) for s, o in pairs] + [
        "Files of trials that were cancelled are those of planning and submission: no ratio is given."
    ]


def _ratio(stock_cost: Cost, our_cost: Cost) -> str:
    ours_each = our_cost.whole.cpu / our_cost.trials
    text = f"stock at {stock_cost.trials:,} against ours at {our_cost.trials:,}: "
    text += f"{stock_cost.whole.cpu / stock_cost.trials / ours_each:,.1f} × the CPU a trial "
    text += f"({stock_cost.submitted_cpu / stock_cost.trials / ours_each:,.1f} × until submitted)"
    if our_cost.has_ended:
        text += f", {stock_cost.files / stock_cost.trials / (our_cost.files / our_cost.trials):,.1f} × the files a trial"
    return text


def main() -> int:
    """Run everything and print one table."""
    parser = output_parser(__doc__)
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 400], help="even numbers")
    parser.add_argument("--skip-many", action="store_true", help="leave out the 35,112 trials")
    arguments = parser.parse_args()
    with work_folder() as folder, Cluster(root=folder) as cluster:
        shims = Shims(folder / "shims")
        costs: list[Cost] = []
        if not arguments.skip_many:
            costs.append(ours_many(folder / "many", cluster, shims))
        for n in arguments.trials:
            costs.append(ours(n, folder / f"ours-{n}", cluster, shims))
            costs.append(stock(n, folder / f"stock-{n}", cluster, shims))
    costs.sort(key=lambda cost: (cost.launcher, cost.trials))
    text = "\n".join([table(HEADER, [cost.cells() for cost in costs]), *ratios(costs)])
    say(text, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
