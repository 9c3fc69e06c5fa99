"""Root-mean-square normalization, with optional quantization."""
