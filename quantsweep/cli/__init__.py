"""The `quantsweep` command: one module a subcommand."""
