"""How activations are quantized: one file a step, each a module of plain tensor operations that is hung on a site."""
