"""Depthwise causal convolution fused with SiLU."""
