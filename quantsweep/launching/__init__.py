"""Shards on a Slurm cluster: submitted within limits and budget, followed, and settled when their jobs have ended."""
