"""One token of a quantized block for a few sequences: the whole block in three kernels."""
