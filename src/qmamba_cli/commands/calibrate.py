"""`qmamba calibrate`."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
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

# What a shell expects of a command that Ctrl-C ended.
_INTERRUPTED = 130


def calibrate(
    context: typer.Context,
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
    shard: Annotated[
        str | None,
        typer.Option(metavar="K/N", help="Observe the K-th of N parts only; `merge` puts them together."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue where an interrupted calibration was saved.")
    ] = False,
    save_every: Annotated[float, typer.Option(help="Seconds between two saves of the progress.")] = 30.0,
    check_overlap: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Evaluation text; warns of passages that both texts hold."),
    ] = None,
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
    from qmamba_cli.stages.distributed import world_of

    if reduction not in {str(member) for member in Reduction}:
        raise UsageError(f"unknown reduction `{reduction}`, expected one of {', '.join(Reduction)}")
    options = CalibrateOptions(
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
        shard=_parts(shard),
        resume=resume,
        save_every=save_every,
        check_overlap=check_overlap,
    )
    world = world_of(context.obj or {})
    with _stop_on_interrupt() as stop:
        report = stage(
            options,
            world=world,
            stop=stop,
            progress=console.progress(quiet=quiet or as_json or world.rank > 0),
            dry_run=dry_run,
        )
    if world.rank == 0 and report.stopped_at is None:
        show_calibration(report, as_json=as_json, dry_run=dry_run)
    if report.stopped_at is not None:
        console.note(
            f"the progress is saved, up to sample {report.stopped_at}; "
            "the same command with `--resume` continues it"
        )
        raise typer.Exit(_INTERRUPTED)


def _parts(text: str | None) -> tuple[int, int] | None:
    """The numbers of ``K/N``.

    Raises:
        UsageError: there are not two of them.
    """
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise UsageError(f"invalid value of `--shard`, got `{text}`, expected K/N, as in `--shard 2/8`")
    return int(number), int(count)


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end the work behind the current batch, and the second one at once."""
    asked = threading.Event()

    def interrupted(_number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        console.note("stopping after this batch; press Ctrl-C again to stop at once")

    # Only the main thread may set a handler; a process in the background has none, and keeps it so.
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield asked.is_set
        return
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
