"""Compiling kernels to machine code without a GPU, for any architecture NVRTC knows."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qmamba_cli.errors import DeviceError, UsageError
from qmamba_cli.kernels._source import COMPILE_OPTIONS, kernel_source

# Operators that have kernels; each module lists its source and every instance it can launch.
OPERATORS = (
    "causal_conv1d",
    "decode",
    "embedding",
    "hadamard",
    "linear",
    "quantize",
    "rms_norm",
    "selective_scan",
)
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """One source compiled for one architecture.

    Attributes:
        operator: name of the operator.
        arch: as in ``sm_90``.
        entries: number of instances.
        bytes: size of the machine code.
        seconds: compile time.
    """

    operator: str
    arch: str
    entries: int
    bytes: int
    seconds: float


def entries() -> Mapping[str, tuple[str, tuple[str, ...]]]:
    """Operator → its source and the name expressions of every instance it can launch."""
    modules = {name: import_module(f"qmamba_cli.kernels.{name}.cuda") for name in OPERATORS}
    return {name: (module.SOURCE, module.ENTRIES) for name, module in modules.items()}


def compile_all(arch: str) -> Iterator[Compiled]:
    """Compile every instance of every kernel for one architecture.

    Raises:
        UsageError: there is no such architecture.
        DeviceError: CuPy or NVRTC is missing, or a kernel does not compile.
    """
    if arch not in ARCHITECTURES:
        raise UsageError(f"unknown architecture `{arch}`, expected one of {', '.join(ARCHITECTURES)}")
    nvrtc = require_nvrtc()
    options = (*COMPILE_OPTIONS, "-ftz=true", f"-arch={arch}", *(f"-I{path}" for path in _header_folders()))
    for operator, (source, names) in entries().items():
        started = time.perf_counter()
        program = nvrtc.createProgram(kernel_source(source), source, (), ())
        try:
            for name in names:
                nvrtc.addNameExpression(program, name)
            try:
                nvrtc.compileProgram(program, options)
            except nvrtc.NVRTCError:
                log = nvrtc.getProgramLog(program)
                raise DeviceError(f"`{source}` does not compile for {arch}: {log}") from None
            code = nvrtc.getCUBIN(program)
        finally:
            nvrtc.destroyProgram(program)
        yield Compiled(
            operator=operator,
            arch=arch,
            entries=len(names),
            bytes=len(code),
            seconds=time.perf_counter() - started,
        )


def require_nvrtc() -> Any:
    """CuPy's binding of NVRTC, the run-time compiler.

    Raises:
        DeviceError: CuPy or NVRTC is missing.
    """
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise DeviceError(
            f"compiling kernels needs CuPy and NVRTC, got: {reason[0] if reason else type(error).__name__}",
            hint="`pip install 'qmamba-cli[cuda13]'`, and the NVRTC of that CUDA version",
        ) from None
    return nvrtc


def _header_folders() -> list[Path]:
    """Where CUDA's own headers are: NVIDIA's wheels or an installed toolkit."""
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    return [] if folder is None else [Path(folder)]
