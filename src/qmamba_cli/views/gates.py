"""What became of the gates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmamba_cli import console

if TYPE_CHECKING:
    from qmamba_cli.evaluation.gates import GateOutcome


def show_gates(outcomes: Sequence["GateOutcome"]) -> None:
    """The gates that passed, one line each on stderr; those that failed are reported as an error."""
    for outcome in outcomes:
        if outcome.passed:
            console.note(outcome.message)
