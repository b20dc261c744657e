"""Number formats, one module each (`DATA_TYPE`); look them up with `quantsweep.registry.DATA_TYPES`."""
