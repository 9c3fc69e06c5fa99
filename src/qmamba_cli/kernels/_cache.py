"""CuPy's cache of compiled kernels, and filling it on several processors at once.

NVRTC compiles the programs of several threads side by side (seen with CUDA 12.0 to 13.0), so that no other
process need import CuPy and make a context.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

from qmamba_cli.kernels._compile import machine_code, require_nvrtc
from qmamba_cli.kernels._source import COMPILE_OPTIONS, SPECIAL_TARGETS, kernel_source, target_of
from qmamba_cli.progress import Advance

# Where CuPy keeps what it compiles, too.
_CUBINS = Path.home() / ".cupy" / "kernel_cache"
# More gain nothing: the longest instance takes as long as the others by then.
_MOST_THREADS = 16


def instance(source: str, entry: str) -> Any:
    """One instance of a kernel for the current device as CuPy's RawKernel, compiled or read from the cache.

    Args:
        source: path below ``qmamba_cli/kernels``, as in ``hadamard/hadamard.cu``.
        entry: C++ name expression of the instance.
    """
    import cupy

    arch = f"sm_{cupy.cuda.Device().compute_capability}"
    target = target_of(source, arch)
    if target != arch:
        path, name = _special(_CUBINS, source, entry, target)
        return cupy.RawModule(path=str(path)).get_function(name)
    module = cupy.RawModule(
        code=kernel_source(source), options=COMPILE_OPTIONS, name_expressions=(entry,), backend="nvrtc"
    )
    return module.get_function(entry)


def _special(folder: Path, source: str, entry: str, target: str) -> tuple[Path, str]:
    """An instance for a target that CuPy does not compile for: its cubin's path and its name in it."""
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
    pairs = sorted(
        work, key=lambda pair: (pair[0] in SPECIAL_TARGETS, len(kernel_source(pair[0]))), reverse=True
    )
    threads = min(_MOST_THREADS, os.cpu_count() or 1, len(pairs))
    if threads < 2:
        return 0
    filled = 0
    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(_compile, pairs, repeat(device_index)):
            filled += done
            advance(1)
    return filled


def _compile(pair: tuple[str, str], device_index: int) -> bool:
    import cupy

    try:
        with cupy.cuda.Device(device_index):
            instance(*pair)
    except (RuntimeError, cupy.cuda.compiler.CompileException):
        return False
    return True
