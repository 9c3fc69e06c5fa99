"""The two backends as frozen tables of operators, and the one place where one is chosen."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qmamba_cli.errors import DeviceError, UsageError
from qmamba_cli.kernels.causal_conv1d import reference as conv_reference
from qmamba_cli.kernels.hadamard import reference as hadamard_reference
from qmamba_cli.kernels.linear import reference as linear_reference
from qmamba_cli.kernels.rms_norm import reference as norm_reference
from qmamba_cli.kernels.selective_scan import reference as scan_reference

BACKENDS = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Operators of one device; every backend offers the same signatures, defined by the references.

    Attributes:
        name: ``cpu`` or ``cuda``.
        device: where tensors live.
        rms_norm: `kernels.rms_norm.reference.rms_norm`.
        linear: `kernels.linear.reference.linear`.
        causal_conv1d: `kernels.causal_conv1d.reference.causal_conv1d`.
        selective_scan: `kernels.selective_scan.reference.selective_scan`.
        hadamard: `kernels.hadamard.reference.hadamard`.
    """

    name: str
    device: torch.device
    rms_norm: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    causal_conv1d: Callable[..., tuple[torch.Tensor, conv_reference.ConvState]]
    selective_scan: Callable[..., scan_reference.ScanResult]
    hadamard: Callable[..., torch.Tensor]


CPU = Backend(
    name="cpu",
    device=torch.device("cpu"),
    rms_norm=norm_reference.rms_norm,
    linear=linear_reference.linear,
    causal_conv1d=conv_reference.causal_conv1d,
    selective_scan=scan_reference.selective_scan,
    hadamard=hadamard_reference.hadamard,
)


def select_backend(name: str = "auto") -> Backend:
    """The backend called ``name``; ``auto`` takes the best one that can run here.

    Raises:
        UsageError: there is no backend of that name.
        DeviceError: the backend cannot run on this machine.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend `{name}`, expected one of {', '.join(BACKENDS)}")
    if name == "cuda":
        raise DeviceError(
            f"the `cuda` backend is not part of version {_version()}, got `--backend cuda`",
            hint="use `--backend cpu`, which runs every mode",
        )
    return CPU


def _version() -> str:
    from qmamba_cli import __version__

    return __version__
