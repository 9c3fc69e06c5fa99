"""Operators of the Mamba block: one folder an operator, the reference beside the kernel."""
