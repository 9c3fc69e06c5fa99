"""Times every way to launch the CUDA scan on this machine's GPU, each checked first.

    python benchmarks/gpu_scan_variants.py [--only NAME] [--dtype int8|float16]

A line is one `LaunchConfig`, fastest first; `*` marks what `cuda.plan` takes. All outputs are compared
with those of the first walk. Timed as in gpu.py.
"""

import argparse
from collections.abc import Iterator
from unittest.mock import patch

import torch
from gpu import captured, median_ms
from gpu_cases import D_STATE, SCAN_SHAPES, scan_call

from qmamba_cli.kernels._launch import sm_count
from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.kernels.selective_scan import cuda
from qmamba_cli.modes import ScanOrder

# Of the largest output; two orders of the sums differ by less.
_TOLERANCE = 1e-5


def variants(types: str) -> Iterator[cuda.LaunchConfig]:
    """Both walks of 16 states, and every instance of lanes with every size of block that fits."""
    for states, lanes in ((8, 2), (4, 4)):
        yield cuda.LaunchConfig(
            entry=f"selective_scan_walk<{types}, {states}, {lanes}>",
            threads=128,
            channels=128 // lanes,
            lanes_per_channel=lanes,
        )
    gpu = cuda.gpu_of(torch.device("cuda", torch.cuda.current_device()))
    for lanes in (8, 16):
        entry, shared = f"selective_scan_lanes<{types}, {lanes}>", cuda.lanes_shared_bytes(lanes, types)
        for warps in range(1, 11):
            channels = warps * 32 // lanes
            if entry in cuda.ENTRIES and shared <= gpu.block_shared_bytes and channels % 4 == 0:
                yield cuda.LaunchConfig(
                    entry=entry,
                    threads=(warps + 2) * 32,
                    channels=channels,
                    lanes_per_channel=lanes,
                    shared_bytes=shared,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="shapes whose name holds this text")
    parser.add_argument("--dtype", default="int8", choices=("int8", "float16"), help="of the operands")
    options = parser.parse_args()
    ops, dtype = select_backend("cuda"), getattr(torch, options.dtype)
    types = ", ".join(2 * [cuda.TYPE_NAMES[dtype]])
    print(torch.cuda.get_device_name(), sm_count(torch.device("cuda", torch.cuda.current_device())))
    for e, b, length, _, goal, peer in SCAN_SHAPES:
        name = f"e={e} b={b} l={length}"
        if options.only not in name:
            continue
        with torch.inference_mode():
            run = scan_call(e, b, length, ScanOrder.CHUNKED, dtype)(ops)
            gpu = cuda.gpu_of(torch.device("cuda", torch.cuda.current_device()))
            chosen = cuda.plan(b, e, length, D_STATE, ScanOrder.CHUNKED, types=types, gpu=gpu)
            rows, expected = [], None
            for config in variants(types):
                with patch.object(cuda, "plan", lambda *_, config=config, **__: config):
                    try:
                        y = run().y.float()
                        expected = y if expected is None else expected
                        error = float((y - expected).abs().max() / expected.abs().max())
                        rows.append((median_ms(captured(run)), error, config))
                    except Exception as refused:  # one launch that fails must not hide the others
                        print(f"  {config.entry} {config.threads}: {refused}")
        print(f"{name}, {options.dtype}: goal {goal}, fp16 peer {peer}")
        for ms, error, config in sorted(rows, key=lambda row: row[0])[:14]:
            wrong = "" if error <= _TOLERANCE or dtype != torch.int8 else "  WRONG"
            mark = "*" if config == chosen else " "
            shape = f"{config.threads:4d} threads {config.channels:3d} channels"
            print(f"{mark} {ms:8.4f} ms  {config.entry:52s} {shape}  error {error:.1e}{wrong}", flush=True)


if __name__ == "__main__":
    main()
