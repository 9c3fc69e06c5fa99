"""What a stage will need, told before it starts: memory from the sizes, time from small trials."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter

import torch

from qmamba_cli.artifacts.checkpoint import Checkpoint
from qmamba_cli.config import MambaConfig
from qmamba_cli.kernels.backend import Backend
from qmamba_cli.kernels.hadamard.reference import hadamard
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.model.streaming import (
    group_windows,
    is_streamed,
    preparing_bytes,
    streamed_bytes,
    weight_bytes,
)
from qmamba_cli.quant.bins import N_BINS
from qmamba_cli.quant.weights import quantize_groups, quantize_rows
from qmamba_cli.sites import site_keys
from qmamba_cli.stages.spooled import is_spooled, spooled_bytes
from qmamba_cli.text import SELF_BATCH

_FLOAT = 4
# Work beside the products, in exponentials of a tensor of that shape: (b, l, d, n) in the scan, (b, l, d) in
# everything else and in the histograms. Fitted to the demo model on the CPU.
_SCAN_PASSES, _CHANNEL_PASSES = 2, 20
# Passes of the best recipe's streams through a block, and operations of a solution by the cube of its width.
_STREAMS, _SOLVING = 3, 4
_TRIAL_ELEMENTS = 1 << 22
_TRIAL_ROWS, _GROUP_ROWS = 512, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Sizes of a calibration, and a guess of its time.

    Attributes:
        config: sizes of the model.
        parameters: of the float model.
        stored_bytes: of its weight tensors, as the checkpoint stores them.
        weight_bytes: its weights in float32, as they are held; of a large model one block, with the residuals
            of a group of windows.
        activation_bytes: the largest tensors of one block and one batch, about.
        statistics_bytes: the histograms in memory.
        writing_bytes: what a large model holds while it writes its own text, before it is observed.
        disk_bytes: of the temporary file that it reads its blocks from meanwhile.
        batch: (windows, tokens) of a forward pass.
        seconds: of one process, from the number of operations and trials on this machine; a guess within a
            factor of about two.
    """

    config: MambaConfig
    parameters: int
    stored_bytes: int
    weight_bytes: int
    activation_bytes: int
    statistics_bytes: int
    writing_bytes: int
    disk_bytes: int
    batch: tuple[int, int]
    seconds: float

    @property
    def memory_bytes(self) -> int:
        """At the peak, beside the program itself."""
        # A model read block by block counts what is prepared among its weights.
        preparing = 0 if is_streamed(self.config) else preparing_bytes(self.config)
        observing = self.weight_bytes + max(self.activation_bytes + self.statistics_bytes, preparing)
        return max(observing, self.writing_bytes)

    @property
    def bits_per_weight(self) -> float:
        """Of the checkpoint as it is stored."""
        return 8 * self.stored_bytes / self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The text of a calibration, in numbers.

    Attributes:
        samples: windows that one process observes.
        seqlen: tokens a window.
        batch_size: windows a forward pass.
        written: windows that the model writes itself; each process writes all of them.
    """

    samples: int
    seqlen: int
    batch_size: int
    written: int = 0


def estimate_calibration(checkpoint: Checkpoint, backend: Backend, windows: Windows) -> Estimate:
    """Sizes and seconds of a calibration.

    Runs small trials on the device and on the host; of the model one small tensor is read.

    Args:
        checkpoint: the float checkpoint.
        backend: where it will run.
        windows: the text.
    """
    config = checkpoint.config
    tokens = windows.batch_size * windows.seqlen
    activations = tokens * (8 * config.d_inner + 3 * config.d_model) * _FLOAT
    # x and z before the split, u, dt, y and their transposes; the residual and its norm; states of chunks.
    chunks = 2 + windows.seqlen // 64
    activations += windows.batch_size * config.d_inner * config.d_state * _FLOAT * chunks
    spooled = windows.written > 0 and is_spooled(config, backend)
    return Estimate(
        config=config,
        parameters=sum(math.prod(shape) for shape in config.tensor_shapes().values()),
        stored_bytes=checkpoint.stored_bytes,
        weight_bytes=_held(config, windows),
        activation_bytes=activations,
        statistics_bytes=len(site_keys(config.n_layer)) * N_BINS * 8,
        writing_bytes=spooled_bytes(config, min(windows.written, SELF_BATCH)) if spooled else 0,
        disk_bytes=weight_bytes(config) if spooled else 0,
        batch=(windows.batch_size, windows.seqlen),
        seconds=_calibration_seconds(checkpoint, backend, windows, spooled=spooled),
    )


def export_seconds(checkpoint: Checkpoint, recipe: Recipe, fitted_tokens: int) -> float:
    """Seconds of quantizing a checkpoint on the CPU, a guess within a factor of about two.

    Args:
        checkpoint: the float checkpoint.
        recipe: formats of the weights.
        fitted_tokens: of the calibration's text that the best recipe runs again; 0 for the plain one.
    """
    trials = Trials(checkpoint.config, torch.device("cpu"))
    config = checkpoint.config
    projections = 3 * config.d_inner * config.d_model * config.n_layer
    others = sum(math.prod(shape) for shape in config.tensor_shapes().values()) - projections
    rate = trials.grouped(recipe.group_size) if recipe.w_bits == 4 else trials.rows
    reading = checkpoint.stored_bytes * (trials.read(checkpoint) + trials.hashed)
    fitting = _fitting(config, fitted_tokens, trials) if fitted_tokens else 0.0
    return reading + _rotating(config, trials) + projections * rate + others * trials.rows + fitting


def _fitting(config: MambaConfig, tokens: int, trials: "Trials") -> float:
    """Of the best recipe: both streams through a block, second moments of what it reads, a solution each."""
    inputs = (config.d_model, config.d_inner)
    moments = sum(2 * tokens * k * k for k in inputs) + sum(_SOLVING * k**3 for k in inputs)
    streams = _STREAMS * tokens * _seconds_a_token(config, trials)
    return streams + config.n_layer * moments * trials.product


def batch_seconds(config: MambaConfig, device: torch.device, tokens: int) -> float:
    """Seconds of a forward pass with the logits of every token, a guess within a factor of about two.

    Args:
        config: sizes of the model.
        device: where it runs.
        tokens: of the batch, all rows together.
    """
    trials = Trials(config, device)
    head = 2 * config.vocab_size * config.d_model
    return tokens * (_seconds_a_token(config, trials) + head * trials.product)


def _held(config: MambaConfig, windows: Windows) -> int:
    if not is_streamed(config):
        return weight_bytes(config)
    together = group_windows(config, windows.batch_size, windows.seqlen)
    return streamed_bytes(config, min(together, windows.samples), windows.seqlen)


def _calibration_seconds(
    checkpoint: Checkpoint, backend: Backend, windows: Windows, *, spooled: bool
) -> float:
    config = checkpoint.config
    trials = Trials(config, backend.device)
    token = _seconds_a_token(config, trials)
    preparing = checkpoint.stored_bytes * trials.read(checkpoint) + _rotating(config, trials)
    passes = 1
    if is_streamed(config) and (spooled or not windows.written):
        together = group_windows(config, windows.batch_size, windows.seqlen)
        passes = math.ceil(windows.samples / together) + spooled
    steps = math.ceil(windows.written / SELF_BATCH) * windows.seqlen if spooled else 0
    return (
        checkpoint.stored_bytes * trials.hashed
        + passes * preparing
        + (windows.samples + windows.written) * windows.seqlen * token
        + steps * weight_bytes(config) * trials.copied
    )


def _rotating(config: MambaConfig, trials: "Trials") -> float:
    """Of in_proj once, of out_proj on both sides, for every block."""
    return config.n_layer * 4 * config.d_inner * config.d_model * trials.rotated


def _seconds_a_token(config: MambaConfig, trials: "Trials") -> float:
    d, r, n = config.d_inner, config.dt_rank, config.d_state
    products = 2 * (2 * d * config.d_model + (r + 2 * n) * d + d * r + config.d_model * d)
    elements = _SCAN_PASSES * d * n + _CHANNEL_PASSES * d
    return config.n_layer * (products * trials.product + elements * trials.exponential)


class Trials:
    """Seconds that a machine takes for one unit of each kind of work, tried once when asked for.

    Args:
        config: sizes of the model, for the shapes that are tried.
        device: where forward passes run; what is prepared is prepared on the host.
    """

    def __init__(self, config: MambaConfig, device: torch.device) -> None:
        self._config = config
        self._device = device

    @cached_property
    def product(self) -> float:
        """One operation of a float32 matrix product, of which a multiplication with its addition has two."""
        left = torch.ones(_TRIAL_ROWS, self._config.d_model, device=self._device)
        right = torch.ones(self._config.d_model, 2 * self._config.d_inner, device=self._device)
        return self._fastest(lambda: left @ right) / (2 * left.numel() * right.shape[1])

    @cached_property
    def exponential(self) -> float:
        """One element of an exponential."""
        values = torch.zeros(_TRIAL_ELEMENTS, device=self._device)
        return self._fastest(values.exp) / _TRIAL_ELEMENTS

    @cached_property
    def rotated(self) -> float:
        """One element of a rotation in float64, from float32 and back."""
        rows = torch.ones(_TRIAL_ROWS, self._config.d_model)
        seconds = self._fastest(lambda: hadamard(rows.to(torch.float64)).to(torch.float32))
        return seconds / rows.numel()

    @cached_property
    def rows(self) -> float:
        """One element of a matrix with a scale a row."""
        matrix = torch.ones(_TRIAL_ROWS, self._config.d_model)
        return self._fastest(lambda: quantize_rows(matrix)) / matrix.numel()

    def grouped(self, group_size: int) -> float:
        """One element of a W4 matrix, whose multipliers are searched for."""
        matrix = torch.linspace(-1, 1, _GROUP_ROWS * self._config.d_model).view(_GROUP_ROWS, -1)
        return self._fastest(lambda: quantize_groups(matrix, group_size)) / matrix.numel()

    @cached_property
    def hashed(self) -> float:
        """One byte of a digest."""
        data = bytes(_TRIAL_ELEMENTS)
        return self._fastest(lambda: hashlib.sha256(data).digest()) / len(data)

    @cached_property
    def copied(self) -> float:
        """One byte that is read from memory of the system's into the program's."""
        source, target = torch.ones(_TRIAL_ELEMENTS), torch.ones(_TRIAL_ELEMENTS)
        return self._fastest(lambda: target.copy_(source)) / source.nbytes

    def read(self, checkpoint: Checkpoint) -> float:
        """One byte of a checkpoint, looked at for values that are not finite."""
        name = "backbone.layers.0.mixer.x_proj.weight"
        size = checkpoint.load(name).nbytes
        return self._fastest(lambda: checkpoint.load(name)) / size

    @torch.inference_mode()
    def _fastest(self, trial: Callable[[], object]) -> float:
        def once() -> float:
            started = perf_counter()
            trial()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return perf_counter() - started

        return max(min(once() for _ in range(4)), 1e-9)
