"""Times the CUDA kernels against their floors, goals and peers on this machine's GPU.

    python benchmarks/gpu.py [--only NAME] [--json FILE]

Every case runs on random data, its call captured in a CUDA graph, so that no launch from Python is timed. A
time is the median of CUDA-event timings; before each run a buffer larger than the L2 cache is written and
another is read, so that a kernel finds neither its inputs nor dirty lines there. The copy bandwidth of the
card is measured in the same run. Floors, goals and peers were measured on one NVIDIA H200.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_cases import cases

from qmamba_cli.kernels.backend import select_backend

_FLUSH_BYTES = 256 << 20
_REPEATS, _WARMUP = 25, 3


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as one replay of a CUDA graph."""
    for _ in range(_WARMUP):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def median_ms(run: Callable[[], object]) -> float:
    """Median time of one call in milliseconds, caches flushed before each."""
    written = torch.empty(_FLUSH_BYTES // 4, device="cuda")
    read = torch.ones(_FLUSH_BYTES // 4, device="cuda")
    times = []
    for repeat in range(_WARMUP + _REPEATS):
        written.fill_(1.0)
        read.sum()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The host must be ahead of the device, or its own time would be measured.
        torch.cuda._sleep(200_000)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if repeat >= _WARMUP:
            times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def copy_gb_s() -> float:
    """Device copy bandwidth, read and written bytes counted."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    ops = select_backend("cuda")
    bandwidth, name = copy_gb_s(), torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, copy {bandwidth:.0f} GB/s")
    print(f"{'case':54s} {'ms':>8s} {'GB/s':>6s} {'Gexp/s':>7s} {'floor':>8s} {'goal':>8s} {'fp16 peer':>9s}")
    rows = []
    for case in cases():
        if options.only not in case.name:
            continue
        with torch.inference_mode():
            ms = median_ms(captured(case.make(ops)))
        floor, goal, peer = (
            "" if value is None else f"{value:.4f}" for value in (case.floor_ms, case.goal_ms, case.peer_ms)
        )
        print(
            f"{case.name:54s} {ms:8.4f} {case.bytes / ms / 1e6:6.0f} {case.exps / ms / 1e6:7.0f} "
            f"{floor:>8s} {goal:>8s} {peer:>9s}",
            flush=True,
        )
        rows.append({key: value for key, value in asdict(case).items() if key != "make"} | {"ms": ms})
    if options.json:
        text = json.dumps({"gpu": name, "copy_gb_s": bandwidth, "rows": rows}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
