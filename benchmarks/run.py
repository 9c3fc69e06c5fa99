"""Time the demo model against transformers' float model, and every operator, on this machine's CPU.

    python benchmarks/run.py                        every case
    python benchmarks/run.py prefill-0 decode-0     some; --list names them
    python benchmarks/run.py --json bench.json      also write the numbers

Both sides of a ratio are timed in one run, in turns. That does not make up for a busy machine, which slows
the two sides unequally: trust a ratio only where its range over the rounds, printed beside it, is narrow. The
operators' tests run first: nothing is timed where one fails.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from registry import (
    CASES,
    D_CONV,
    D_INNER,
    D_MODEL,
    D_STATE,
    PREFILL_BATCH,
    PREFILL_LENGTH,
    ModelCase,
    OpCase,
)
from rich.console import Console
from rich.table import Table
from transformers import MambaForCausalLM, logging

from qmamba_cli import __version__
from qmamba_cli.kernels.backend import CPU
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.modes import ScanOrder, mode_by_name
from qmamba_cli.resources import demo_model_path
from qmamba_cli.stages.calibrate import CalibrateOptions, calibrate
from qmamba_cli.stages.export import ExportOptions, export
from qmamba_cli.stages.run import ModelOptions, load_model

ROOT = Path(__file__).resolve().parents[1]
Timed = Callable[[], object]


def main() -> int:
    arguments = _arguments()
    if arguments.list:
        print("\n".join(CASES))
        return 0
    unknown = [name for name in arguments.names if name not in CASES]
    if unknown:
        print(f"error: unknown case `{unknown[0]}`, expected one of {', '.join(CASES)}", file=sys.stderr)
        return 2
    if not arguments.skip_tests and not _tests_pass():
        print("error: the operators' tests fail, got red, expected green before timing", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    cases = [CASES[name] for name in arguments.names or CASES]
    machine = _machine()
    with torch.inference_mode():
        models = _model_rows([case for case in cases if isinstance(case, ModelCase)], arguments.repeat)
        operators = _operator_rows([case for case in cases if isinstance(case, OpCase)], arguments.repeat)
    _show(machine, models, operators)
    if arguments.json is not None:
        report = {"machine": machine, "models": models, "operators": operators}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="CASE", help="cases to time; all if left out")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--repeat", type=int, default=5, help="timed calls a side; the median is reported")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads, for both sides")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    parser.add_argument("--skip-tests", action="store_true", help="time without running the tests first")
    return parser.parse_args()


def _tests_pass() -> bool:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow and not gpu",
        str(ROOT / "tests/kernels"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
    return done.returncode == 0


def _machine() -> dict[str, str | int]:
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "qmamba_cli": __version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _seconds(sides: Sequence[Timed], repeat: int) -> list[list[float]]:
    """Seconds of each side in each round, timed in turns after one warm-up each."""
    times: list[list[float]] = [[] for _ in sides]
    for side in sides:
        side()
    for _ in range(repeat):
        for index, side in enumerate(sides):
            begin = time.perf_counter()
            side()
            times[index].append(time.perf_counter() - begin)
    return times


def _model_rows(cases: list[ModelCase], repeat: int) -> list[dict[str, Any]]:
    if not cases:
        return []
    # On a CPU transformers has only its plain PyTorch operators and says so at length.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    baseline = MambaForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {bits: _quantized_demo(Path(folder), bits) for bits in {case.w_bits for case in cases}}
        # Cases of one shape are timed together, in turns with one float model.
        for shape in dict.fromkeys((case.decode, case.batch, case.length) for case in cases):
            group = [case for case in cases if (case.decode, case.batch, case.length) == shape]
            sides = [_float_side(baseline, group[0]), *(_quantized_side(files, case) for case in group)]
            reference, *measured = _seconds(sides, repeat)
            rows += [
                {
                    **asdict(case),
                    "tokens_per_second": case.tokens / statistics.median(seconds),
                    "transformers_tokens_per_second": case.tokens / statistics.median(reference),
                    **_ratios(reference, seconds),
                }
                for case, seconds in zip(group, measured, strict=True)
            ]
    return rows


def _ratios(reference: Sequence[float], seconds: Sequence[float]) -> dict[str, float | int]:
    """Median and range of the ratios round by round, so that a stalled call shows and does not decide."""
    ratios = [theirs / ours for theirs, ours in zip(reference, seconds, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": len(ratios),
    }


def _quantized_demo(folder: Path, w_bits: int) -> Path:
    """Export the demo model; a short calibration is enough, since scales do not change the speed."""
    workdir = folder / f"w{w_bits}"
    out = folder / f"demo-w{w_bits}.safetensors"
    calibrate(CalibrateOptions(model="demo", workdir=workdir, samples=8, seqlen=128))
    export(ExportOptions(out=out, workdir=workdir, recipe=Recipe(w_bits=w_bits)))
    return out


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 8192, (batch, length), generator=torch.Generator().manual_seed(0))


def _float_side(model: MambaForCausalLM, case: ModelCase) -> Timed:
    if not case.decode:
        ids = _ids(case.batch, case.length)
        return lambda: model(ids, use_cache=False).logits
    prompt = _ids(case.batch, 16)

    def steps() -> None:
        output = model(prompt, use_cache=True)
        for _ in range(case.length):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, cache_params=output.cache_params, use_cache=True)

    return steps


def _quantized_side(files: dict[int, Path], case: ModelCase) -> Timed:
    options = ModelOptions(mode=mode_by_name(case.mode), checkpoint=files[case.w_bits], backend="cpu")
    model: Mamba = load_model(options).model
    if not case.decode:
        ids = _ids(case.batch, case.length)
        return lambda: model.logits(model.hidden(ids))
    prompt = _ids(case.batch, 16)

    def steps() -> None:
        hidden, state = model.forward(prompt)
        for _ in range(case.length):
            token = model.logits(hidden[:, -1:]).argmax(-1)
            hidden, state = model.forward(token, state)

    return steps


def _operator_rows(cases: list[OpCase], repeat: int) -> list[dict[str, Any]]:
    rows = []
    inputs = _operators() if cases else {}
    for case in cases:
        (times,) = _seconds([inputs[case.op, case.variant]], repeat)
        seconds = statistics.median(times)
        rows.append(
            {
                **asdict(case),
                "milliseconds": seconds * 1e3,
                "gb_per_second": case.bytes / seconds / 1e9,
                "gflop_per_second": case.flops / seconds / 1e9,
            }
        )
    return rows


def _operators() -> dict[tuple[str, str], Timed]:
    """Calls with seeded inputs, keyed by operator and variant."""
    generator = torch.Generator().manual_seed(0)
    b, l, d, n = PREFILL_BATCH, PREFILL_LENGTH, D_INNER, D_STATE

    def i8(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)

    def f32(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    residual, y = f32(b, l, D_MODEL), f32(b, l, d)
    # Channels last in memory, as the operators before hand them over.
    x, u, dt, z = (i8(b, l, d).transpose(1, 2) for _ in range(4))
    u_float = f32(b, l, d).transpose(1, 2)
    taps, tap_scale, conv_bias = i8(d, D_CONV), f32(d).abs() / 127, f32(d)
    A, D, dt_bias = -f32(d, n).abs(), f32(d), f32(d)
    B, C = (i8(b, l, n).transpose(1, 2) for _ in range(2))
    grid = {"dt_scale": 0.02, "b_scale": 0.02, "c_scale": 0.02, "z_scale": 0.02}
    normed_i8, normed_f32, rotated_i8 = i8(b, l, D_MODEL), f32(b, l, D_MODEL), i8(b, l, d)
    in_i8, in_f32, out_i8 = i8(2 * d, D_MODEL), f32(2 * d, D_MODEL), i8(D_MODEL, d)
    in_scale, out_scale = f32(2 * d).abs() / 127, f32(D_MODEL).abs() / 127
    conv = {"x_scale": 0.05, "weight_scale": tap_scale}

    def scan(u: torch.Tensor, order: ScanOrder, **options: float) -> Timed:
        return lambda: CPU.selective_scan(u, dt, A, B, C, D, z, dt_bias, order=order, **grid, **options)

    return {
        ("rms_norm", "i8"): lambda: CPU.rms_norm(residual, None, eps=1e-5, out_scale=0.03),
        ("linear", "in_proj_i8"): lambda: CPU.linear(
            normed_i8, in_i8, x_scale=0.03, weight_scale=in_scale, out_scale=0.05
        ),
        ("linear", "in_proj_f32"): lambda: CPU.linear(normed_f32, in_f32),
        ("linear", "out_proj_i8"): lambda: CPU.linear(
            rotated_i8, out_i8, x_scale=0.03, weight_scale=out_scale
        ),
        ("causal_conv1d", "i8_i8"): lambda: CPU.causal_conv1d(x, taps, conv_bias, **conv, out_scale=0.05),
        ("causal_conv1d", "i8_f32"): lambda: CPU.causal_conv1d(x, taps, conv_bias, **conv),
        ("selective_scan", "chunked_i8"): scan(u, ScanOrder.CHUNKED, u_scale=0.05, state_scale=0.1),
        ("selective_scan", "sequential_f32"): scan(u_float, ScanOrder.SEQUENTIAL),
        ("hadamard", "i8"): lambda: CPU.hadamard(y, out_scale=0.05),
    }


def _show(
    machine: dict[str, str | int], models: list[dict[str, Any]], operators: list[dict[str, Any]]
) -> None:
    # Wide enough for every column where stdout is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if models:
        table = Table(title="demo model, CPU: tokens a second, quantized and transformers float32")
        for column in ("case", "weights", "mode", "b", "l"):
            table.add_column(column)
        for column in ("quantized", "float", "ratio", "range"):
            table.add_column(column, justify="right")
        for row in models:
            table.add_row(
                row["name"],
                f"W{row['w_bits']}A8",
                row["mode"],
                str(row["batch"]),
                f"{row['length']} steps" if row["decode"] else str(row["length"]),
                f"{row['tokens_per_second']:,.0f}",
                f"{row['transformers_tokens_per_second']:,.0f}",
                f"{row['ratio']:.2f}",
                f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
            )
        console.print(table)
    if operators:
        table = Table(title="operators on the CPU")
        for column in ("case", "shape"):
            table.add_column(column)
        for column in ("ms", "GB/s", "GFLOP/s"):
            table.add_column(column, justify="right")
        for row in operators:
            table.add_row(
                row["name"],
                row["shape"],
                f"{row['milliseconds']:.2f}",
                f"{row['gb_per_second']:.1f}",
                f"{row['gflop_per_second']:.1f}",
            )
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
