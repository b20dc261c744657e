"""Number formats, one module each (`DATA_TYPE`); look them up with `quantsweep.trial.registry.DATA_TYPES`."""
