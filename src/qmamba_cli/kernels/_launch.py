"""Launching CUDA kernels through CuPy.

torch owns memory and streams: a launch takes torch tensors, runs on the current stream of their device and is
captured by a CUDA graph like any other kernel.
"""

import ctypes
import sys
import time
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch

from qmamba_cli.errors import DeviceError, QmambaError, ShapeError
from qmamba_cli.kernels._cache import instance
from qmamba_cli.progress import notice

# A pointer, a scalar whose width is spelled out (a bare Python number would be passed as 64 bits), null, or
# the bytes of a struct that is passed by value.
Arg: TypeAlias = torch.Tensor | np.int32 | np.int64 | np.float32 | bytes | None

MIN_COMPUTE_CAPABILITY = (8, 0)
_DEFAULT_SHARED_BYTES = 48 * 1024
_MAX_GRID = (2**31 - 1, 65535, 65535)


def require_device() -> None:
    """Check that kernels can run here.

    Raises:
        DeviceError: no GPU, a GPU that is too old, or CuPy is missing or of another CUDA version.
    """
    if not torch.cuda.is_available():
        built = "this torch has no CUDA part" if torch.version.cuda is None else "torch sees no CUDA device"
        raise DeviceError(
            f"the `cuda` backend needs an NVIDIA GPU, got none: {built}",
            hint="use `--backend cpu`, which runs every mode",
        )
    capability = torch.cuda.get_device_capability()
    if capability < MIN_COMPUTE_CAPABILITY:
        raise DeviceError(
            f"the `cuda` backend needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]} "
            f"({torch.cuda.get_device_name()})",
            hint="use `--backend cpu`, which runs every mode",
        )
    major = (torch.version.cuda or "13").partition(".")[0]
    extra = f"`pip install 'qmamba-cli[cuda{major}]'`"
    try:
        cupy = _cupy()
    except ImportError as error:
        raise DeviceError(f"the `cuda` backend needs CuPy, got: {error}", hint=extra) from None
    found = cupy.cuda.runtime.runtimeGetVersion() // 1000
    if str(found) != major:
        raise DeviceError(
            f"CuPy was built for CUDA {found}, expected CUDA {major} as torch",
            hint=f"`pip uninstall cupy-cuda{found}x`, then {extra}",
        )


def launch(
    source: str,
    entry: str,
    *,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[Arg],
    device: torch.device,
    shared_bytes: int = 0,
    overlap: bool = False,
) -> None:
    """Launch one kernel on torch's current stream of ``device``; compiles it on first use.

    Args:
        source: path below ``qmamba_cli/kernels``, as in ``hadamard/hadamard.cu``.
        entry: C++ name expression of the instance, as in ``hadamard<4, true>``.
        grid: blocks along x, y, z.
        block: threads along x, y, z.
        args: the kernel's parameters in order.
        device: where the tensors live.
        shared_bytes: dynamic shared memory.
        overlap: the kernel may start while the one before it in the stream still runs (programmatic dependent
            launch); it waits for that one itself. Ignored where the GPU or its driver cannot.

    Raises:
        ShapeError: the problem exceeds the grid.
        QmambaError: the kernel does not compile, or the GPU refuses the launch.
    """
    if any(size < 1 for size in grid) or any(size > most for size, most in zip(grid, _MAX_GRID, strict=True)):
        raise ShapeError(f"{entry}: grid {grid} is out of range, expected 1 to {_MAX_GRID}")
    kernel = _kernel(source, entry, device.index or 0)
    cupy = _cupy()
    stream = torch.cuda.current_stream(device).cuda_stream
    values = [_value(arg) for arg in args]
    with cupy.cuda.Device(device.index or 0), _stream(stream, device.index or 0):
        _allow_shared(kernel, shared_bytes)
        overlap = overlap and _can_overlap(device.index or 0)
        if overlap:
            _prefer_shared(source, entry, device.index or 0)
        if overlap or any(isinstance(value, bytes) for value in values):
            _launch_driver(
                kernel.kernel.ptr, grid, block, values, shared_bytes, stream, entry, overlap=overlap
            )
        else:
            kernel(grid, block, tuple(values), shared_mem=shared_bytes)


@cache
def _kernel(source: str, entry: str, device_index: int) -> Any:
    """One instance on one device; a source is compiled once for each of its instances."""
    cupy = _cupy()
    with cupy.cuda.Device(device_index):
        started = time.perf_counter()
        try:
            kernel = instance(source, entry)
        except cupy.cuda.compiler.CompileException as error:
            raise QmambaError(f"kernel `{entry}` of `{source}` does not compile: {error}") from None
        _tell_of_compiling(time.perf_counter() - started)
    return kernel


# A kernel in CuPy's cache is loaded within milliseconds.
_COMPILED_S = 0.1
_TOLD: list[str] = []


def _tell_of_compiling(seconds: float) -> None:
    """Say once why the first use of a GPU takes seconds."""
    if seconds > _COMPILED_S and not _TOLD:
        _TOLD.append(
            "compiling CUDA kernels for this GPU, a few seconds; later runs find them in CuPy's cache"
        )
        notice(_TOLD[0])


def _allow_shared(kernel: Any, shared_bytes: int) -> None:
    """Raise a kernel's limit of dynamic shared memory; never lower it, since all its launches share it."""
    if shared_bytes > max(_DEFAULT_SHARED_BYTES, kernel.max_dynamic_shared_size_bytes):
        kernel.max_dynamic_shared_size_bytes = shared_bytes


@cache
def _prefer_shared(source: str, entry: str, device_index: int) -> None:
    """Ask for the largest share of shared memory, whatever the kernel needs itself.

    A multiprocessor changes that share only while it is idle, so kernels that are to run side by side must
    agree on it.
    """
    _kernel(source, entry, device_index).preferred_shared_memory_carveout = 100


# CUlaunchAttributeID, of the driver's stable interface.
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_OVERLAP_CAPABILITY = (9, 0)


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_uint), ("value", ctypes.c_ulonglong * 8))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


def _launch_driver(
    function: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    values: Sequence[Any],
    shared_bytes: int,
    stream: int,
    entry: str,
    *,
    overlap: bool,
) -> None:
    """Launch a driver function, with or without programmatic stream serialization; its context is current."""
    attribute = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION)
    ctypes.cast(attribute.value, ctypes.POINTER(ctypes.c_int))[0] = 1
    config = _LaunchConfig(
        grid=grid,
        block=block,
        shared_bytes=shared_bytes,
        stream=stream,
        attributes=ctypes.pointer(attribute),
        attribute_count=int(overlap),
    )
    slots, addresses = _parameters(values)
    driver = _driver()
    if driver is None:
        raise QmambaError("the CUDA driver's library is gone")
    status = driver.cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), addresses, None)
    del slots  # the driver has copied the parameters
    if status:
        raise QmambaError(f"{entry}: the GPU refuses the launch, CUDA driver error {status}")


def _parameters(values: Sequence[Any]) -> tuple[Any, Any]:
    """Sized numpy scalars and structs in slots of 8 bytes or more, and the addresses the driver wants."""
    data = [value if isinstance(value, bytes) else value.tobytes() for value in values]
    begins = [0, *accumulate(round_up(len(item), 8) for item in data)]
    slots = ctypes.create_string_buffer(max(8, begins[-1]))
    base = ctypes.addressof(slots)
    for begin, item in zip(begins, data, strict=False):
        ctypes.memmove(base + begin, item, len(item))
    addresses = (ctypes.c_void_p * max(1, len(data)))(*(base + begin for begin in begins[:-1]))
    return slots, addresses


@cache
def _can_overlap(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= _OVERLAP_CAPABILITY and _driver() is not None


@cache
def _driver() -> Any:
    """The CUDA driver with cuLaunchKernelEx (CUDA 11.8 or newer), or None."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        library.cuLaunchKernelEx.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return library


class _TorchStream:
    """A stream of torch as CuPy's stream protocol wants it."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@cache
def _stream(pointer: int, device_index: int) -> Any:
    stream = _cupy().cuda.Stream
    if hasattr(stream, "from_external"):
        return stream.from_external(_TorchStream(pointer))
    return _cupy().cuda.ExternalStream(pointer, device_index)


def _value(arg: Arg) -> Any:
    if arg is None:
        return np.uint64(0)
    if isinstance(arg, torch.Tensor):
        return np.uint64(arg.data_ptr())
    if isinstance(arg, bytes):
        return arg
    if not isinstance(arg, np.int32 | np.int64 | np.float32):
        raise TypeError(f"a kernel argument must be a tensor, None or a sized numpy scalar, got {type(arg)}")
    return arg


@cache
def _cupy() -> Any:
    import cupy

    return cupy


@cache
def sm_count(device: torch.device) -> int:
    """Number of multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def require_cuda(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, if it is on a GPU.

    Raises:
        ShapeError: it is not.
    """
    if not tensor.is_cuda:
        raise ShapeError(f"`{name}` is on {tensor.device}, expected a CUDA tensor")
    return tensor


def contiguous(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in row-major order, copied if it is not; kernels ignore strides."""
    return require_cuda(name, tensor).contiguous()


# CUtensorMapDataType, -Swizzle and -L2promotion, of the driver's stable interface.
_MAP_UINT8, _MAP_SWIZZLE_128, _MAP_L2_256 = 0, 3, 3
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


def byte_tiles(matrix: torch.Tensor, rows: int, columns: int) -> bytes:
    """What the copy engine of Hopper and later is told about the tiles of a matrix of bytes: a CUtensorMap.

    Tiles arrive with their 16-byte pieces swizzled in groups of eight rows of 128 bytes, and zeros outside.

    Args:
        matrix: (m, k) of one byte an element on a GPU; columns adjacent, rows on 16-byte boundaries.
        rows: of a tile, at most 256.
        columns: of a tile, at most 128.

    Raises:
        QmambaError: the driver is too old or refuses the matrix.
    """
    return strided_tiles(matrix, (matrix.shape[1], matrix.shape[0]), (matrix.stride(0),), (columns, rows))


def strided_tiles(
    matrix: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> bytes:
    """`byte_tiles` whose rows come in another order: a row is named by up to four numbers, the first fastest.

    Args:
        matrix: of one byte an element on a GPU, on a 16-byte boundary.
        sizes: columns, then how many values each number has.
        strides: bytes from one value of each number to the next, multiples of 16.
        box: how many of each a tile has, at most 128 columns.

    Raises:
        QmambaError: the driver is too old or refuses the matrix.
    """
    encode = getattr(_driver(), "cuTensorMapEncodeTiled", None)
    if encode is None:
        raise QmambaError(
            "the CUDA driver has no cuTensorMapEncodeTiled, expected that of CUDA 12.0 or newer"
        )
    memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    at = round_up(ctypes.addressof(memory), _MAP_ALIGNMENT)
    wide, short = ctypes.c_uint64, ctypes.c_uint32
    status = encode(
        ctypes.c_void_p(at),
        _MAP_UINT8,
        len(sizes),
        ctypes.c_void_p(matrix.data_ptr()),
        (wide * len(sizes))(*sizes),
        (wide * len(strides))(*strides),
        (short * len(box))(*box),
        (short * len(box))(*(1 for _ in box)),
        0,
        _MAP_SWIZZLE_128,
        _MAP_L2_256,
        0,
    )
    if status:
        raise QmambaError(
            f"the GPU takes no tiles of {tuple(matrix.shape)} bytes, CUDA driver error {status}"
        )
    return ctypes.string_at(at, _MAP_BYTES)
