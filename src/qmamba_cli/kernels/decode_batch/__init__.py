"""One token of a quantized block for many sequences: the whole block in six kernels."""
