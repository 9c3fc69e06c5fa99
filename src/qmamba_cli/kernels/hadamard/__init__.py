"""Orthonormal Hadamard transform of the last axis, with optional quantization."""
