"""The range that scales are made from, one module each (`CLIPPING`)."""
