"""`qmamba calibrate`."""

from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.errors import UsageError
from qmamba_cli.options import (
    DEFAULT_WORKDIR,
    DryRun,
    Force,
    Json,
    Offline,
    Quiet,
    TokenizerFrom,
    Workdir,
)
from qmamba_cli.views.calibration import show_calibration


def calibrate(
    model: Annotated[
        str, typer.Argument(help="Folder, Hub id (org/name) or `demo`, the bundled model.", metavar="MODEL")
    ],
    samples: Annotated[int, typer.Option(help="Token windows to observe.")] = 512,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Windows a forward pass.")] = 8,
    dataset: Annotated[
        str,
        typer.Option(
            help="bundled, self (text from the model), a .jsonl/.txt/.parquet file or name[:config[:split]]."
        ),
    ] = "bundled",
    text_column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed of the choice of samples.")] = 0,
    shuffle: Annotated[bool, typer.Option(help="Draw the samples in seeded order.")] = True,
    alpha: Annotated[float, typer.Option(help="Quantile of the Percentile sites, in (0.5, 1].")] = 0.9995,
    reduction: Annotated[str, typer.Option(help="How samples are joined: global, mean or ema.")] = "global",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16; the CPU computes in fp32.")] = "auto",
    tokenizer: TokenizerFrom = None,
    workdir: Workdir = DEFAULT_WORKDIR,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Observe a float model on text: checkpoint + text -> calibration artifact."""
    from qmamba_cli.quant.observers import Reduction
    from qmamba_cli.stages.calibrate import CalibrateOptions
    from qmamba_cli.stages.calibrate import calibrate as stage

    if reduction not in {str(member) for member in Reduction}:
        raise UsageError(f"unknown reduction `{reduction}`, expected one of {', '.join(Reduction)}")
    report = stage(
        CalibrateOptions(
            model=model,
            workdir=workdir,
            samples=samples,
            seqlen=seqlen,
            batch_size=batch_size,
            dataset=dataset,
            text_column=text_column,
            seed=seed,
            shuffle=shuffle,
            alpha=alpha,
            reduction=Reduction(reduction),
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            force=force,
            offline=offline,
        ),
        progress=console.progress(quiet=quiet or as_json),
        dry_run=dry_run,
    )
    show_calibration(report, dry_run=dry_run, as_json=as_json)
