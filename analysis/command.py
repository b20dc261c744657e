"""What the commands of `python -m analysis` share: a sweep is given by its name or by its folder, and tables are printed whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd

RESULTS = Path("results")


def sweep_folder(text: str) -> Path:
    """A sweep's folder: `results/<text>` where that is one, else `text` itself."""
    named = RESULTS / text
    return named if (named / "plan").is_dir() and not (Path(text) / "plan").is_dir() else Path(text)


def in_full(table: pd.DataFrame) -> str:
    """A table as text, in lines as wide as the terminal."""
    return table.to_string(line_width=shutil.get_terminal_size((120, 24)).columns)
