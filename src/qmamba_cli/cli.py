"""The program: its commands, its options before them, and errors mapped to exit codes.

Nothing heavy is imported before a command needs it: ``--help``, ``modes`` and ``inspect`` load neither torch
nor CuPy. This is the one module that reads the environment.
"""

import os
import sys
from typing import Annotated, NoReturn

import typer

from qmamba_cli import __version__, console
from qmamba_cli.commands import COMMANDS
from qmamba_cli.errors import QmambaError, UsageError
from qmamba_cli.progress import listen
from qmamba_cli.views.problems import problem_of

EXIT_INTERRUPTED = 130
_EXIT_CODES = (
    "Exit codes: 0 done, 1 cannot be done or a gate said no, 2 wrong usage, 3 an artifact is corrupt, stale "
    "or of another lineage, 4 a device or a dependency is missing, 130 interrupted."
)
# The base of every complaint about the command line. Typer carries its own copy of Click in some versions and
# depends on Click in others; this finds the class in both.
_CommandLineError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

app = typer.Typer(
    name="qmamba",
    help="Calibrate, export and run quantized Mamba language models.",
    epilog=_EXIT_CODES,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        console.write(f"qmamba {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 (its callback does the work)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command; without a command, the help page."""
    context.obj = dict(os.environ)
    if context.invoked_subcommand is None:
        console.note(context.get_help())
        raise typer.Exit(UsageError.exit_code)


for _command in COMMANDS:
    app.command()(_command)


def main() -> NoReturn:
    """Run the command line and exit; the only place that catches errors."""
    sys.exit(_exit_code())


def _exit_code() -> int:
    listen(console.note)
    try:
        # Some versions of the parser answer an interrupt with this code themselves, others raise.
        code = int(app(prog_name="qmamba", standalone_mode=False) or 0)
    except (QmambaError, MemoryError, _CommandLineError) as error:
        problem = problem_of(error, sys.argv[1:])
        console.error(problem)
        return problem.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except console.ReaderGoneError:
        return 0
    if code == EXIT_INTERRUPTED:
        console.note("interrupted")
    return code
