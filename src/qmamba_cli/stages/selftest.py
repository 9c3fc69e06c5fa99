"""Every CUDA kernel against its reference on this machine's GPU, and compiling them without one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from qmamba_cli.kernels._compile import ARCHITECTURES, compile_all
from qmamba_cli.kernels._compile import Compiled as Compiled
from qmamba_cli.kernels.backend import CPU, Backend, select_backend
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.modes import ScanOrder
from qmamba_cli.progress import Progress, silent

_SEED = 20250
_TIMED_RUNS = 20
# Errors of float32 arithmetic are counted in this unit, relative to the largest value of the output.
_EPS = float(torch.finfo(torch.float32).eps)


class Exactness(StrEnum):
    """What an output promises, as in docs/numerics.md."""

    EXACT = "exact"
    GRID = "grid"
    REAL = "real"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel at one shape.

    Attributes:
        operator: name of the operator, as in `Backend`.
        variant: what distinguishes the case.
        exactness: class of its output.
        budget: exact: 0; grid: share of elements that may be one step off; real: relative error.
        call: runs the operator of a backend on inputs and returns the output that is compared.
        inputs: CPU tensors by name.
        bytes: bytes read and written at least once.
    """

    operator: str
    variant: str
    exactness: Exactness
    budget: float
    call: Callable[[Backend, dict[str, torch.Tensor]], torch.Tensor]
    inputs: dict[str, torch.Tensor]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a case went.

    Attributes:
        operator: name of the operator.
        variant: what distinguishes the case.
        exactness: class of its output.
        worst: exact and grid: largest difference in steps; real: largest error relative to the largest value.
        budget_used: share of the budget that was used; above 1 the case failed.
        ms: median time of one call, launch included.
        gb_s: bytes over that time.
    """

    operator: str
    variant: str
    exactness: Exactness
    worst: float
    budget_used: float
    ms: float
    gb_s: float

    @property
    def passed(self) -> bool:
        """Whether the error stayed within the budget."""
        return self.budget_used <= 1.0


def selftest(*, progress: Progress = silent) -> tuple[list[Outcome], float]:
    """Compare every operator of the `cuda` backend with the reference.

    Returns:
        The outcomes, and the bandwidth of a device copy in GB/s, read and written bytes counted.

    Raises:
        DeviceError: the backend cannot run here.
    """
    ops = select_backend("cuda")
    rows, outcomes = cases(), []
    with progress("compiling and checking kernels", len(rows)) as advance:
        for case in rows:
            outcomes.append(run_case(case, ops))
            advance(1)
    return outcomes, _copy_gb_s(ops.device)


def compile_kernels(architectures: Sequence[str] | None, *, progress: Progress = silent) -> list[Compiled]:
    """Compile every kernel for some architectures, or for all that are supported; needs no GPU.

    Raises:
        UsageError: an architecture is unknown.
        DeviceError: CuPy or NVRTC is missing, or a kernel does not compile.
    """
    wanted = architectures or ARCHITECTURES
    compiled = []
    with progress("compiling kernels", len(wanted)) as advance:
        for arch in wanted:
            compiled += list(compile_all(arch))
            advance(1)
    return compiled


def _copy_gb_s(device: torch.device) -> float:
    source = torch.empty(1 << 26, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_ms(lambda: target.copy_(source), device) / 1e6


@torch.inference_mode()
def run_case(case: Case, ops: Backend) -> Outcome:
    """Run one case on a backend and on the reference."""
    expected = case.call(CPU, case.inputs)
    moved = {name: tensor.to(ops.device) for name, tensor in case.inputs.items()}
    got = case.call(ops, moved).cpu()
    worst, used = _compare(case, got, expected)
    ms = _median_ms(lambda: case.call(ops, moved), ops.device)
    return Outcome(
        operator=case.operator,
        variant=case.variant,
        exactness=case.exactness,
        worst=worst,
        budget_used=used,
        ms=ms,
        gb_s=case.bytes / ms / 1e6,
    )


def _compare(case: Case, got: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf"), float("inf")
    difference = (got.to(torch.float64) - expected.to(torch.float64)).abs()
    if not torch.isfinite(difference).all():
        return float("inf"), float("inf")
    worst = float(difference.max())
    match case.exactness:
        case Exactness.EXACT:
            return worst, 0.0 if worst == 0 else float("inf")
        case Exactness.GRID:
            share = float((difference > 0).to(torch.float64).mean())
            return worst, share / case.budget if worst <= 1 else float("inf")
        case Exactness.REAL:
            relative = worst / max(float(expected.abs().max()), 1e-30)
            return relative, relative / case.budget


def _median_ms(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        return float("nan")
    for _ in range(3):
        run()
    return float(sorted(_time_ms(run) for _ in range(_TIMED_RUNS))[_TIMED_RUNS // 2])


def _time_ms(run: Callable[[], Any]) -> Any:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def cases() -> list[Case]:
    """The cases, small enough for the reference to take seconds, with shapes of no convenient size."""
    generator = torch.Generator().manual_seed(_SEED)
    return [
        *_norm_cases(generator),
        *_linear_cases(generator),
        *_conv_cases(generator),
        *_scan_cases(generator),
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
            variant=f"f32 to f32, n {width}",
            exactness=Exactness.REAL,
            budget=200 * _EPS,
            call=lambda ops, t: ops.hadamard(t["y"]),
            inputs={"y": y},
            bytes=8 * y.numel(),
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

    def static(out_scale: float | None) -> Callable[[Backend, dict[str, torch.Tensor]], torch.Tensor]:
        return lambda ops, t: ops.causal_conv1d(
            t["x"],
            t["weight"],
            t["bias"],
            x_scale=0.03,
            weight_scale=t["scale"],
            out_scale=out_scale,
            state=ConvState(t["state"]),
        )[0]

    def dynamic(ops: Backend, t: dict[str, torch.Tensor]) -> torch.Tensor:
        return ops.causal_conv1d(
            t["x"],
            t["weight"],
            t["bias"],
            x_scale=t["token_scale"],
            weight_scale=t["scale"],
            state=ConvState(t["state"], t["state_scale"]),
        )[0]

    for variant, exactness, budget, call, size in (
        ("i8 to i8", Exactness.GRID, 1e-3, static(0.05), 2),
        ("i8 to f32", Exactness.REAL, 20 * _EPS, static(None), 5),
        ("i8 with a scale a token, to f32", Exactness.REAL, 20 * _EPS, dynamic, 5),
    ):
        yield Case(
            operator="causal_conv1d",
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
