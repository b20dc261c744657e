"""Launch one trial, a grid, or a study.

    python launch.py model=mini-neox-6.0m data_type=fp bit_width=4 block_size=64    one trial, here and now
    python launch.py -m model=mini-neox-6.0m bit_width=3,4,8                        a grid, on this machine
    python launch.py -m +sweeps=quickstart cluster=mycluster                        a study, on Slurm; again: resumes

`python launch.py --help` lists what can be chosen; `quantsweep plan …` shows what would run.
"""

from __future__ import annotations

import sys
from typing import Any

import hydra
from omegaconf import DictConfig

from quantsweep.hydra_plugin.task import checked_arguments, run
from quantsweep.program import as_program


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> Any:
    """Hydra's task function: a shard of a plan, or one trial."""
    return run(cfg)


if __name__ == "__main__":
    with as_program():
        sys.argv[1:] = checked_arguments(sys.argv[1:])
        main()
