"""What `selftest` checks: every operator at shapes of no convenient size."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from qmamba_cli.kernels.backend import Backend
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.kernels.decode import reference, samples
from qmamba_cli.kernels.decode.tensors import DecodeColumns
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.modes import ScanOrder
from qmamba_cli.stages.selftest_case import Case, Exactness

_SEED = 20250
# Errors of float32 arithmetic are counted in this unit, relative to the largest value of the output.
_EPS = float(torch.finfo(torch.float32).eps)


def cases() -> list[Case]:
    """The cases, small enough for the reference to take seconds, with shapes of no convenient size."""
    generator = torch.Generator().manual_seed(_SEED)
    return [
        *_norm_cases(generator),
        *_hadamard_cases(generator),
        *_grid_cases(generator),
        *_table_cases(generator),
        *_linear_cases(generator),
        *_conv_cases(generator),
        *_scan_cases(generator),
        *_decode_cases(generator),
    ]


def _norm_cases(generator: torch.Generator) -> Iterator[Case]:
    x = torch.randn(3, 129, 1536, generator=generator)
    yield Case(
        operator="rms_norm",
        variant="f32 to i8, d_model 1536",
        exactness=Exactness.GRID,
        budget=1e-3,
        call=lambda ops, t: ops.rms_norm(t["x"], None, eps=1e-5, out_scale=0.03),
        inputs={"x": x},
        bytes=5 * x.numel(),
    )


def _hadamard_cases(generator: torch.Generator) -> Iterator[Case]:
    for width, rows in ((512, 1024), (1536, 1024), (5120, 512), (90, 513)):
        y = torch.randn(rows, width, generator=generator)
        yield Case(
            operator="hadamard",
            variant=f"f32 to i8, n {width}",
            exactness=Exactness.GRID,
            budget=1e-3,
            call=lambda ops, t: ops.hadamard(t["y"], out_scale=0.03),
            inputs={"y": y},
            bytes=5 * y.numel(),
        )
        yield Case(
            operator="hadamard",
            variant=f"f16 to i8, n {width}",
            exactness=Exactness.GRID,
            budget=1e-3,
            call=lambda ops, t: ops.hadamard(t["y"], out_scale=0.03),
            inputs={"y": y.to(torch.float16)},
            bytes=3 * y.numel(),
        )
        yield Case(
            operator="hadamard",
            variant=f"f32 to f32, n {width}",
            exactness=Exactness.REAL,
            budget=200 * _EPS,
            call=lambda ops, t: ops.hadamard(t["y"]),
            inputs={"y": y},
            bytes=8 * y.numel(),
        )


def _grid_cases(generator: torch.Generator) -> Iterator[Case]:
    x = torch.randn(3, 257, 1536, generator=generator).transpose(1, 2)
    for name, half, size in (("f32", torch.float32, 5), ("f16", torch.float16, 3)):
        yield Case(
            operator="quantize",
            variant=f"{name} to i8",
            exactness=Exactness.EXACT,
            budget=0.0,
            call=lambda ops, t: ops.quantize(t["x"], 0.03),
            inputs={"x": x.to(half)},
            bytes=size * x.numel(),
        )
    yield Case(
        operator="quantize_per_token",
        variant="f32 to i8, a scale a token",
        exactness=Exactness.EXACT,
        budget=0.0,
        call=lambda ops, t: ops.quantize_per_token(t["x"])[0],
        inputs={"x": x},
        bytes=5 * x.numel(),
    )
    yield Case(
        operator="dequantize",
        variant="i8 to f32",
        exactness=Exactness.EXACT,
        budget=0.0,
        call=lambda ops, t: ops.dequantize(t["q"], 0.03),
        inputs={"q": _codes((3, 257, 1536), generator)},
        bytes=5 * x.numel(),
    )


def _table_cases(generator: torch.Generator) -> Iterator[Case]:
    vocab, width, tokens = 5003, 1536, 65
    table = {
        "table": _codes((vocab, width), generator),
        "scale": torch.rand(vocab, generator=generator) * 0.01 + 1e-4,
    }
    yield Case(
        operator="embedding",
        variant="rows of i8 to f32",
        exactness=Exactness.EXACT,
        budget=0.0,
        call=lambda ops, t: ops.embedding(t["ids"], t["table"], t["scale"]),
        inputs={"ids": torch.randint(0, vocab, (tokens,), generator=generator), **table},
        bytes=5 * tokens * width,
    )
    # Rounded, so that values recur.
    logits = torch.randn(3, 50_281, generator=generator).mul(4).round()
    yield Case(
        operator="argmax",
        variant="f32, n 50281",
        exactness=Exactness.EXACT,
        budget=0.0,
        call=lambda ops, t: ops.argmax(t["x"]),
        inputs={"x": logits},
        bytes=4 * logits.numel(),
    )
    x = torch.randn(tokens, width, generator=generator)
    yield Case(
        operator="unrotate",
        variant=f"f32, n {width}",
        exactness=Exactness.REAL,
        budget=200 * _EPS,
        call=lambda ops, t: ops.unrotate(t["x"]),
        inputs={"x": x},
        bytes=8 * x.numel(),
    )
    for rows in (1, 4, tokens):
        yield Case(
            operator="linear",
            variant=f"f32 times i8 rows, {rows} x {width} x {vocab}",
            exactness=Exactness.REAL,
            budget=200 * _EPS,
            call=lambda ops, t: ops.linear(t["x"], t["table"], weight_scale=t["scale"]),
            inputs={"x": x[:rows].contiguous(), **table},
            bytes=vocab * width + 4 * rows * (vocab + width),
        )


def _linear_cases(generator: torch.Generator) -> Iterator[Case]:
    for tokens, k, rows in ((1, 2560, 10240), (5, 96, 200), (257, 1536, 80), (1024, 768, 3072)):
        inputs = {
            "x": _codes((tokens, k), generator),
            "weight": _codes((rows, k), generator),
            "scale": torch.rand(rows, generator=generator) * 0.01 + 1e-4,
        }
        yield Case(
            operator="linear",
            variant=f"i8 to f32, {tokens} x {k} x {rows}",
            exactness=Exactness.EXACT,
            budget=0.0,
            call=lambda ops, t: ops.linear(t["x"], t["weight"], x_scale=0.02, weight_scale=t["scale"]),
            inputs=inputs,
            bytes=tokens * k + rows * k + 4 * tokens * rows,
        )
    for tokens, k, rows in ((513, 640, 2064), (513, 160, 1024), (1025, 2048, 80)):
        yield Case(
            operator="linear",
            variant=f"i8 to i8, {tokens} x {k} x {rows}",
            exactness=Exactness.EXACT,
            budget=0.0,
            call=lambda ops, t: ops.linear(
                t["x"], t["weight"], x_scale=0.02, weight_scale=t["scale"], out_scale=0.3
            ),
            inputs={
                "x": _codes((tokens, k), generator),
                "weight": _codes((rows, k), generator),
                "scale": torch.rand(rows, generator=generator) * 0.01 + 1e-4,
            },
            bytes=tokens * k + rows * k + tokens * rows,
        )
    yield from _packed_cases(generator)


def _packed_cases(generator: torch.Generator) -> Iterator[Case]:
    """W4 weights: four bits in memory, expanded by the operator."""
    rows, k, group = 3072, 768, 128
    weight = {
        "codes": torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, generator=generator),
        "multiplier": torch.randint(1, 16, (rows, k // group), dtype=torch.uint8, generator=generator),
        "scale": torch.rand(rows, generator=generator) * 0.001 + 1e-5,
    }

    def packed(t: dict[str, torch.Tensor]) -> PackedInt4:
        return PackedInt4(codes=t["codes"], multiplier=t["multiplier"], group_size=group, columns=k)

    def product(ops: Backend, t: dict[str, torch.Tensor]) -> torch.Tensor:
        return ops.linear(t["x"], packed(t), x_scale=0.02, weight_scale=t["scale"], residual=t["residual"])

    def halves(ops: Backend, t: dict[str, torch.Tensor]) -> torch.Tensor:
        first, rest = ops.linear_split(
            t["x"], packed(t), split=rows // 2, x_scale=0.02, weight_scale=t["scale"], out_scale=0.05
        )
        return torch.cat([first, ops.dequantize(rest, 0.05)], dim=-1)

    for tokens in (1, 40, 300):
        inputs = {
            "x": _codes((tokens, k), generator),
            "residual": torch.randn(tokens, rows, generator=generator),
            **weight,
        }
        size = tokens * (k + 8 * rows) + rows * k // 2
        for operator, variant, call in (
            ("linear", "W4 added to the residual", product),
            ("linear_split", "W4 to f32 and i8", halves),
        ):
            yield Case(
                operator=operator,
                variant=f"{variant}, {tokens} x {k} x {rows}",
                exactness=Exactness.EXACT,
                budget=0.0,
                call=call,
                inputs=inputs,
                bytes=size,
            )


def _conv_cases(generator: torch.Generator) -> Iterator[Case]:
    b, d, length, w = 3, 1536, 257, 4
    inputs = {
        "x": _codes((b, length, d), generator).transpose(1, 2),
        "weight": _codes((d, w), generator),
        "scale": torch.rand(d, generator=generator) * 0.002 + 1e-4,
        "bias": torch.randn(d, generator=generator) * 0.1,
        "state": _codes((b, d, w - 1), generator),
        "token_scale": torch.rand(b, length, generator=generator) * 0.05 + 1e-3,
        "state_scale": torch.rand(b, w - 1, generator=generator) * 0.05 + 1e-3,
    }

    def conv(
        *, dynamic: bool = False, out_scale: float | None = None, of_both: int | None = None
    ) -> Callable[[Backend, dict[str, torch.Tensor]], torch.Tensor]:
        def call(ops: Backend, t: dict[str, torch.Tensor]) -> torch.Tensor:
            operator: Callable[..., Any] = ops.causal_conv1d if of_both is None else ops.causal_conv1d_both
            outs: tuple[torch.Tensor, ...] = operator(
                *(t["x"], t["weight"], t["bias"]),
                x_scale=t["token_scale"] if dynamic else 0.03,
                weight_scale=t["scale"],
                out_scale=out_scale,
                state=ConvState(t["state"], t["state_scale"] if dynamic else None),
            )
            return outs[of_both or 0]

        return call

    real, grid = (Exactness.REAL, 20 * _EPS), (Exactness.GRID, 1e-3)
    for variant, (exactness, budget), call, size in (
        ("i8 to i8", grid, conv(out_scale=0.05), 2),
        ("i8 to f32", real, conv(), 5),
        ("i8 with a scale a token, to f32", real, conv(dynamic=True), 5),
        ("i8 to f32 and i8: the i8", grid, conv(out_scale=0.05, of_both=1), 6),
        ("the same with a scale a token: the f32", real, conv(dynamic=True, out_scale=0.05, of_both=0), 6),
    ):
        yield Case(
            operator="causal_conv1d_both" if size == 6 else "causal_conv1d",
            variant=variant,
            exactness=exactness,
            budget=budget,
            call=call,
            inputs=inputs,
            bytes=size * b * d * length,
        )


def _scan_cases(generator: torch.Generator) -> Iterator[Case]:
    b, d, length, n = 2, 768, 321, 16
    inputs = {
        "u": _codes((b, length, d), generator).transpose(1, 2),
        "v": torch.randn(b, length, d, generator=generator).transpose(1, 2),
        "dt": _codes((b, length, d), generator).transpose(1, 2),
        "z": _codes((b, length, d), generator).transpose(1, 2),
        "B": _codes((b, length, n), generator).transpose(1, 2),
        "C": _codes((b, length, n), generator).transpose(1, 2),
        "A": -torch.arange(1, n + 1, dtype=torch.float32).expand(d, n).contiguous(),
        "D": torch.randn(d, generator=generator),
        "dt_bias": torch.randn(d, generator=generator) - 3,
        "state": _codes((b, d, n), generator),
    }

    def scan(
        order: ScanOrder, u: str, requantize: bool
    ) -> Callable[[Backend, dict[str, torch.Tensor]], torch.Tensor]:
        return lambda ops, t: (
            ops.selective_scan(
                t[u],
                t["dt"],
                t["A"],
                t["B"],
                t["C"],
                t["D"],
                t["z"],
                t["dt_bias"],
                order=order,
                u_scale=0.02,
                requantize_u=requantize,
                dt_scale=0.02,
                b_scale=0.02,
                c_scale=0.02,
                z_scale=0.02,
                state=t["state"],
                state_scale=0.01,
            ).y
        )

    for order in ScanOrder:
        for name, u, requantize in (
            ("int8 u", "u", False),
            ("fp32 u", "v", False),
            ("requantized u", "v", True),
        ):
            yield Case(
                operator="selective_scan",
                variant=f"{order}, {name}",
                exactness=Exactness.REAL,
                budget=100 * _EPS,
                call=scan(order, u, requantize),
                inputs=inputs,
                bytes=(6 + (1 if u == "u" else 4)) * b * d * length,
            )


def _codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def _decode_cases(generator: torch.Generator) -> Iterator[Case]:
    """The fused step of one token; int8 values inside it may fall one step off."""
    d_model = 768
    chains = ((2, 1), (1, 2))  # rows, blocks
    for (batch, blocks), (w_bits, dynamic) in product(chains, ((8, False), (4, False), (4, True))):
        residual = torch.randn(batch, d_model, generator=generator)
        columns = DecodeColumns(dynamic_input=dynamic, true_u=dynamic, int8_state=not dynamic)
        scale = "a scale a token" if dynamic else "one scale"
        yield Case(
            operator="decode_block",
            variant=f"W{w_bits}A8, {scale}, {batch} rows, {blocks} deep",
            exactness=Exactness.REAL,
            budget=1e-3,
            call=lambda _ops, step: step(),
            inputs={"residual": residual},
            bytes=blocks * 6 * d_model**2 * w_bits // 8,
            prepare=partial(_decode_step, blocks=blocks, w_bits=w_bits, columns=columns),
        )


def _decode_step(
    ops: Backend, t: dict[str, torch.Tensor], *, blocks: int, w_bits: int, columns: DecodeColumns
) -> Callable[[], torch.Tensor]:
    """The residual after equal blocks; a later call goes on from the states that the last one left."""
    given = t["residual"]
    (batch, d_model), d_inner = given.shape, 2 * given.shape[1]
    block = samples.random_block(d_model=d_model, d_inner=d_inner, dt_rank=48, w_bits=w_bits, seed=_SEED)
    state = partial(samples.random_state, batch=batch, d_inner=d_inner, columns=columns)
    states = [state(seed=_SEED + i) for i in range(blocks)]
    if ops.name == "cpu":

        def on_cpu() -> torch.Tensor:
            residual = given.clone()
            for its in states:
                reference.decode_block(block, samples.SCALES, columns, residual, its, norm_eps=1e-5)
            return residual

        return on_cpu
    from qmamba_cli.kernels.decode import cuda
    from qmamba_cli.kernels.decode.pack import pack_block

    packed = pack_block(samples.to_device(block, ops.device), samples.SCALES, columns, norm_eps=1e-5)
    scratch, on_gpu = cuda.make_scratch(packed, batch), [samples.to_device(s, ops.device) for s in states]

    def step() -> torch.Tensor:
        residual = given.clone()
        for layer, its in enumerate(on_gpu):
            after, last = packed if layer else None, layer == blocks - 1
            cuda.decode_block(packed, residual, its, scratch, layer=layer, after=after, last=last)
        return residual

    return step
