"""``python -m qmamba_cli``."""

from qmamba_cli.cli import main

main()
