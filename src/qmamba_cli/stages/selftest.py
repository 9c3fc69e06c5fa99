"""Every CUDA kernel against its reference on this machine's GPU, and compiling them without one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qmamba_cli.kernels._cache import fill
from qmamba_cli.kernels._compile import ARCHITECTURES, compile_all, entries
from qmamba_cli.kernels._compile import Compiled as Compiled
from qmamba_cli.kernels.backend import CPU, Backend, select_backend
from qmamba_cli.progress import Progress, silent
from qmamba_cli.stages.selftest_case import Case, Exactness
from qmamba_cli.stages.selftest_cases import cases

_TIMED_RUNS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a case went.

    Attributes:
        operator: name of the operator.
        variant: what distinguishes the case.
        exactness: class of its output.
        worst: exact and grid: largest difference in steps; real: largest error relative to the largest value.
        budget_used: share of the budget that was used; above 1 the case failed.
        ms: median time of one call, launch included; None where it was not timed.
        gb_s: bytes over that time; None likewise.
    """

    operator: str
    variant: str
    exactness: Exactness
    worst: float
    budget_used: float
    ms: float | None
    gb_s: float | None

    @property
    def passed(self) -> bool:
        """Whether the error stayed within the budget."""
        return self.budget_used <= 1.0


def selftest(*, timing: bool = True, progress: Progress = silent) -> tuple[list[Outcome], float | None]:
    """Compare every operator of the `cuda` backend with the reference.

    Args:
        timing: also time every kernel; without it each case runs once.
        progress: shows how far it is.

    Returns:
        The outcomes, and the bandwidth of a device copy in GB/s, read and written bytes counted; None without
        timing.

    Raises:
        DeviceError: the backend cannot run here.
    """
    ops = select_backend("cuda")
    rows, outcomes = cases(), []
    major, minor = torch.cuda.get_device_capability(ops.device)
    kernels = entries(f"sm_{major}{minor}")
    instances = [(source, entry) for source, names in kernels.values() for entry in names]
    with progress("compiling kernels", len(instances)) as advance:
        fill(instances, ops.device.index or 0, advance)
    with progress("checking kernels", len(rows)) as advance:
        for case in rows:
            outcomes.append(run_case(case, ops, timing=timing))
            advance(1)
    return outcomes, _copy_gb_s(ops.device) if timing else None


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
    return 2 * source.nbytes / _median_ms(lambda: target.copy_(source)) / 1e6


@torch.inference_mode()
def run_case(case: Case, ops: Backend, *, timing: bool = True) -> Outcome:
    """Run one case on a backend and on the reference; on a GPU also time it, if asked for."""
    expected = case.call(CPU, case.prepare(CPU, case.inputs))
    prepared = case.prepare(ops, {name: tensor.to(ops.device) for name, tensor in case.inputs.items()})
    got = case.call(ops, prepared).cpu()
    worst, used = _compare(case, got, expected)
    ms = _median_ms(lambda: case.call(ops, prepared)) if timing and ops.device.type == "cuda" else None
    return Outcome(
        operator=case.operator,
        variant=case.variant,
        exactness=case.exactness,
        worst=worst,
        budget_used=used,
        ms=ms,
        gb_s=None if ms is None else case.bytes / ms / 1e6,
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


def _median_ms(run: Callable[[], Any]) -> float:
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
