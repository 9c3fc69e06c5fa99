"""CuPy's cache of compiled kernels, and filling it with several processes at once.

NVRTC compiles one program at a time in a process, so that threads gain nothing.
"""

import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

from qmamba_cli.kernels._compile import machine_code, require_nvrtc
from qmamba_cli.kernels._source import COMPILE_OPTIONS, SPECIAL_TARGETS, kernel_source
from qmamba_cli.progress import Advance

# Where CuPy keeps what it compiles, too.
_CUBINS = Path.home() / ".cupy" / "kernel_cache"
# Each process holds a CUDA context and imports CuPy.
_MOST_PROCESSES = 8


def instance(source: str, entry: str) -> Any:
    """One instance of a kernel for the current device as CuPy's RawKernel, compiled or read from the cache.

    Args:
        source: path below ``qmamba_cli/kernels``, as in ``hadamard/hadamard.cu``.
        entry: C++ name expression of the instance.
    """
    import cupy

    if source in SPECIAL_TARGETS:
        path, name = _special(_CUBINS, source, entry)
        return cupy.RawModule(path=str(path)).get_function(name)
    module = cupy.RawModule(
        code=kernel_source(source), options=COMPILE_OPTIONS, name_expressions=(entry,), backend="nvrtc"
    )
    return module.get_function(entry)


def _special(folder: Path, source: str, entry: str) -> tuple[Path, str]:
    """An instance for a target that CuPy does not compile for: its cubin's path and its name in it."""
    target = SPECIAL_TARGETS[source]
    version = ".".join(map(str, require_nvrtc().getVersion()))
    key = "\n".join((kernel_source(source), *COMPILE_OPTIONS, target, entry, version))
    stem = f"qmamba-{hashlib.sha256(key.encode()).hexdigest()}"
    path, name_path = folder / f"{stem}.cubin", folder / f"{stem}.name"
    if not (path.is_file() and name_path.is_file()):
        code, names = machine_code(source, [entry], target)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for at, data in ((path, code), (name_path, names[entry].encode())):
                part = at.with_name(f"{at.name}.{os.getpid()}")
                part.write_bytes(data)
                part.replace(at)
        except OSError:
            # As where the home folder is read-only: the file lives as long as this process.
            path = Path(_temporary().name) / path.name
            path.write_bytes(code)
        return path, names[entry]
    return path, name_path.read_text()


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qmamba-")


def fill(work: Iterable[tuple[str, str]], device_index: int, advance: Advance) -> int:
    """Compile instances into the cache of this user, side by side.

    An instance that does not compile here is left to its first launch, which says what is wrong.

    Args:
        work: (source, entry) of each instance.
        device_index: the GPU to compile for.
        advance: called with 1 for each instance.

    Returns:
        How many instances are in the cache now.
    """
    # The longest first, so that none is left alone at the end.
    pairs = sorted(work, key=lambda pair: len(kernel_source(pair[0])), reverse=True)
    processes = min(_MOST_PROCESSES, os.cpu_count() or 1, len(pairs))
    if processes < 2:
        return 0
    filled = 0
    # A forked child cannot use a CUDA context.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            for done in pool.map(_compile, pairs, repeat(device_index)):
                filled += done
                advance(1)
    except BrokenProcessPool:
        # As when the GPU takes one process only.
        return filled
    return filled


def _compile(pair: tuple[str, str], device_index: int) -> bool:
    import cupy

    try:
        with cupy.cuda.Device(device_index):
            instance(*pair)
    except (RuntimeError, cupy.cuda.compiler.CompileException):
        return False
    return True
