"""Quantization methods, one module each (`METHOD`); look them up with `quantsweep.trial.registry.METHODS`."""
