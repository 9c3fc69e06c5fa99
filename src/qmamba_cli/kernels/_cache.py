"""CuPy's cache of compiled kernels, and filling it with several processes at once.

NVRTC compiles one program at a time in a process, so that threads gain nothing.
"""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from typing import Any

from qmamba_cli.kernels._source import COMPILE_OPTIONS, kernel_source
from qmamba_cli.progress import Advance

# Each process holds a CUDA context and imports CuPy.
_MOST_PROCESSES = 8


def raw_module(source: str, entry: str) -> Any:
    """One instance of a kernel as CuPy's RawModule, which is compiled or read from the cache when it is used.

    Args:
        source: path below ``qmamba_cli/kernels``, as in ``hadamard/hadamard.cu``.
        entry: C++ name expression of the instance.
    """
    import cupy

    return cupy.RawModule(
        code=kernel_source(source), options=COMPILE_OPTIONS, name_expressions=(entry,), backend="nvrtc"
    )


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
    pairs = list(work)
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
            raw_module(*pair).compile()
    except (RuntimeError, cupy.cuda.compiler.CompileException):
        return False
    return True
