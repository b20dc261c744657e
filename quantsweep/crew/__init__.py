"""Workers side by side: on this machine, or in one Slurm job."""
