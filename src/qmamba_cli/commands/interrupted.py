"""How a command ends that was interrupted with something to show."""

from typing import TYPE_CHECKING

import typer

from qmamba_cli import console

if TYPE_CHECKING:
    from qmamba_cli.stages.partial import Keeper

INTERRUPTED = 130


def end_if_partial(keeper: "Keeper", *, partial: bool) -> None:
    """Say how to go on and exit, where the results are partial."""
    if not partial:
        return
    if keeper.output is not None:
        console.note("the results are partial; go on with the same command and `--resume`")
    else:
        console.note("the results are partial; with `--output FILE` an interrupted command can go on")
    raise typer.Exit(INTERRUPTED)
