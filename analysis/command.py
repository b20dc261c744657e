"""What the commands of `python -m analysis` share: a sweep is given by its name or by its folder, and tables are printed whole."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import quantsweep
from quantsweep.errors import ResultsError
from quantsweep.words import count

RESULTS = Path("results")


def sweep_folder(text: str) -> Path:
    """A sweep's folder: `results/<text>` where that is one, else `text` itself."""
    named = RESULTS / text
    return named if (named / "plan").is_dir() and not (Path(text) / "plan").is_dir() else Path(text)


def in_full(table: pd.DataFrame) -> str:
    """A table as text, in lines as wide as the terminal."""
    return table.to_string(line_width=shutil.get_terminal_size((120, 24)).columns)


def results_of(folders: Sequence[Path]) -> pd.DataFrame:
    """`quantsweep.load_results` of these sweeps; raises ResultsError where there are none yet, with the number of trials that failed."""
    results = quantsweep.load_results(folders)
    if not results.empty:
        return results
    failed = sum(int((quantsweep.load_trials(folder)["status"] == "failed").sum()) for folder in folders)
    names = [folder.name if folder == RESULTS / folder.name else str(folder) for folder in folders]
    why = f"{count(failed, 'trial')} failed" if failed else "no trial is done"
    raise ResultsError(f"no results in {', '.join(names)}: {why}. Why: quantsweep status {names[0]}")
