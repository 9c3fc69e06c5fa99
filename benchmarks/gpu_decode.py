"""Times the fused decode step of whole models on a GPU: every layer its own weights, one CUDA graph a token.

Each case is compared with the reference first (3 tokens, 2 layers, every layer from the reference's input).

    python benchmarks/gpu_decode.py --shape 2.8b --shape 130m
    python benchmarks/gpu_decode.py --shape 2.8b --w-bits 4 --sweep
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels._source import COMPILE_OPTIONS, kernel_source
from qmamba_cli.kernels.decode import cuda, reference
from qmamba_cli.kernels.decode.pack import PackedBlock, pack_block
from qmamba_cli.kernels.decode.plan import DecodePlan, make_plan
from qmamba_cli.kernels.decode.samples import SCALES, random_block, random_state, to_device
from qmamba_cli.kernels.decode.steps import launch_steps, steps
from qmamba_cli.kernels.decode.tensors import DecodeColumns, DecodeState
from qmamba_cli.kernels.decode.unpack import unpack_block
from qmamba_cli.modes import MODES

# Name: d_model, layers.
SHAPES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
COPY_GB_S = 4272.0  # one NVIDIA H200
NORM_EPS = 1e-5
REPLAYS = 60
# Keyword arguments of make_plan, each varied by itself, and fields of a plan to replace.
SWEEP: tuple[dict[str, int], ...] = (
    {"in_warps": 10},
    {"in_warps": 15},
    {"out_warps": 8},
    {"out_warps": 10},
    {"out_warps": 14},
    {"in_slice": 1},
    {"in_slice": 99},
    {"out_slice": 1},
    {"in_slice": 1, "out_slice": 1},
    {"max_rotated": 0},
    {"max_rotated": 8},
    {"columns": False},
)
REPLACED: tuple[dict[str, int], ...] = (
    {"counted": True},
    {"counted": False},
    {"overlap": False},
    {"copies": 2},
    {"copies": 4},
    {"in_least": 115728},
)
# Places that decode_turn.cuh's STAMP marks, after the start of a kernel.
PLACES = {
    "decode_in": ("turn", "norm", "weights", "product", "conv", "x_proj", "counted"),
    "decode_conv": ("turn", "conv and x_proj", "counted"),
    "decode_scan": ("turn", "x_proj summed", "scan", "H_HK", "counted"),
    "decode_rotate": ("turn", "S_128", "counted"),
    "decode_out": ("turn", "S_128", "weights", "product", "residual", "counted"),
    "decode_out_columns": ("turn", "S_128", "weights", "product", "counted"),
}


def sizes_of(shape: str) -> dict[str, Any]:
    d_model, _ = SHAPES[shape]
    return {"d_model": d_model, "d_inner": 2 * d_model, "dt_rank": -(-d_model // 16)}


class Model:
    """All layers of a model with random weights, and their state."""

    def __init__(self, shape: str, w_bits: int, columns: DecodeColumns) -> None:
        self.sizes, self.columns = sizes_of(shape), columns
        self.layers: list[PackedBlock] = []
        for layer in range(SHAPES[shape][1]):
            tensors = random_block(w_bits=w_bits, seed=layer, device="cuda", **self.sizes)
            self.layers.append(pack_block(tensors, SCALES, columns, norm_eps=NORM_EPS))

    def states(self, batch: int) -> list[DecodeState]:
        return [
            random_state(
                batch=batch, d_inner=self.sizes["d_inner"], columns=self.columns, seed=i, device="cuda"
            )
            for i in range(len(self.layers))
        ]

    def step(
        self, batch: int, plan: DecodePlan | None = None, only: str = ""
    ) -> tuple[Callable[[], None], torch.Tensor, int]:
        """One token of all layers, its residual, and the bytes it must move."""
        states = self.states(batch)
        plan = plan or cuda.default_plan(self.layers[0], batch)
        scratch = cuda.make_scratch(self.layers[0], batch, plan)
        rng = torch.Generator(device="cuda").manual_seed(1)
        residual = torch.randn(batch, self.sizes["d_model"], generator=rng, device="cuda")

        def run() -> None:
            for layer, (packed, state) in enumerate(zip(self.layers, states, strict=True)):
                after, last = self.layers[layer - 1] if layer else None, layer == len(self.layers) - 1
                if not only:
                    cuda.decode_block(
                        packed, residual, state, scratch, plan=plan, layer=layer, after=after, last=last
                    )
                    continue
                for step in steps(packed, residual, state, scratch, plan, after=after, last=last):
                    if step.entry.partition("<")[0] == only:
                        launch_steps(cuda.SOURCE, [step], residual.device, overlap=plan.overlap)

        moved = sum(packed.nbytes() for packed in self.layers)
        moved += 2 * sum(state.ssm.nbytes + state.conv.values.nbytes for state in states)
        return run, residual, moved


def check(shape: str, w_bits: int, columns: DecodeColumns, batch: int) -> str:
    """Largest relative errors of the residual's increment and the state, and shares of int8 values off."""
    sizes = sizes_of(shape)
    blocks = [random_block(w_bits=w_bits, seed=layer, **sizes) for layer in range(2)]
    packed = [pack_block(to_device(block, "cuda"), SCALES, columns, norm_eps=NORM_EPS) for block in blocks]
    states = [random_state(batch=batch, d_inner=sizes["d_inner"], columns=columns, seed=i) for i in range(2)]
    scratch = cuda.make_scratch(packed[0], batch)
    rng = torch.Generator().manual_seed(2)
    worst_residual = worst_state = conv_off = 0.0
    for _ in range(3):
        residual = torch.randn(batch, sizes["d_model"], generator=rng)
        for block, fused, state in zip(blocks, packed, states, strict=True):
            got, got_state, before = residual.cuda(), to_device(state, "cuda"), residual.clone()
            cuda.decode_block(fused, got, got_state, scratch)
            reference.decode_block(block, SCALES, columns, residual, state, norm_eps=NORM_EPS)
            worst_residual = max(worst_residual, relative(got.cpu() - before, residual - before))
            worst_state = max(worst_state, relative(got_state.ssm.cpu().float(), state.ssm.float()))
            off = (got_state.conv.values.cpu() != state.conv.values).float().mean()
            conv_off = max(conv_off, float(off))
    if worst_residual > 0.03 or worst_state > 0.03 or conv_off > 0.002:
        raise SystemExit(
            f"wrong: residual {worst_residual:.1e}, state {worst_state:.1e}, conv {conv_off:.1e} ({shape}, "
            f"W{w_bits}, {columns}, batch {batch})"
        )
    return f"checked: residual {worst_residual:.0e} state {worst_state:.0e} conv {conv_off:.0e}"


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def median_us(run: Callable[[], None]) -> tuple[float, float]:
    """Median and smallest time of a replay of the captured call."""
    replay = captured(run)
    times = []
    for repeat in range(REPLAYS + 5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        if repeat >= 5:
            times.append(start.elapsed_time(stop) * 1e3)
    return sorted(times)[len(times) // 2], min(times)


def same_bits(model: Model, batch: int) -> bool:
    """Whether overlapping and counted launches give the bits of launches that wait for each other's ends."""
    results = []
    for overlap, counted in ((True, True), (False, False), (True, False), (True, True)):
        plan = replace(cuda.default_plan(model.layers[0], batch), overlap=overlap, counted=counted)
        run, residual, _ = model.step(batch, plan)
        for _ in range(3):
            run()
        results.append(residual.clone())
    return all(torch.equal(results[0], other) for other in results[1:])


def variants(packed: PackedBlock, batch: int) -> Iterator[tuple[str, DecodePlan]]:
    memory = cuda.shared_memory(packed.device)
    for options in SWEEP:
        yield describe(options), make_plan(packed, batch, memory, **options)
    for changed in REPLACED:
        fields: dict[str, Any] = dict(changed)
        yield describe(changed), replace(make_plan(packed, batch, memory), **fields)


@cache
def stamped() -> tuple[Any, dict[str, Any]]:
    """The kernels with their marks: the array of stamps, and the instances."""
    import cupy
    import numpy as np

    code = "#define DECODE_STAMPS\n" + kernel_source(cuda.SOURCE)
    module = cupy.RawModule(
        code=code, options=COMPILE_OPTIONS, name_expressions=cuda.ENTRIES, backend="nvrtc"
    )
    kernels = {entry: module.get_function(entry) for entry in cuda.ENTRIES}
    return cupy.ndarray(
        (len(PLACES), 128, 16), dtype=np.int64, memptr=module.get_global("decode_stamps")
    ), kernels


def phases(model: Model, batch: int) -> None:
    """Print where the last layer's kernels spend their time, median over blocks and replays.

    Cycles are between marks of a block's first thread; times are of the device's clock, from the last
    layer's first decode_in block on, before which decode_out_columns of the layer before mostly runs.
    """
    import cupy
    import numpy as np

    buffer, kernels = stamped()
    buffer.fill(0)
    plain = _launch._kernel
    _launch._kernel = lambda _source, entry, _device: kernels[entry]
    _launch._prefer_shared.cache_clear()
    try:
        run, _, _ = model.step(batch)
        replay = captured(run)
        seen = []
        for _ in range(20):
            replay()
            torch.cuda.synchronize()
            seen.append(cupy.asnumpy(buffer))
    finally:
        _launch._kernel = plain
        _launch._prefer_shared.cache_clear()
    stamps = np.stack(seen)  # (replays, kernel, block, place)
    for kernel, (entry, places) in enumerate(PLACES.items()):
        ours = stamps[:, kernel]
        used = ours[..., 0] != 0
        if not used.any():
            continue
        cycles = np.diff(ours[..., : len(places) + 1], axis=-1)[used]
        times = (ours[..., 13:] - stamps[:, 0, :, 13].min(axis=1)[:, None, None]) / 1e3
        start, turn, end = (np.median(times[..., i][used]) for i in range(3))
        steps_of = ", ".join(
            f"{place} {median:.0f}" for place, median in zip(places, np.median(cycles, axis=0), strict=True)
        )
        latest = np.median(np.where(used, times[..., 2], -np.inf).max(axis=1))
        print(
            f"    {entry}: starts {start:.2f}, turn {turn:.2f}, ends {end:.2f} (last {latest:.2f}) us; "
            f"cycles: {steps_of}",
            flush=True,
        )


def time_unpacking(model: Model) -> None:
    """Print the time of unpacking a layer's matrices and its share of the copy bandwidth."""
    d_model, d_inner = model.sizes["d_model"], model.sizes["d_inner"]
    matrices = [
        torch.empty(shape, dtype=torch.int8, device="cuda")
        for shape in ((2 * d_inner, d_model), (d_model, d_inner))
    ]

    def run() -> None:
        for packed in model.layers:
            unpack_block(packed, *matrices)

    # A copy reads and writes: COPY_GB_S counts both.
    moved = sum(matrix.nbytes for matrix in matrices)
    moved += sum(m.weight.nbytes for m in (model.layers[0].in_proj, model.layers[0].out_proj))
    median = median_us(run)[0] / len(model.layers)
    print(f"    unpack: {median:.2f} us/layer, {100 * moved / COPY_GB_S / 1e3 / median:.0f}% of a copy")


def describe(options: dict[str, int]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--w-bits", action="append", type=int, choices=(4, 8))
    parser.add_argument("--mode", action="append", choices=[name for name in MODES if name != "fp"])
    parser.add_argument("--batch", action="append", type=int, choices=range(1, 9))
    parser.add_argument("--sweep", action="store_true", help="time many plans of each case")
    parser.add_argument("--parts", action="store_true", help="also time each kernel of all layers by itself")
    parser.add_argument("--phases", action="store_true", help="also print where the last layer's time goes")
    parser.add_argument("--unpack", action="store_true", help="also time unpacking all layers")
    parser.add_argument(
        "--own-carveout", action="store_true", help="leave each kernel's share of shared memory to the driver"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    if options.own_carveout:
        _launch._prefer_shared = cache(lambda *_: None)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, overlap {_launch._can_overlap(0)}")
    rows = []
    for shape, w_bits, mode in product(
        options.shape or ["2.8b", "130m"], options.w_bits or [4, 8], options.mode or ["0", "3"]
    ):
        columns = DecodeColumns.from_mode(MODES[mode])
        model = Model(shape, w_bits, columns)
        layers = len(model.layers)
        for batch in options.batch or [1, 8]:
            label = f"{shape} W{w_bits} mode {mode} b={batch}"
            print(f"{label}: {check(shape, w_bits, columns, batch)}, same bits {same_bits(model, batch)}")
            plans: list[tuple[str, DecodePlan]] = [("default", cuda.default_plan(model.layers[0], batch))]
            if options.sweep:
                plans += variants(model.layers[0], batch)
            for name, plan in plans:
                run, _, moved = model.step(batch, plan)
                median, least = median_us(run)
                floor = moved / COPY_GB_S / 1e3
                print(
                    f"  {median / layers:7.2f} us/layer {median / 1e3:7.3f} ms (least {least / 1e3:.3f}), "
                    f"{100 * floor / median:3.0f}% of {floor / 1e3:.3f} ms, {name}",
                    flush=True,
                )
                rows.append({"case": label, "plan": name, "us": median, "floor_us": floor})
            for part in (
                (
                    "decode_in",
                    "decode_conv",
                    "decode_scan",
                    "decode_rotate",
                    "decode_out",
                    "decode_out_columns",
                )
                if options.parts
                else ()
            ):
                run, _, _ = model.step(batch, None, part)
                if part == "decode_conv" and not columns.dynamic_input:
                    continue
                print(f"    {part} alone: {median_us(run)[0] / layers:.2f} us/layer", flush=True)
            if options.phases:
                phases(model, batch)
        if options.unpack:
            time_unpacking(model)
        del model
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(
            json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
