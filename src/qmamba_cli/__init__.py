"""Calibrate, export and run quantized Mamba language models."""

__version__ = "0.1.0"
