"""The whole pipeline on the bundled model: calibrate, export, then every mode on the same documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmamba_cli.model.quantize import Recipe
from qmamba_cli.modes import MODES, Precision
from qmamba_cli.progress import Progress, silent
from qmamba_cli.resources import calib_data_path
from qmamba_cli.stages.calibrate import CalibrateOptions, CalibrateReport, calibrate
from qmamba_cli.stages.export import ExportOptions, ExportReport, export
from qmamba_cli.stages.run import ModelOptions, TaskOptions, load_model, run_task

MODEL = "demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """How much of the demo to run.

    Attributes:
        folder: where the work folder and the quantized file go; what an earlier demo left there is replaced.
        samples: calibration samples.
        limit: last-word documents, or None for all.
        windows: windows of 512 tokens for perplexity and KL.
        w_bits: bits of in_proj and out_proj.
        backend: auto, cpu or cuda.
    """

    folder: Path
    samples: int = 128
    limit: int | None = None
    windows: int = 16
    w_bits: int = 4
    backend: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRow:
    """One mode's line.

    Attributes:
        mode: name of the row.
        acc: last-word accuracy.
        acc_stderr: its standard error.
        perplexity: over the windows.
        kl: mean KL divergence to the float model, nats a token.
        seconds: both tasks, loading left out.
    """

    mode: str
    acc: float
    acc_stderr: float | str
    perplexity: float
    kl: float
    seconds: float


def prepare(options: DemoOptions, *, progress: Progress = silent) -> tuple[CalibrateReport, ExportReport]:
    """Calibrate and export the bundled model into the demo's folder."""
    calibrated = calibrate(
        CalibrateOptions(
            model=MODEL,
            workdir=options.folder,
            samples=options.samples,
            device=options.backend,
            force=True,
        ),
        progress=progress,
    )
    exported = export(
        ExportOptions(
            out=options.folder / "demo.safetensors",
            workdir=options.folder,
            recipe=Recipe(w_bits=options.w_bits),
            force=True,
        ),
        progress=progress,
    )
    return calibrated, exported


def rows(options: DemoOptions, *, progress: Progress = silent) -> Iterator[DemoRow]:
    """Every mode, the float baseline first, on the same documents at one batch size.

    Reads what `prepare` wrote.
    """
    for mode in sorted(MODES.values(), key=lambda row: row.precision is Precision.INT8):
        floating = mode.precision is Precision.FP32
        loaded = load_model(
            ModelOptions(
                mode=mode,
                workdir=options.folder,
                model=MODEL if floating else None,
                backend=options.backend,
            )
        )
        words, _ = run_task(loaded, TaskOptions(task="lastword", limit=options.limit), progress=progress)
        text, _ = run_task(
            loaded,
            TaskOptions(
                task="perplexity",
                data=calib_data_path("lastword.jsonl"),
                limit=options.windows,
                baseline=MODEL,
            ),
            progress=progress,
        )
        yield _row(mode.name, words, text)


def _row(mode: str, words: dict[str, Any], text: dict[str, Any]) -> DemoRow:
    last_word, running = words["results"]["lastword"], text["results"]["perplexity"]
    return DemoRow(
        mode=mode,
        acc=last_word["acc,none"],
        acc_stderr=last_word["acc_stderr,none"],
        perplexity=running["perplexity,none"],
        kl=running["kl,none"],
        seconds=words["qmamba"]["seconds"] + text["qmamba"]["seconds"],
    )
