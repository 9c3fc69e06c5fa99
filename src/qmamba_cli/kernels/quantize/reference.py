"""The int8 grid of `quant.grid`, under the name that kernels are judged against."""

from qmamba_cli.quant.grid import dequantize, quantize, quantize_per_token

__all__ = ["dequantize", "quantize", "quantize_per_token"]
