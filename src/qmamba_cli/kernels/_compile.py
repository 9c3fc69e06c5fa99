"""Compiling kernels to machine code without a GPU, for any architecture NVRTC knows."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qmamba_cli.errors import DeviceError, UsageError
from qmamba_cli.kernels._source import COMPILE_OPTIONS, SPECIAL_TARGETS, kernel_source, target_of

# Modules that have kernels; each lists its source and every instance it can launch.
OPERATORS = {
    "argmax": "argmax.cuda",
    "causal_conv1d": "causal_conv1d.cuda",
    "decode": "decode.cuda",
    "decode_batch": "decode_batch.cuda",
    "decode_ends": "decode_ends.cuda",
    "embedding": "embedding.cuda",
    "hadamard": "hadamard.cuda",
    "linear": "linear.cuda",
    "linear_narrow": "linear.narrow",
    "linear_short": "linear.short",
    "linear_wide": "linear.wide",
    "quantize": "quantize.cuda",
    "rms_norm": "rms_norm.cuda",
    "selective_scan": "selective_scan.cuda",
}
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


def entries(arch: str) -> Mapping[str, tuple[str, tuple[str, ...]]]:
    """Operator → its source and the name expressions of every instance that an architecture can launch."""
    found = {}
    for operator, name in OPERATORS.items():
        module = import_module(f"qmamba_cli.kernels.{name}")
        if SPECIAL_TARGETS.get(module.SOURCE, arch).removesuffix("a") == arch:
            found[operator] = (module.SOURCE, module.ENTRIES)
    return found


def compile_all(arch: str) -> Iterator[Compiled]:
    """Compile every instance of every kernel for one architecture.

    Raises:
        UsageError: there is no such architecture.
        DeviceError: CuPy or NVRTC is missing, or a kernel does not compile.
    """
    if arch not in ARCHITECTURES:
        raise UsageError(f"unknown architecture `{arch}`, expected one of {', '.join(ARCHITECTURES)}")
    for operator, (source, names) in entries(arch).items():
        started = time.perf_counter()
        code, _ = machine_code(source, names, target_of(source, arch))
        yield Compiled(
            operator=operator,
            arch=arch,
            entries=len(names),
            bytes=len(code),
            seconds=time.perf_counter() - started,
        )


def machine_code(source: str, names: Sequence[str], target: str) -> tuple[bytes, dict[str, str]]:
    """Instances of one source as a cubin, and the name of each in it.

    Args:
        source: path below ``qmamba_cli/kernels``.
        names: name expressions of the instances.
        target: as in ``sm_90`` or ``sm_90a``.

    Raises:
        DeviceError: CuPy or NVRTC is missing, or the source does not compile.
    """
    nvrtc = require_nvrtc()
    options = (*COMPILE_OPTIONS, "-ftz=true", f"-arch={target}", *(f"-I{path}" for path in _header_folders()))
    program = nvrtc.createProgram(kernel_source(source), source, (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            log = nvrtc.getProgramLog(program)
            raise DeviceError(f"`{source}` does not compile for {target}: {log}") from None
        # CuPy takes off the last byte, as it does of PTX, where it is the end of a string.
        code = nvrtc.getCUBIN(program) + b"\0"
        return code, {name: nvrtc.getLoweredName(program, name) for name in names}
    finally:
        nvrtc.destroyProgram(program)


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
