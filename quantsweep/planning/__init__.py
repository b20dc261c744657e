"""From the axes of a grid to a plan file: expansion, merging, sharding."""
