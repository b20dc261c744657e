"""The text that calibrated steps look at, and what enters a model's layers while it is read."""
