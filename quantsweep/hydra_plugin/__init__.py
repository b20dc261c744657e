"""Hydra at work: its sweeper, its launcher, its flags, and what `launch.py` runs once Hydra has composed a configuration."""
