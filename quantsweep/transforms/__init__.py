"""Exact rewritings of a model before it is quantized, one module each (`TRANSFORM`)."""
