"""A float model whose blocks wait on disk, for text that it writes itself.

Each token needs every block, so a model larger than the memory reads all of them for each. They are rotated
once, put aside in a nameless file of the size of the weights, and read back one after another, into the same
memory each time. A block has the bits that it has in a model in memory, so the text is the same.
"""

import ctypes
import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, overload

import torch

from qmamba_cli.artifacts.checkpoint import Checkpoint
from qmamba_cli.artifacts.files import writing
from qmamba_cli.config import MambaConfig
from qmamba_cli.kernels.backend import Backend
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import Load, float_block, float_ends
from qmamba_cli.model.streaming import block_bytes, is_streamed, preparing_bytes
from qmamba_cli.model.weights import BlockWeights, LinearWeights, ModelWeights, map_tensors, on_device
from qmamba_cli.modes import MODES

# Tensors begin at multiples of this, as torch's own do: a product may depend on it in its last bit.
_ALIGNED_BYTES = 64
_FLOAT = 4


def float_model_on(checkpoint: Checkpoint, backend: Backend) -> Mamba:
    """The rotated float model, in memory where it runs; on a GPU the host holds one block at a time."""
    config, load = checkpoint.config, checkpoint.load
    layers = range(config.n_layer)
    blocks = tuple(on_device(float_block(config, load, layer), backend.device) for layer in layers)
    return _with_ends(checkpoint, blocks, backend)


def is_spooled(config: MambaConfig, backend: Backend) -> bool:
    """Whether a model writes text from disk: a large one on a CPU. A GPU has memory of its own."""
    return backend.device.type == "cpu" and is_streamed(config)


def spooled_bytes(config: MambaConfig, sequences: int) -> int:
    """Bytes that `spooled_model` holds at its peak, with the states of the sequences that it writes together.

    Args:
        config: sizes.
        sequences: written together.
    """
    table = config.vocab_size * config.d_model * _FLOAT
    state = config.n_layer * config.d_inner * (config.d_state + config.d_conv - 1) * _FLOAT
    # Of the logits there are about three copies.
    writing = sequences * (state + 3 * config.vocab_size * _FLOAT)
    return 2 * table + block_bytes(config) + max(preparing_bytes(config), writing)


def text_writer(checkpoint: Checkpoint, backend: Backend, folder: Path) -> AbstractContextManager[Mamba]:
    """Brings the float model as it writes text: in memory, or as `spooled_model`.

    Args:
        checkpoint: the float checkpoint.
        backend: the operators.
        folder: where blocks are put, if they are.
    """
    if is_spooled(checkpoint.config, backend):
        return spooled_model(checkpoint, backend, folder)
    return nullcontext(float_model_on(checkpoint, backend))


@contextmanager
def spooled_model(checkpoint: Checkpoint, backend: Backend, folder: Path) -> Iterator[Mamba]:
    """The rotated float model on the CPU with its blocks on disk; the file goes with the block.

    Args:
        checkpoint: the float checkpoint.
        backend: the operators, on the CPU.
        folder: where the file is put; made where it is missing.

    Raises:
        QmambaError: the disk refuses.
    """
    with writing(folder, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix=".qmamba-blocks-") as file:
            blocks = SpooledBlocks(checkpoint.config, checkpoint.load, file)
            yield _with_ends(checkpoint, blocks, backend)


def give_memory_back() -> None:
    """Hand freed memory back to the system, where the C library can.

    States of tens of megabytes come from its heap, which keeps what is freed; what is observed next has
    larger tensors, which find no room there and would come on top.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _with_ends(checkpoint: Checkpoint, blocks: Sequence[BlockWeights], backend: Backend) -> Mamba:
    # After the blocks, so that rotating one and holding the tables do not add up.
    embedding, norm_f, head = float_ends(checkpoint.config, checkpoint.load)
    weights = ModelWeights(
        config=checkpoint.config,
        embedding=embedding,
        blocks=blocks,
        norm_f=norm_f,
        lm_head=LinearWeights(head),
    )
    return Mamba(weights, MODES["fp"], backend)


class SpooledBlocks(Sequence[BlockWeights]):
    """Rotated float32 blocks in a file; one that was asked for is valid until the next one is.

    Args:
        config: sizes.
        load: reads a checkpoint tensor by name.
        file: empty, open for writing and reading.
    """

    def __init__(self, config: MambaConfig, load: Load, file: IO[bytes]) -> None:
        self._file = file
        self._count = config.n_layer
        # A block without its data, of which each has as much.
        self._form = map_tensors(float_block(config, load, 0), lambda tensor: tensor.to("meta"))
        self._spans, floats = _spans(self._form)
        self._floats = torch.zeros(floats)
        self._bytes = self._floats.view(torch.uint8).numpy().data
        for layer in range(config.n_layer):
            self._put(float_block(config, load, layer))
        file.flush()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> BlockWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[BlockWeights]: ...
    def __getitem__(self, index: int | slice) -> BlockWeights | Sequence[BlockWeights]:
        """One block, in memory that the next one takes over."""
        if isinstance(index, slice):
            raise TypeError("blocks on disk are asked for one at a time")
        if not 0 <= index < self._count:
            raise IndexError(index)
        self._file.seek(index * len(self._bytes))
        if self._file.readinto(self._bytes) != len(self._bytes):  # type: ignore[attr-defined]
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._filled()

    def _put(self, block: BlockWeights) -> None:
        spans = iter(self._spans)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            begin, end = next(spans)
            self._floats[begin:end] = tensor.reshape(-1)
            return tensor

        map_tensors(block, place)
        self._file.write(self._bytes)

    def _filled(self) -> BlockWeights:
        spans = iter(self._spans)

        def view(tensor: torch.Tensor) -> torch.Tensor:
            begin, end = next(spans)
            return self._floats[begin:end].view(tensor.shape)

        return map_tensors(self._form, view)


def _spans(block: BlockWeights) -> tuple[list[tuple[int, int]], int]:
    """Where each tensor of a block lies, in floats, and how many there are in all."""
    step = _ALIGNED_BYTES // _FLOAT
    spans: list[tuple[int, int]] = []

    def add(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        begin = -(-spans[-1][1] // step) * step if spans else 0
        spans.append((begin, begin + tensor.numel()))
        return tensor

    map_tensors(block, add)
    return spans, -(-spans[-1][1] // step) * step
