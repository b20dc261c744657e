"""Getting shards to run: on this machine, or on a Slurm cluster."""
