"""Pure functions on tensors: blocks, scales, nearest levels, order statistics, errors; no input or output."""
