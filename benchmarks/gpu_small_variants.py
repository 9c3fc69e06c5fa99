"""Times layouts of the small kernels side by side, each checked against the reference first.

    python benchmarks/gpu_small_variants.py [--only NAME] [--json FILE]

A line is one layout of one shape: convolution, Hadamard transform, RMSNorm, quantization. The layout that the
operator chooses by itself is marked. Timing is that of `gpu.py`. If a kernel leaves its exactness class, the
line says so, and the exit code is 1.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gpu import captured, copy_gb_s, median_ms

from qmamba_cli.kernels._launch import sm_count
from qmamba_cli.kernels.causal_conv1d import cuda as conv
from qmamba_cli.kernels.causal_conv1d import reference as conv_reference
from qmamba_cli.kernels.hadamard import cuda as hadamard
from qmamba_cli.kernels.hadamard import reference as hadamard_reference
from qmamba_cli.kernels.hadamard.matrix import plan_for
from qmamba_cli.kernels.quantize import cuda as quantize
from qmamba_cli.kernels.quantize import reference as quantize_reference
from qmamba_cli.kernels.rms_norm import cuda as norm
from qmamba_cli.kernels.rms_norm import reference as norm_reference
from qmamba_cli.quant.grid import reciprocal

_OUT_SCALE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One line.

    Attributes:
        name: operator, grids, shape and layout.
        run: the call that is timed, returning what is compared.
        expected: what the reference gives.
        bytes: bytes read and written at least once.
        default: whether it is what the operator chooses.
    """

    name: str
    run: Callable[[], torch.Tensor]
    expected: torch.Tensor
    bytes: int
    default: bool


def within_class(got: torch.Tensor, expected: torch.Tensor) -> str:
    """Nothing, or how the result leaves its class."""
    difference = (got.float() - expected.float()).abs()
    worst = float(difference.max())
    if got.dtype == torch.int8:
        share = float((difference > 0).float().mean())
        return (
            "" if worst <= 1 and share <= 1e-3 else f"{worst:.0f} steps off, {share:.2%} of the elements off"
        )
    allowed = 1e-5 if got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps
    relative = worst / float(expected.float().abs().max())
    return "" if relative <= allowed else f"off by {relative:.1e} of the largest"


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")


def conv_variants() -> Iterator[Variant]:
    for e, b, length in ((5120, 1, 1024), (5120, 1, 2048), (5120, 8, 1024), (1536, 1, 1024), (1536, 8, 1024)):
        x = _codes(b, length, 2 * e).transpose(1, 2)[:, :e]
        weight, scale = _codes(e, 4), torch.rand(e, device="cuda") * 0.002 + 1e-4
        operands = (x, weight, torch.randn(e, device="cuda") * 0.1, 0.03, scale)
        for out_scale in (_OUT_SCALE, None):
            expected, _ = conv_reference.causal_conv1d(
                *operands[:3], x_scale=0.03, weight_scale=scale, out_scale=out_scale
            )
            name = f"conv i8 to {'f32' if out_scale is None else 'i8'}, e={e} b={b} l={length}"
            dtype = torch.float32 if out_scale is None else torch.int8
            chosen = conv._config(x, True, True, dtype)
            for config in _conv_configs(b, e, length, wide=out_scale is not None):
                yield Variant(
                    name=f"{name}, quads {config.quads} span {config.span}",
                    run=lambda o=operands, s=out_scale, c=config: conv.convolve(*o, s, None, config=c)[0],
                    expected=expected,
                    bytes=(2 if out_scale is not None else 5) * x.numel(),
                    default=config == chosen,
                )


def _conv_configs(b: int, d: int, length: int, *, wide: bool) -> Iterator[conv.LaunchConfig]:
    multiprocessors = sm_count(torch.device("cuda"))
    narrow = conv.channels_config(b, d, length, multiprocessors=multiprocessors)
    for span in (8, 16, 24, 32, 64):
        y = narrow.block[1]
        yield replace(narrow, span=span, grid=(narrow.grid[0], -(-length // (span * y)), b))
        if wide:
            yield conv.wide_config(b, d, length, multiprocessors=multiprocessors, span=span)


def half_variants() -> Iterator[Variant]:
    for e, b, length in ((5120, 1, 2048), (5120, 8, 1024)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(b, length, 2 * e, device="cuda").to(dtype).transpose(1, 2)[:, :e]
            weight, bias = torch.randn(e, 4, device="cuda"), torch.randn(e, device="cuda")
            expected, _ = conv_reference.causal_conv1d(x, weight, bias)
            yield Variant(
                name=f"conv {_short(dtype)}, e={e} b={b} l={length}",
                run=lambda o=(x, weight, bias): conv.causal_conv1d(*o)[0],
                expected=expected,
                bytes=2 * x.element_size() * x.numel(),
                default=True,
            )


def hadamard_variants() -> Iterator[Variant]:
    processors = sm_count(torch.device("cuda"))
    shared = hadamard._shared_bytes_per_multiprocessor(torch.device("cuda"))
    for rows, width in ((1024, 5120), (2048, 5120), (8192, 5120), (8192, 1536), (8192, 4096), (2048, 8192)):
        plan = plan_for(width)
        for dtype in (torch.float16, torch.float32):
            x = torch.randn(rows, width, device="cuda").to(dtype)
            expected = hadamard_reference.hadamard(x, out_scale=0.03)
            if width == 8192:
                configs = [
                    hadamard.stream_config(plan, rows, 4, processors, shared, threads=128, resident=resident)
                    for resident in (1, 2, 3)
                ]
            else:
                configs = [hadamard.tensor_config(plan, rows, dtype, processors, shared)]
            if dtype == torch.float32:
                configs.append(hadamard.row_config(plan, rows, processors))
            elif width == 8192:
                continue
            chosen = hadamard._config(plan, x, True)
            for config in configs:
                kind = "staying" if config.stage_bytes else "rows"
                yield Variant(
                    name=f"hadamard {_short(dtype)} to i8, {rows} x {width}, "
                    f"{kind} {config.blocks} blocks of {config.threads}",
                    run=lambda x=x, p=plan, c=config: hadamard.transform(x, p, c, reciprocal(0.03)),
                    expected=expected,
                    bytes=(x.element_size() + 1) * x.numel(),
                    default=config == chosen,
                )


def norm_variants() -> Iterator[Variant]:
    for rows, width in ((1024, 2560), (8192, 2560), (8192, 768)):
        residual, delta = (torch.randn(rows, width, device="cuda") for _ in range(2))
        expected, _ = norm_reference.add_rms_norm(residual, delta, None, eps=1e-5, out_scale=0.03)
        shape = f"{rows} x {width}"
        yield Variant(
            name=f"add, then rms_norm to i8, {shape}",
            run=lambda r=residual, d=delta: norm.rms_norm(r + d, None, eps=1e-5, out_scale=0.03),
            expected=expected,
            bytes=13 * residual.numel(),
            default=False,
        )
        for dtype in (torch.float32, torch.float16):
            more = delta.to(dtype)
            expected, _ = norm_reference.add_rms_norm(residual, more, None, eps=1e-5, out_scale=0.03)
            yield Variant(
                name=f"add_rms_norm {_short(dtype)} to i8, {shape}",
                run=lambda r=residual, d=more: norm.add_rms_norm(r, d, None, eps=1e-5, out_scale=0.03)[0],
                expected=expected,
                bytes=(9 + more.element_size()) * residual.numel(),
                default=True,
            )


def quantize_variants() -> Iterator[Variant]:
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(8, 1024, 10240, device="cuda").to(dtype).transpose(1, 2)[:, :5120]
        for name, run in (
            ("quantize", lambda x=x: quantize.quantize(x, 0.03)),
            ("quantize_per_token", lambda x=x: quantize.quantize_per_token(x)[0]),
        ):
            reference = getattr(quantize_reference, name)
            expected = reference(x, 0.03) if name == "quantize" else reference(x)[0]
            yield Variant(
                name=f"{name} {_short(dtype)} to i8, 8 x 1024 x 5120 of 10240",
                run=run,
                expected=expected,
                bytes=(x.element_size() + 1) * x.numel(),
                default=True,
            )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="variants whose name holds this text")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy_gb_s():.0f} GB/s")
    rows, wrong = [], 0
    for variants in (conv_variants, half_variants, hadamard_variants, norm_variants, quantize_variants):
        for variant in variants():
            if options.only not in variant.name:
                continue
            problem = within_class(variant.run(), variant.expected)
            wrong += bool(problem)
            ms = median_ms(captured(variant.run))
            line = f"{'*' if variant.default else ' '} {variant.name:72s} {ms:8.4f}"
            print(f"{line} {variant.bytes / ms / 1e6:6.0f} GB/s {problem}", flush=True)
            rows.append({"name": variant.name, "ms": ms, "default": variant.default, "problem": problem})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
