"""The commands, one module each; `COMMANDS` lists them in the order of the help page.

A command parses, calls a stage and shows the outcome. Its module is imported with the program, so it imports
a stage only inside the function.
"""

from collections.abc import Callable
from typing import Any

from qmamba_cli.commands.bench import bench
from qmamba_cli.commands.calibrate import calibrate
from qmamba_cli.commands.compare import compare
from qmamba_cli.commands.demo import demo
from qmamba_cli.commands.diff import diff
from qmamba_cli.commands.drift import drift
from qmamba_cli.commands.export import export
from qmamba_cli.commands.inspect import inspect
from qmamba_cli.commands.merge import merge
from qmamba_cli.commands.modes import modes
from qmamba_cli.commands.report import report
from qmamba_cli.commands.run import run
from qmamba_cli.commands.selftest import selftest
from qmamba_cli.commands.sensitivity import sensitivity
from qmamba_cli.commands.verify import verify

COMMANDS: tuple[Callable[..., Any], ...] = (
    calibrate,
    merge,
    export,
    run,
    compare,
    sensitivity,
    drift,
    bench,
    report,
    modes,
    inspect,
    verify,
    diff,
    demo,
    selftest,
)
