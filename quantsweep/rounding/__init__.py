"""How weights become codes, one module each (`ROUNDING`); look them up with `quantsweep.trial.registry.ROUNDINGS`."""
