"""Observing the float model one block at a time, for models larger than the memory.

A forward pass goes batch by batch and reads every block for each; here a group of batches goes through one
block before the next one is read. Every tensor is computed from the same inputs by the same calls, so each
batch has the bits of a plain forward pass, and a site sees its batches in the same order. What is in memory:

    table       vocab · d_model · 4            rotated embedding, 515 MB at 2.8b
    residuals   windows · l · d_model · 4      of one group, at most `GROUP_BYTES`
    block       4 · parameters of a block      165 MB at 2.8b, and its rotation in float64 while it is read
    activations of one batch

A group of 2.8b holds 200 windows of 512 tokens in batches of 8: 512 of them read the weights three times.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch

from qmamba_cli import sites
from qmamba_cli.config import MambaConfig
from qmamba_cli.kernels.backend import Backend
from qmamba_cli.model.block import Hook, block_forward
from qmamba_cli.model.mamba import Mamba, ModelHook
from qmamba_cli.model.prepare import Load, float_block, rotate_inputs
from qmamba_cli.model.weights import on_device
from qmamba_cli.modes import MODES

# Residuals of a group of windows, at most; one batch is always taken.
GROUP_BYTES = 1 << 30
# A model with more float32 weights than this is read block by block.
STREAM_ABOVE_BYTES = 1 << 32
_FLOAT = 4
# As in `prepare.rotate_inputs`.
_ROTATED_ROWS = 8192
# Called with the windows times blocks that were done; whether to go on.
Tick: TypeAlias = Callable[[int], bool]


class Observable(Protocol):
    """A float model whose sites can be watched on groups of batches.

    Attributes:
        ticks: units of work of one window.
    """

    ticks: int

    def windows_together(self, batch_size: int, seqlen: int) -> int:
        """Windows of a group, a multiple of ``batch_size``: what is observed between two saves."""
        ...

    def observe(self, batches: Sequence[torch.Tensor], hook: ModelHook, tick: Tick) -> bool:
        """Show every tensor of a group of batches to ``hook``.

        Args:
            batches: (b, l) int64 token ids each, from the start of a sequence.
            hook: sees each site's batches in their order.
            tick: told of the work, as often as there is some.

        Returns:
            Whether the group was done to its end; else ``hook`` has seen a part of it.
        """
        ...


class ResidentMamba:
    """A float model that is in memory as a whole; its groups are single batches.

    Args:
        model: in the float mode.
    """

    def __init__(self, model: Mamba) -> None:
        self._model = model
        self.ticks = 1

    def windows_together(self, batch_size: int, seqlen: int) -> int:  # noqa: ARG002 (the protocol's signature)
        """One batch."""
        return batch_size

    def observe(self, batches: Sequence[torch.Tensor], hook: ModelHook, tick: Tick) -> bool:
        """Forward passes; a batch that was begun is ended."""
        for number, batch in enumerate(batches, start=1):
            self._model.forward(batch, hook=hook)
            going = tick(len(batch) * self.ticks)
            if not going and number < len(batches):
                return False
        return True


class StreamedMamba:
    """A rotated float model of which one block is in memory at a time.

    Args:
        config: sizes.
        load: reads a checkpoint tensor by name.
        backend: the operators.
        group_bytes: bound of the residuals of a group.
    """

    def __init__(
        self, config: MambaConfig, load: Load, backend: Backend, *, group_bytes: int = GROUP_BYTES
    ) -> None:
        self.ticks = config.n_layer
        self._config = config
        self._load = load
        self._backend = backend
        self._group_bytes = group_bytes
        self._table: torch.Tensor | None = None

    def windows_together(self, batch_size: int, seqlen: int) -> int:
        """As many as `group_bytes` holds the residuals of, at least one batch."""
        return group_windows(self._config, batch_size, seqlen, self._group_bytes)

    @torch.inference_mode()
    def observe(self, batches: Sequence[torch.Tensor], hook: ModelHook, tick: Tick) -> bool:
        """Every batch through one block, then through the next."""
        config, backend = self._config, self._backend
        table = self._embedding()
        residuals = [backend.embedding(batch.to(backend.device), table, None) for batch in batches]
        for layer in range(config.n_layer):
            weights = on_device(float_block(config, self._load, layer), backend.device)
            for index, residual in enumerate(residuals):
                # The old residual goes as soon as the new one is there.
                residuals[index], _ = block_forward(
                    weights,
                    MODES["fp"],
                    backend,
                    residual,
                    None,
                    norm_eps=config.norm_eps,
                    hook=_at_layer(hook, layer),
                )
                if not tick(len(residual)):
                    return False
            # Before the next block is read, so that there are never two.
            del weights
        for residual in residuals:
            hidden = backend.rms_norm(residual, None, eps=config.norm_eps)
            hook(sites.site_key(sites.LM_HEAD_INPUT, None), hidden)
        return True

    def _embedding(self) -> torch.Tensor:
        if self._table is None:
            table = rotate_inputs(self._load("backbone.embeddings.weight"))
            self._table = table.to(self._backend.device)
        return self._table


def _at_layer(hook: ModelHook, layer: int) -> Hook:
    def observe(site: str, tensor: torch.Tensor) -> None:
        hook(sites.site_key(site, layer), tensor)

    return observe


def group_windows(config: MambaConfig, batch_size: int, seqlen: int, group_bytes: int = GROUP_BYTES) -> int:
    """Windows that go through a block together: whole batches, at least one, their residuals bounded."""
    return batch_size * max(1, group_bytes // (batch_size * seqlen * config.d_model * _FLOAT))


def is_streamed(config: MambaConfig) -> bool:
    """Whether a model is large enough to be read block by block."""
    return weight_bytes(config) > STREAM_ABOVE_BYTES


def weight_bytes(config: MambaConfig) -> int:
    """Bytes of the rotated float model as a whole; its tied head is a table of its own."""
    parameters = sum(math.prod(shape) for shape in config.tensor_shapes().values())
    head = config.vocab_size * config.d_model if config.tie_embeddings else 0
    return (parameters + head) * _FLOAT


def block_bytes(config: MambaConfig) -> int:
    """Bytes of a block in float32."""
    shapes = config.tensor_shapes().items()
    return _FLOAT * sum(math.prod(shape) for name, shape in shapes if name.startswith("backbone.layers.0."))


def preparing_bytes(config: MambaConfig) -> int:
    """Bytes that a table being rotated takes beside a model in memory: as it is stored, and in float64."""
    # Some rows at a time, of which there are about four copies.
    rows = 4 * 8 * config.d_model * min(config.vocab_size, _ROTATED_ROWS)
    return config.vocab_size * config.d_model * _FLOAT + rows


def streamed_bytes(config: MambaConfig, windows: int, seqlen: int) -> int:
    """Bytes of the weights and residuals that `StreamedMamba` holds, at its peak.

    Args:
        config: sizes.
        windows: of a group.
        seqlen: tokens a window.
    """
    table = config.vocab_size * config.d_model * _FLOAT
    residuals = windows * seqlen * config.d_model * _FLOAT
    # What is rotated is there as it is stored and, some rows at a time, about four times in float64.
    rows = 4 * 8 * config.d_model
    reading_table = table + rows * min(config.vocab_size, _ROTATED_ROWS)
    largest = 2 * config.d_inner * config.d_model * _FLOAT
    reading_block = residuals + block_bytes(config) + largest + rows * min(2 * config.d_inner, _ROTATED_ROWS)
    return table + max(reading_table, reading_block)
