"""Safetensors files, read strictly from a memory map and written to the same bytes every time.

torch is imported only where a tensor is asked for, so that a manifest can be read without it.
"""

import math
import mmap
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qmamba_cli.artifacts.files import json_excess, reading, sha256_bytes, shown
from qmamba_cli.artifacts.safetensors_header import (
    DTYPES,
    LENGTH_BYTES,
    MAX_ELEMENTS,
    MAX_HEADER_BYTES,
    MAX_RANK,
    METADATA,
    Header,
    TensorInfo,
    data_order,
    parse_header,
    render_header,
)
from qmamba_cli.errors import ArtifactError, QmambaError

if TYPE_CHECKING:
    import torch

_NO_DIGEST = "0" * 64
_BY_NUMPY = {row.numpy: name for name, row in DTYPES.items() if name != "BF16"}
_BY_TORCH = {row.torch: name for name, row in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor to be written that is made when its turn comes, once, and dropped after.

    Attributes:
        dtype: a key of `DTYPES`.
        shape: dimensions; both must hold for what ``load`` returns.
        load: makes the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], "npt.NDArray[Any] | torch.Tensor"]


TensorSource: TypeAlias = "npt.NDArray[Any] | torch.Tensor | LazyTensor"
# Either the metadata, or what makes it from the sha256 of every tensor's data.
Metadata: TypeAlias = Mapping[str, str] | Callable[[Mapping[str, str]], Mapping[str, str]]


class SafetensorsFile:
    """An open safetensors file; tensors are read where they lie, when they are asked for.

    The map is private: a tensor may be changed in place and the file stays as it is.

    Args:
        path: as given, for messages.
        buffer: the whole file.
        header: its checked header.
    """

    def __init__(self, path: Path, buffer: mmap.mmap, header: Header) -> None:
        self.path = path
        self.header = header
        self._buffer = buffer

    @property
    def metadata(self) -> Mapping[str, str]:
        """The strings under ``__metadata__``."""
        return self.header.metadata

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of their data."""
        return tuple(self.header.infos)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of one tensor.

        Raises:
            ArtifactError: there is no such tensor.
        """
        try:
            return self.header.infos[name]
        except KeyError:
            raise ArtifactError(f"tensor `{shown(name)}` is missing from `{self.path}`") from None

    def bytes(self, name: str) -> memoryview:
        """The data of one tensor, read-only, without a copy.

        Raises:
            ArtifactError: there is no such tensor.
        """
        self.info(name)
        begin, end = self.header.offsets[name]
        return memoryview(self._buffer)[begin:end].toreadonly()

    def numpy(self, name: str) -> npt.NDArray[Any]:
        """One tensor as a read-only array without a copy; BF16 as its bits in uint16.

        Raises:
            ArtifactError: there is no such tensor.
        """
        info = self.info(name)
        return np.frombuffer(self.bytes(name), dtype=DTYPES[info.dtype].numpy).reshape(info.shape)

    def tensor(self, name: str) -> "torch.Tensor":
        """One tensor on the CPU, without a copy where the file aligns it.

        Raises:
            ArtifactError: there is no such tensor.
        """
        import torch

        info = self.info(name)
        dtype: torch.dtype = getattr(torch, DTYPES[info.dtype].torch)
        begin, end = self.header.offsets[name]
        if begin == end:
            return torch.empty(info.shape, dtype=dtype)
        data: mmap.mmap | memoryview | bytearray = self._buffer
        if begin % DTYPES[info.dtype].size:
            # Foreign writers need not align; an element across a boundary is undefined for torch.
            data, begin = bytearray(self.bytes(name)), 0
        count = info.nbytes // DTYPES[info.dtype].size
        return torch.frombuffer(data, dtype=dtype, count=count, offset=begin).reshape(info.shape)


def open_safetensors(path: Path) -> SafetensorsFile:
    """Map a file and check its header; no tensor is read.

    Raises:
        QmambaError: the file does not exist or cannot be read.
        ArtifactError: it is no safetensors file, is cut short, or its header breaks a rule of the format.
    """
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise QmambaError(f"`{path}` is not a regular file, expected a safetensors file")
            if status.st_size < LENGTH_BYTES:
                raise ArtifactError(
                    f"`{path}` is no safetensors file, got {status.st_size} bytes, expected at least 8",
                    hint="the file is cut short or was never written; make it again",
                )
            buffer = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
    return SafetensorsFile(path, buffer, parse_header(buffer, str(path)))


def describe(value: TensorSource) -> TensorInfo:
    """Dtype and shape under which a tensor is written.

    Raises:
        ValueError: the dtype has no row in `DTYPES`.
    """
    if isinstance(value, LazyTensor):
        found = value.dtype if value.dtype in DTYPES else None
    elif isinstance(value, np.ndarray):
        found = _BY_NUMPY.get(value.dtype.newbyteorder("<").str.lstrip("|"))
    else:
        found = _BY_TORCH.get(str(value.dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype {value.dtype} cannot be written, expected one of {', '.join(DTYPES)}")
    return TensorInfo(found, tuple(value.shape))


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorSource], metadata: Metadata = MappingProxyType({})
) -> dict[str, str]:
    """Write tensors one by one; equal input gives equal bytes.

    One tensor's copy is held at a time. Where ``metadata`` is a function it is called twice, with digests of
    zeros before the data is written and with the real ones after; its length must not depend on them.
    The file is written in place: call it inside `files.atomic_file`.

    Args:
        path: the file to fill.
        tensors: name → array, tensor (any device) or `LazyTensor`.
        metadata: strings for ``__metadata__``, left out when there are none.

    Returns:
        Name → sha256 of the tensor's data, in the order of the data.

    Raises:
        ValueError: a name or dtype cannot be written, a `LazyTensor` returns something else than it said, or
            a limit of the format is exceeded.
    """
    sizes = {name: describe(value) for name, value in tensors.items()}
    infos = {name: sizes[name] for name in sorted(sizes, key=lambda name: data_order(name, sizes[name]))}
    _require_writable(infos)
    digests = dict.fromkeys(infos, _NO_DIGEST)

    def header() -> bytes:
        return render_header(infos, metadata(digests) if callable(metadata) else metadata)

    placeholder = header()
    if len(placeholder) - LENGTH_BYTES > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(placeholder)} bytes exceeds the limit of {MAX_HEADER_BYTES}")
    if excess := json_excess(placeholder):
        raise ValueError(f"a header that no reader takes: {excess}")
    with path.open("wb") as file:
        file.write(placeholder)
        for name, info in infos.items():
            data = payload(name, tensors[name], info)
            digests[name] = sha256_bytes(data)
            file.write(data)
        final = header()
        if len(final) != len(placeholder):
            raise ValueError("the length of the metadata depends on the digests")
        file.seek(0)
        file.write(final)
    return digests


def _require_writable(infos: Mapping[str, TensorInfo]) -> None:
    for name, info in infos.items():
        elements = math.prod(max(dimension, 1) for dimension in info.shape)
        if name == METADATA or len(info.shape) > MAX_RANK or elements > MAX_ELEMENTS:
            raise ValueError(f"tensor `{name}` {info.shape} cannot be written to a safetensors file")


def payload(name: str, value: TensorSource, info: TensorInfo) -> memoryview:
    """The bytes of one tensor, little-endian and row by row; a copy only where the layout needs one.

    Args:
        name: of the tensor, for messages.
        value: the tensor.
        info: what it was announced as.

    Raises:
        ValueError: a `LazyTensor` returns something else.
    """
    if isinstance(value, LazyTensor):
        value = value.load()
        if describe(value) != info:
            raise ValueError(f"tensor `{name}` was announced as {info}, got {describe(value)}")
    if not isinstance(value, np.ndarray):
        import torch

        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return value.data
    array = np.ascontiguousarray(value, dtype=DTYPES[info.dtype].numpy)
    return array.reshape(-1).view(np.uint8).data
