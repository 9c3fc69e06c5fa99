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
from qmamba_cli.kernels.decode_batch import cuda as batch_cuda

HERE = Path(__file__).parent
COPIED = (
    "numerics.cuh",
    "decode_turn.cuh",
    "carver.cuh",
    "decode_weights.cuh",
    "decode_parts.cuh",
    "decode_conv.cuh",
    "decode_columns.cuh",
    "decode_scan.cuh",
    "decode_unpack.cuh",
    "decode_batch_product.cuh",
    "decode_batch_wide.cuh",
    "decode_batch_scan.cuh",
    "decode_batch_conv.cuh",
    "decode/decode.cu",
    "decode_batch/decode_batch.cu",
)
HARNESS = """
#include "decode_ptx.cuh"
#include "SOURCE"
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
    """The kernels of an operator on this machine's CPU.

    Args:
        folder: where they are compiled.
        entries: instances of the operator's kernels.
        source: its source file.
        wide: as on a GPU that multiplies by groups of warps.
    """

    def __init__(
        self,
        folder: Path,
        entries: tuple[str, ...] = cuda.ENTRIES,
        source: str = cuda.SOURCE,
        *,
        wide: bool = False,
    ) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("no g++ on this machine")
        for name in COPIED:
            text = files("qmamba_cli.kernels").joinpath(name).read_text()
            (folder / Path(name).name).write_text(text)
        (folder / "decode_ptx.cuh").write_text((HERE / "decode_emulator.hpp").read_text())
        (folder / "overlap.cuh").write_text("")  # the emulator's header has both halves
        (folder / "decode_wide_ptx.cuh").write_text(f"#define QM_WIDE {int(wide)}\n")
        cases = "\n".join(
            f"    case {i}: return call({entry}, count, p, gx, gy, threads, bytes);"
            for i, entry in enumerate(entries)
        )
        harness = HARNESS.replace("CASES", cases).replace("SOURCE", Path(source).name)
        (folder / "harness.cpp").write_text(harness)
        self._entries, self.wide = entries, wide
        library = folder / "decode.so"
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, "-o", library, folder / "harness.cpp"], check=True)
        self._run = ctypes.CDLL(str(library)).run

    @classmethod
    def of_batch(cls, folder: Path, *, wide: bool) -> "Emulator":
        """The kernels for many sequences."""
        return cls(folder, batch_cuda.ENTRIES, batch_cuda.SOURCE, wide=wide)

    def run(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            values = [_launch._value(arg) for arg in step.args]
            slots, addresses = _launch._parameters(values)
            done = self._run(
                self._entries.index(step.entry),
                len(values),
                addresses,
                step.grid[0],
                step.grid[1],
                step.threads,
                step.shared_bytes,
            )
            assert done, f"{step.entry} failed"
            del slots
