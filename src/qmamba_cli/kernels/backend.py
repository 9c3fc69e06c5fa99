"""The two backends as frozen tables of operators, and the one place where one is chosen."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from qmamba_cli.errors import DeviceError, UsageError
from qmamba_cli.kernels.argmax import reference as argmax_reference
from qmamba_cli.kernels.causal_conv1d import reference as conv_reference
from qmamba_cli.kernels.embedding import reference as embedding_reference
from qmamba_cli.kernels.hadamard import reference as hadamard_reference
from qmamba_cli.kernels.linear import reference as linear_reference
from qmamba_cli.kernels.quantize import reference as quantize_reference
from qmamba_cli.kernels.rms_norm import reference as norm_reference
from qmamba_cli.kernels.selective_scan import reference as scan_reference
from qmamba_cli.quant.grid import Scale

BACKENDS = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Operators of one device; every backend offers the same signatures, defined by the references.

    Attributes:
        name: ``cpu`` or ``cuda``.
        device: where tensors live.
        quantize: `kernels.quantize.reference.quantize`.
        dequantize: `quant.grid.dequantize`.
        quantize_per_token: `kernels.quantize.reference.quantize_per_token`.
        rms_norm: `kernels.rms_norm.reference.rms_norm`.
        linear: `kernels.linear.reference.linear`.
        linear_split: `kernels.linear.reference.linear_split`.
        embedding: `kernels.embedding.reference.embedding`.
        unrotate: `kernels.embedding.reference.unrotate`.
        causal_conv1d: `kernels.causal_conv1d.reference.causal_conv1d`.
        causal_conv1d_both: `kernels.causal_conv1d.reference.causal_conv1d_both`.
        selective_scan: `kernels.selective_scan.reference.selective_scan`.
        hadamard: `kernels.hadamard.reference.hadamard`.
        argmax: `kernels.argmax.reference.argmax`.
    """

    name: str
    device: torch.device
    quantize: Callable[[torch.Tensor, Scale], torch.Tensor]
    dequantize: Callable[[torch.Tensor, Scale], torch.Tensor]
    quantize_per_token: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    rms_norm: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    linear_split: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    embedding: Callable[..., torch.Tensor]
    unrotate: Callable[..., torch.Tensor]
    causal_conv1d: Callable[..., tuple[torch.Tensor, conv_reference.ConvState]]
    causal_conv1d_both: Callable[..., tuple[torch.Tensor, torch.Tensor, conv_reference.ConvState]]
    selective_scan: Callable[..., scan_reference.ScanResult]
    hadamard: Callable[..., torch.Tensor]
    argmax: Callable[[torch.Tensor], torch.Tensor]


CPU = Backend(
    name="cpu",
    device=torch.device("cpu"),
    quantize=quantize_reference.quantize,
    dequantize=quantize_reference.dequantize,
    quantize_per_token=quantize_reference.quantize_per_token,
    rms_norm=norm_reference.rms_norm,
    linear=linear_reference.linear,
    linear_split=linear_reference.linear_split,
    embedding=embedding_reference.embedding,
    unrotate=embedding_reference.unrotate,
    causal_conv1d=conv_reference.causal_conv1d,
    causal_conv1d_both=conv_reference.causal_conv1d_both,
    selective_scan=scan_reference.selective_scan,
    hadamard=hadamard_reference.hadamard,
    argmax=argmax_reference.argmax,
)


def select_backend(name: str = "auto") -> Backend:
    """The backend called ``name``; ``auto`` takes the GPU where kernels can run, else the CPU.

    Raises:
        UsageError: there is no backend of that name.
        DeviceError: the backend cannot run on this machine.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend `{name}`, expected one of {', '.join(BACKENDS)}")
    if name == "cpu":
        return CPU
    try:
        return _cuda()
    except DeviceError:
        if name == "auto":
            return CPU
        raise


@cache
def _cuda() -> Backend:
    from qmamba_cli.kernels import _launch

    _launch.require_device()
    from qmamba_cli.kernels.argmax import cuda as argmax
    from qmamba_cli.kernels.causal_conv1d import cuda as conv
    from qmamba_cli.kernels.embedding import cuda as embedding
    from qmamba_cli.kernels.hadamard import cuda as hadamard
    from qmamba_cli.kernels.linear import cuda as linear
    from qmamba_cli.kernels.quantize import cuda as quantize
    from qmamba_cli.kernels.rms_norm import cuda as norm
    from qmamba_cli.kernels.selective_scan import cuda as scan

    return Backend(
        name="cuda",
        device=torch.device("cuda", torch.cuda.current_device()),
        quantize=quantize.quantize,
        dequantize=quantize.dequantize,
        quantize_per_token=quantize.quantize_per_token,
        rms_norm=norm.rms_norm,
        linear=linear.linear,
        linear_split=linear.linear_split,
        embedding=embedding.embedding,
        unrotate=embedding.unrotate,
        causal_conv1d=conv.causal_conv1d,
        causal_conv1d_both=conv.causal_conv1d_both,
        selective_scan=scan.selective_scan,
        hadamard=hadamard.hadamard,
        argmax=argmax.argmax,
    )
