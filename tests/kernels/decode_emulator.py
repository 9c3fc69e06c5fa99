"""Compiles the decode kernels for the CPU, every CUDA thread a coroutine, and runs launches of them."""

import ctypes
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.decode import cuda
from qmamba_cli.kernels.decode.steps import Step

HERE = Path(__file__).parent
COPIED = (
    "numerics.cuh",
    "decode_turn.cuh",
    "decode_weights.cuh",
    "decode_parts.cuh",
    "decode_conv.cuh",
    "decode_scan.cuh",
    "decode_unpack.cuh",
    "decode/decode.cu",
)
HARNESS = """
#include "decode_ptx.cuh"
#include "decode.cu"
#include <utility>
namespace {
template <typename... A, std::size_t... I>
bool call(void (*kernel)(A...), void** p, int gx, int gy, int threads, int bytes, std::index_sequence<I...>) {
  return emulator::run({gx, gy, 1}, threads, bytes, [=] { kernel(*static_cast<A*>(p[I])...); });
}
template <typename... A>
bool call(void (*kernel)(A...), int count, void** p, int gx, int gy, int threads, int bytes) {
  return count == sizeof...(A) && call(kernel, p, gx, gy, threads, bytes, std::index_sequence_for<A...>{});
}
}
extern "C" int run(int entry, int count, void** p, int gx, int gy, int threads, int bytes) {
  switch (entry) {
CASES
  }
  return 0;
}
"""


class Emulator:
    """The kernels of `cuda.ENTRIES` on this machine's CPU."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("no g++ on this machine")
        for name in COPIED:
            text = files("qmamba_cli.kernels").joinpath(name).read_text()
            (folder / Path(name).name).write_text(text)
        (folder / "decode_ptx.cuh").write_text((HERE / "decode_emulator.hpp").read_text())
        cases = "\n".join(
            f"    case {i}: return call({entry}, count, p, gx, gy, threads, bytes);"
            for i, entry in enumerate(cuda.ENTRIES)
        )
        (folder / "harness.cpp").write_text(HARNESS.replace("CASES", cases))
        library = folder / "decode.so"
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", library, folder / "harness.cpp"], check=True)
        self._run = ctypes.CDLL(str(library)).run

    def run(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            values = [_launch._value(arg) for arg in step.args]
            slots, addresses = _launch._parameters(values)
            done = self._run(
                cuda.ENTRIES.index(step.entry),
                len(values),
                addresses,
                step.grid[0],
                step.grid[1],
                step.threads,
                step.shared_bytes,
            )
            assert done, f"{step.entry} failed"
            del slots
