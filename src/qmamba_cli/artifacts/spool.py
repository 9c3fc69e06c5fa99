"""Tensors put aside on disk until all of them are known.

The order of a safetensors file and the length of its header follow from all of its tensors, but a large model
is quantized one layer at a time. A spool takes tensors as they come and gives them back in any order, one in
memory at a time.
"""

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

from qmamba_cli.artifacts.safetensors_header import DTYPES, TensorInfo
from qmamba_cli.artifacts.safetensors_io import LazyTensor, TensorSource, describe, payload

if TYPE_CHECKING:
    import torch

# What a writer is given: a mapping whose values are in memory or lazy, or tensors as they are made.
Tensors: TypeAlias = "Mapping[str, TensorSource] | Iterable[tuple[str, TensorSource]]"


@contextmanager
def at_hand(tensors: Tensors, folder: Path, name: str) -> Iterator[Mapping[str, TensorSource]]:
    """A mapping of ``tensors``; those that come one after another are put aside on disk first.

    Args:
        tensors: a mapping, which is handed through, or an iterable of (name, tensor).
        folder: where a nameless file of the size of all is put; it goes with the block or the process.
        name: begins the file's name where the file system knows no nameless files.

    Raises:
        OSError: the disk refuses.
        ValueError: a name comes twice, or a dtype cannot be written.
    """
    if isinstance(tensors, Mapping):
        yield tensors
        return
    with tempfile.TemporaryFile(dir=folder, prefix=name) as file:
        yield dict(_spooled(tensors, file))


def _spooled(
    tensors: Iterable[tuple[str, TensorSource]], file: IO[bytes]
) -> Iterator[tuple[str, LazyTensor]]:
    seen: set[str] = set()
    for name, value in tensors:
        if name in seen:
            raise ValueError(f"tensor `{name}` is given twice")
        seen.add(name)
        info = describe(value)
        begin = file.tell()
        file.write(payload(name, value, info))
        yield name, LazyTensor(info.dtype, info.shape, _Loader(file, begin, info))
    file.flush()


class _Loader:
    """Reads one tensor back."""

    def __init__(self, file: IO[bytes], begin: int, info: TensorInfo) -> None:
        self._file = file
        self._begin = begin
        self._info = info

    def __call__(self) -> "torch.Tensor":
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self._info.dtype].torch)
        tensor = torch.empty(self._info.shape, dtype=dtype)
        if tensor.numel():
            content = tensor.view(-1).view(torch.uint8).numpy().data
            self._file.seek(self._begin)
            if self._file.readinto(content) != content.nbytes:  # type: ignore[attr-defined]
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return tensor
