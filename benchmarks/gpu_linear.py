"""Checks and times the matrix products of one layer and of the head at the sizes of the 2.8b model.

    python benchmarks/gpu_linear.py [--only NAME] [--tokens 1,8,1024] [--bits 8,4] [--all] [--json FILE]

Every product is first compared with its exact sum: int8 operands must give the bits of the definition, float
tokens must stay within the operator's bound. It is then timed in one CUDA graph over copies of the weight,
which do not fit in the L2 cache together, and so is cuBLAS in fp16 beside it. `chosen` is the cut that the
backend takes, `best` the fastest of those tried; `--all` prints each.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_linear_cuts import (
    FEW_FLOAT_TILES,
    FEW_TILES,
    HEAD,
    HEAD_TOKENS,
    NARROW_TILES,
    PACKED_TOKENS,
    SHAPES,
    SKINNY,
    TILES,
    TOKENS,
    Shape,
)

from qmamba_cli.kernels._launch import require_device, sm_count
from qmamba_cli.kernels.decode.pack import pack_block
from qmamba_cli.kernels.decode.samples import SCALES, random_block
from qmamba_cli.kernels.decode.tensors import DecodeColumns
from qmamba_cli.kernels.linear import cuda, plan
from qmamba_cli.kernels.linear.float_cuda import float_tiles
from qmamba_cli.kernels.linear.int8_cuda import Epilogue, int8_linear
from qmamba_cli.kernels.linear.interleaved import Interleaved
from qmamba_cli.kernels.linear.operands import expand
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.kernels.linear.plan import SkinnyPlan, TilePlan
from qmamba_cli.modes import MODES
from qmamba_cli.quant.grid import quantize

_CACHE_BYTES = 160 << 20
_LEAST_COPIES, _MOST_COPIES = 6, 64
_ROUNDS, _REPLAYS = 3, 15
_GROUP = 128
_X_SCALE = 0.02


def graph_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call in microseconds, all calls in turn in one CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_ROUNDS):
            for call in calls:
                call()
    times = []
    for _ in range(_REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:]) * 1e3 / (_ROUNDS * len(calls))


def copies_of(nbytes: int) -> int:
    return max(_LEAST_COPIES, min(_MOST_COPIES, _CACHE_BYTES // max(nbytes, 1)))


def random_weights(shape: Shape, bits: int) -> list[torch.Tensor | PackedInt4]:
    rows, k = shape.rows, shape.k
    count = copies_of(rows * k * bits // 8)
    if bits == 8:
        return [torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda") for _ in range(count)]
    return [
        PackedInt4(
            codes=torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, device="cuda"),
            multiplier=torch.randint(1, 16, (rows, k // _GROUP), dtype=torch.uint8, device="cuda"),
            group_size=_GROUP,
            columns=k,
        )
        for _ in range(count)
    ]


def cuts(shape: Shape, tokens: int, packed: bool) -> Iterator[SkinnyPlan | TilePlan]:
    """The chosen cut first, then what else is tried."""
    processors = sm_count(torch.device("cuda", torch.cuda.current_device()))
    skinny = plan.is_skinny(tokens, shape.rows, shape.k, packed=packed, group_size=_GROUP)
    skinny_plan = plan.skinny_plan(tokens, shape.rows, shape.k, packed=packed)
    tile_plan = plan.tile_plan(tokens, shape.rows, shape.k, processors)
    yield skinny_plan if skinny else tile_plan
    if shape.split or (packed and tokens > 64):
        # The same kernels as the plain product's, and as that of int8 weights.
        return
    if tokens <= 64:
        for tiles in plan.SKINNY_TILES:
            fits = tiles[1] * 8 >= tokens and tiles[1] * 4 < max(tokens, 5)
            if tiles == (skinny_plan.row_tiles, skinny_plan.token_tiles) or fits:
                for warps, row_warps in SKINNY:
                    most = 320 if tiles[1] < 4 else 256
                    if 32 * warps * row_warps <= most:
                        yield SkinnyPlan(*tiles, warps, row_warps)
    if tokens > 1:
        yield tile_plan
        narrow = shape.rows < 1024 or shape.k < 1024
        for tile in FEW_TILES if tokens <= 64 else NARROW_TILES if narrow else TILES:
            if shape.k >= 1024 and shape.k % tile.columns:
                continue
            if shape.split % tile.rows == 0:
                yield tile
            if shape.rows < 1024 or (shape.k >= 4096 and tokens <= 1024):
                for parts in (2, 4):
                    yield TilePlan(tile.tokens, tile.rows, tile.columns, tile.warps, tile.stages, parts)


def projection_rows(shape: Shape, bits: int, tokens_list: Sequence[int], show_all: bool) -> Iterator[dict]:
    weights = random_weights(shape, bits)
    scale = (torch.rand(shape.rows, device="cuda") + 0.5) * 1e-3 / shape.k**0.5
    for tokens in tokens_list:
        x = torch.randint(-127, 128, (tokens, shape.k), dtype=torch.int8, device="cuda")
        residual = None if shape.int8 else torch.randn(tokens, shape.rows, device="cuda")
        split = shape.split if shape.int8 else shape.rows
        out_scale = 0.004 if shape.int8 else None
        real = torch.empty(tokens, split, device="cuda") if split else None
        codes = (
            torch.empty(tokens, shape.rows - split, dtype=torch.int8, device="cuda") if shape.int8 else None
        )
        end = Epilogue(
            weight_scale=scale,
            bias=None,
            residual=residual,
            real=real,
            codes=codes,
            x_scale=_X_SCALE,
            out_scale=out_scale,
            split=split,
        )
        dense = expand(weights[0]) if isinstance(weights[0], PackedInt4) else weights[0]
        y = exact(x, dense, scale)
        fp16 = fp16_us(tokens, shape.rows, shape.k)
        timed: list[tuple[float, Any]] = []
        for cut in dict.fromkeys(cuts(shape, tokens, bits == 4)):
            try:
                int8_linear(x, weights[0], end, plan=cut)
                right = (real is None or same(real, y[:, :split], residual, None)) and (
                    codes is None or same(codes, y[:, split:], None, out_scale)
                )
                calls = [partial(int8_linear, x, weight, end, plan=cut) for weight in weights]
                us = graph_us(calls)
            except Exception as error:
                print(f"    {shape.name} W{bits} M={tokens} {cut}: {type(error).__name__}: {str(error)[:90]}")
                torch.cuda.synchronize()
                continue
            if show_all or not right:
                print(f"    {shape.name} W{bits} M={tokens} {us:8.2f} us {'' if right else 'WRONG'} {cut}")
            if right:
                timed.append((us, cut))
        if timed:
            best = min(timed, key=lambda item: item[0])
            yield {
                "name": f"{shape.name} W{bits}",
                "tokens": tokens,
                "chosen_us": timed[0][0],
                "best_us": best[0],
                "best": str(best[1]),
                "fp16_us": fp16,
                "tops": 2e-6 * tokens * shape.rows * shape.k / timed[0][0],
                "weight_gb_s": 1e-3 * shape.rows * shape.k * bits / 8 / timed[0][0],
            }


def exact(x: torch.Tensor, dense: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 product of the definition; float64 holds every int32 sum."""
    acc = x.to(torch.float64) @ dense.to(torch.float64).T
    return acc.to(torch.int32).to(torch.float32) * (scale * _X_SCALE)


def same(got: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None, out_scale: float | None) -> bool:
    expected = y if residual is None else residual + y
    return torch.equal(got, expected if out_scale is None else quantize(expected, out_scale))


def fp16_us(tokens: int, rows: int, k: int) -> float:
    x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
    weights = [
        torch.randn(rows, k, device="cuda", dtype=torch.float16) for _ in range(copies_of(2 * rows * k))
    ]
    return graph_us([partial(torch.nn.functional.linear, x, weight) for weight in weights])


def expansion_rows() -> Iterator[dict]:
    for shape in SHAPES[:3:2]:
        weights = [weight for weight in random_weights(shape, 4) if isinstance(weight, PackedInt4)]
        assert torch.equal(expand(weights[0]), weights[0].expand()), "expand is not exact"
        us = graph_us([partial(expand, weight) for weight in weights])
        yield {
            "name": f"expand {shape.name} W4",
            "tokens": 0,
            "chosen_us": us,
            "weight_gb_s": 1.5e-3 * shape.rows * shape.k / us,
        }


def packed_rows(tokens_list: Sequence[int], bits: int) -> Iterator[dict]:
    """in_proj and out_proj as the decode kernels have them: read where they lie, or expanded first."""
    columns = DecodeColumns.from_mode(MODES["0"])
    sizes = {"d_model": 2560, "d_inner": 5120, "dt_rank": 160}
    blocks = [
        pack_block(random_block(**sizes, w_bits=bits, seed=i, device="cuda"), SCALES, columns, norm_eps=1e-5)
        for i in range(_LEAST_COPIES)
    ]
    for name in ("in_proj", "out_proj"):
        weights = [Interleaved(block=block, name=name) for block in blocks]
        rows, k = weights[0].shape
        dense = weights[0].expand()
        assert torch.equal(expand(weights[0]), dense), "expand is not exact"
        us = graph_us([partial(expand, weight) for weight in weights])
        moved = 1e-3 * rows * k * (1 + bits / 8)
        yield {
            "name": f"expand packed {name} W{bits}",
            "tokens": 0,
            "chosen_us": us,
            "weight_gb_s": moved / us,
        }
        scale = torch.rand(rows, device="cuda") * 1e-3 / k**0.5
        for tokens in tokens_list:
            x = torch.randint(-127, 128, (tokens, k), dtype=torch.int8, device="cuda")
            in_proj = name == "in_proj"
            end = Epilogue(
                weight_scale=scale,
                bias=None,
                residual=None if in_proj else torch.randn(tokens, rows, device="cuda"),
                real=None if in_proj else torch.empty(tokens, rows, device="cuda"),
                codes=torch.empty(tokens, rows, dtype=torch.int8, device="cuda") if in_proj else None,
                x_scale=_X_SCALE,
                out_scale=0.004 if in_proj else None,
                split=0 if in_proj else rows,
            )
            y = exact(x, dense, scale)
            timed = {}
            for direct in (True, False):
                int8_linear(x, weights[0], end, direct=direct)
                got = end.codes if in_proj else end.real
                assert same(got, y, end.residual, end.out_scale), f"{name} {tokens} {direct}"
                calls = [partial(int8_linear, x, weight, end, direct=direct) for weight in weights]
                timed["where it lies" if direct else "expanded"] = graph_us(calls)
            best = min(timed, key=lambda how: timed[how])
            yield {
                "name": f"{name} W{bits} packed",
                "tokens": tokens,
                "chosen_us": timed["where it lies"],
                "best_us": timed[best],
                "best": f"{best}; expanded: {timed['expanded']:.2f}",
                "tops": 2e-6 * tokens * rows * k / timed["where it lies"],
                "weight_gb_s": 1e-3 * rows * k * bits / 8 / timed["where it lies"],
            }


def few_float_cuts(
    x: torch.Tensor, table: torch.Tensor, scale: torch.Tensor | None
) -> Iterator[tuple[float, TilePlan]]:
    """Microseconds of the cuts of the head that are tried."""
    tokens = x.shape[0]
    if tokens > plan.MOST_FEW_TOKENS:
        return
    out = torch.empty(tokens, table.shape[0], device="cuda")
    for cut in FEW_FLOAT_TILES[next(most for most in FEW_FLOAT_TILES if most >= tokens)]:
        try:
            yield graph_us([partial(float_tiles, x, table, scale, None, out, cut)]), cut
        except Exception as error:
            print(f"    head M={tokens} {cut}: {type(error).__name__}: {str(error)[:90]}")
            torch.cuda.synchronize()


def head_rows(tokens_list: Sequence[int]) -> Iterator[dict]:
    rows, k = HEAD
    scale = (torch.rand(rows, device="cuda") + 0.5) / 73
    for dtype in (torch.int8, torch.float16):
        nbytes = rows * k * dtype.itemsize
        if dtype == torch.int8:
            tables = [torch.randint(-127, 128, HEAD, dtype=dtype, device="cuda") for _ in range(2)]
        else:
            tables = [torch.randn(HEAD, device="cuda").to(dtype) for _ in range(2)]
        row_scale = scale if dtype == torch.int8 else None
        for tokens in tokens_list:
            x = torch.randn(tokens, k, device="cuda")
            error = head_error(x, tables[0], row_scale)
            us = graph_us([partial(cuda.linear, x, table, weight_scale=row_scale) for table in tables])
            timed = list(few_float_cuts(x, tables[0], row_scale))
            best = min(timed, key=lambda item: item[0], default=(us, "chosen"))
            yield {
                "name": f"head {str(dtype).removeprefix('torch.')}, float32 tokens",
                "tokens": tokens,
                "chosen_us": us,
                "best_us": best[0],
                "best": f"{best[1]} {error:.1f} eps",
                "fp16_us": fp16_us(tokens, rows, k),
                "weight_gb_s": 1e-3 * nbytes / us,
            }


def head_error(x: torch.Tensor, table: torch.Tensor, scale: torch.Tensor | None) -> float:
    """Largest error, in float32 eps of the sum of absolute terms; the operator's bound is k + 1."""
    got = cuda.linear(x, table, weight_scale=scale).double()
    factor = 1.0 if scale is None else scale.double()
    worst = 0.0
    for start in range(0, table.shape[0], 8192):
        part = slice(start, start + 8192)
        w = table[part].double().T
        f = factor if isinstance(factor, float) else factor[part]
        bound = (x.double().abs() @ w.abs()) * f
        worst = max(worst, float(((got[:, part] - (x.double() @ w) * f).abs() / bound).max()))
    return worst / torch.finfo(torch.float32).eps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--tokens", default="", help="comma-separated numbers of tokens")
    parser.add_argument("--bits", default="8,4", help="comma-separated bits of the weights")
    parser.add_argument("--all", action="store_true", help="print every cut that is tried")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    require_device()
    wanted = [int(value) for value in options.tokens.split(",") if value]
    bits_wanted = {int(value) for value in options.bits.split(",")}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"{'product':32s} {'M':>5s} {'chosen':>9s} {'best':>9s} {'fp16':>9s} {'TOP/s':>6s} {'GB/s':>6s}")
    rows: list[dict] = []

    def report(row: dict) -> None:
        rows.append(row)
        cells = (row.get("chosen_us"), row.get("best_us"), row.get("fp16_us"))
        text = " ".join(f"{'' if value is None else f'{value:.2f}':>9s}" for value in cells)
        tops = f"{row['tops']:.0f}" if "tops" in row else ""
        extra = row.get("best", "")
        print(
            f"{row['name']:32s} {row['tokens']:5d} {text} {tops:>6s} {row['weight_gb_s']:6.0f}  {extra}",
            flush=True,
        )

    with torch.inference_mode():
        for shape in SHAPES:
            for bits in shape.bits:
                if options.only in f"{shape.name} W{bits}" and bits in bits_wanted:
                    for row in projection_rows(shape, bits, wanted or TOKENS, options.all):
                        report(row)
        if options.only in "expand" and 4 in bits_wanted:
            for row in expansion_rows():
                report(row)
        for bits in (8, 4):
            if bits in bits_wanted and (options.only in f"in_proj out_proj W{bits} packed"):
                for row in packed_rows(wanted or PACKED_TOKENS, bits):
                    report(row)
        if options.only in "head":
            for row in head_rows(wanted or HEAD_TOKENS):
                report(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
