"""`qmamba modes`."""

from qmamba_cli.options import (
    Json,
)
from qmamba_cli.views.modes import show_modes


def modes(as_json: Json = False) -> None:
    """Show the table of numeric modes."""
    show_modes(as_json=as_json)
