"""What a calibration will need, told before it starts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from qmamba_cli.artifacts.checkpoint import Checkpoint
from qmamba_cli.config import MambaConfig
from qmamba_cli.kernels.backend import Backend
from qmamba_cli.model.streaming import group_windows, is_streamed, streamed_bytes, weight_bytes
from qmamba_cli.quant.bins import N_BINS
from qmamba_cli.sites import site_keys

_FLOAT = 4
# Work beside the products, in exponentials of a tensor of that shape: (b, l, d, n) in the scan, (b, l, d) in
# everything else and in the histograms. Fitted to the demo model on the CPU.
_SCAN_PASSES, _CHANNEL_PASSES = 2, 20
_TRIAL_ELEMENTS = 1 << 22
_TRIAL_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Sizes of a calibration, and a guess of its time.

    Attributes:
        parameters: of the float model.
        weight_bytes: its weights in float32, as they are held; of a large model one block, with the residuals
            of a group of windows.
        activation_bytes: the largest tensors of one block and one batch, about.
        statistics_bytes: the histograms in memory.
        batch: (windows, tokens) of a forward pass.
        seconds: forward passes of one process, from the number of operations and a trial of this machine; a
            guess within a factor of about two.
    """

    parameters: int
    weight_bytes: int
    activation_bytes: int
    statistics_bytes: int
    batch: tuple[int, int]
    seconds: float

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.activation_bytes + self.statistics_bytes

    def of(self, samples: int, processes: int) -> "Estimate":
        """This estimate of one sample, for ``samples`` of them on ``processes`` processes."""
        return replace(self, seconds=self.seconds * math.ceil(samples / processes))


def estimate_calibration(checkpoint: Checkpoint, backend: Backend, batch_size: int, seqlen: int) -> Estimate:
    """Sizes of a calibration, with the seconds of one sample.

    Runs two small trials on the device, a matrix product and an exponential; no part of the model is loaded.

    Args:
        checkpoint: the float checkpoint.
        backend: where it will run.
        batch_size: windows a forward pass.
        seqlen: tokens a window.
    """
    config = checkpoint.config
    parameters = sum(math.prod(shape) for shape in config.tensor_shapes().values())
    tokens = batch_size * seqlen
    # x and z before the split, u, dt, y and their transposes; the residual and its norm.
    activations = tokens * (8 * config.d_inner + 3 * config.d_model) * _FLOAT
    activations += batch_size * config.d_inner * config.d_state * _FLOAT * (2 + seqlen // 64)
    return Estimate(
        parameters=parameters,
        weight_bytes=_held(config, batch_size, seqlen),
        activation_bytes=activations,
        statistics_bytes=len(site_keys(config.n_layer)) * N_BINS * 8,
        batch=(batch_size, seqlen),
        seconds=_seconds_a_token(config, backend) * seqlen,
    )


def _held(config: MambaConfig, batch_size: int, seqlen: int) -> int:
    if not is_streamed(config):
        return weight_bytes(config)
    return streamed_bytes(config, group_windows(config, batch_size, seqlen), seqlen)


def _seconds_a_token(config: MambaConfig, backend: Backend) -> float:
    d, r, n = config.d_inner, config.dt_rank, config.d_state
    products = 2 * (2 * d * config.d_model + (r + 2 * n) * d + d * r + config.d_model * d)
    elements = _SCAN_PASSES * d * n + _CHANNEL_PASSES * d
    product_rate, element_rate = _rates(config, backend.device)
    return config.n_layer * (products / product_rate + elements / element_rate)


@torch.inference_mode()
def _rates(config: MambaConfig, device: torch.device) -> tuple[float, float]:
    """Operations a second of a float32 matrix product, and elements a second of an exponential."""
    left = torch.ones(_TRIAL_ROWS, config.d_model, device=device)
    right = torch.ones(config.d_model, 2 * config.d_inner, device=device)
    values = torch.zeros(_TRIAL_ELEMENTS, device=device)
    product = _fastest(lambda: left @ right, device)
    exponential = _fastest(lambda: values.exp(), device)
    return 2 * left.numel() * right.shape[1] / product, _TRIAL_ELEMENTS / exponential


def _fastest(trial: Callable[[], torch.Tensor], device: torch.device) -> float:
    def once() -> float:
        started = perf_counter()
        trial()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - started

    return max(min(once() for _ in range(4)), 1e-9)
