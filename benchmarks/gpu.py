"""Times the CUDA kernels against their floors, goals and peers on this machine's GPU.

    python benchmarks/gpu.py [--only NAME] [--json FILE]

Every case runs on random data. A time is the median of CUDA-event timings; before each run a buffer larger than
the L2 cache is written and another is read, so that a kernel finds neither its inputs nor dirty lines there. The
copy bandwidth of the same card is measured in the same run. Goals and peers were measured on one NVIDIA H200.
"""

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

OPERATORS = ("causal_conv1d", "selective_scan", "hadamard")
_FLUSH_BYTES = 256 << 20


def median_ms(run: Callable[[], object], *, repeats: int = 25, warmup: int = 5) -> float:
    """Median time of one call in milliseconds, caches flushed before each."""
    written = torch.empty(_FLUSH_BYTES // 4, device="cuda")
    read = torch.ones(_FLUSH_BYTES // 4, device="cuda")
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        written.fill_(1.0)
        read.sum()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The host must be ahead of the device, or its launch time would be measured.
        torch.cuda._sleep(200_000)
        start.record()
        run()
        stop.record()
        stop.synchronize()
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
    bandwidth = copy_gb_s()
    properties = torch.cuda.get_device_properties(0)
    print(
        f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}, copy {bandwidth:.0f} GB/s"
    )
    header = f"{'case':58s} {'ms':>9s} {'GB/s':>7s} {'% copy':>7s} {'Gexp/s':>7s} {'goal':>8s} {'peer':>8s}"
    print(header)
    rows = []
    for operator in OPERATORS:
        for case in import_module(f"gpu_{operator}").cases():
            if options.only not in case["name"]:
                continue
            with torch.inference_mode():
                ms = median_ms(case["make"]())
            gb_s = case["bytes"] / ms / 1e6
            exps = case.get("exps", 0) / ms / 1e6
            goal, peer = case.get("goal"), case.get("peer")
            print(
                f"{case['name']:58s} {ms:9.4f} {gb_s:7.0f} {100 * gb_s / bandwidth:6.0f}% {exps:7.0f} "
                f"{goal or 0:8.4f} {peer or 0:8.4f}",
                flush=True,
            )
            rows.append({"name": case["name"], "ms": ms, "gb_s": gb_s, "goal": goal, "peer": peer})
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps({"gpu": properties.name, "copy_gb_s": bandwidth, "rows": rows}))


if __name__ == "__main__":
    main()
