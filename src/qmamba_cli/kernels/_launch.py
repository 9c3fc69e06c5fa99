"""Compiling and launching CUDA kernels through CuPy; the one module that imports it.

torch owns memory and streams: a launch takes torch tensors, runs on the current stream of their device and is
captured by a CUDA graph like any other kernel.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch

from qmamba_cli.errors import DeviceError, QmambaError, ShapeError
from qmamba_cli.kernels._source import COMPILE_OPTIONS, kernel_source

# A pointer, a scalar whose width is spelled out (a bare Python number would be passed as 64 bits), or null.
Arg: TypeAlias = torch.Tensor | np.int32 | np.int64 | np.float32 | None

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
        kernel(grid, block, tuple(values), shared_mem=shared_bytes)


@cache
def _kernel(source: str, entry: str, device_index: int) -> Any:
    """One instance on one device; a source is compiled once for each of its instances."""
    cupy = _cupy()
    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(
            code=kernel_source(source), options=COMPILE_OPTIONS, name_expressions=(entry,), backend="nvrtc"
        )
        try:
            kernel = module.get_function(entry)
        except cupy.cuda.compiler.CompileException as error:
            raise QmambaError(f"kernel `{entry}` of `{source}` does not compile: {error}") from None
    return kernel


def _allow_shared(kernel: Any, shared_bytes: int) -> None:
    """Raise a kernel's limit of dynamic shared memory; never lower it, since all its launches share it."""
    if shared_bytes > max(_DEFAULT_SHARED_BYTES, kernel.max_dynamic_shared_size_bytes):
        kernel.max_dynamic_shared_size_bytes = shared_bytes


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
