"""Errors a user can cause, each with the exit code the command line gives it.

Libraries raise; only `qmamba_cli.cli.main` catches. A message reads ``<what>, got <value>, expected
<rule>`` in lower case with no final stop; the hint names the next step.
"""

from typing import ClassVar


class QmambaError(Exception):
    """Something cannot be done (exit code 1).

    Args:
        message: what went wrong, what was found and what was expected.
        hint: the next step for the user; may be empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QmambaError):
    """An option or a combination of options is wrong (exit code 2)."""

    exit_code = 2


class ArtifactError(QmambaError):
    """An artifact is corrupt, stale, of a foreign version or of another lineage (exit code 3)."""

    exit_code = 3


class DeviceError(QmambaError):
    """A device or an optional dependency is missing (exit code 4)."""

    exit_code = 4


class CheckpointError(QmambaError):
    """A source checkpoint is missing, unsupported or unusable (exit code 1)."""


class DatasetError(QmambaError):
    """A text source is missing, malformed or too small (exit code 1)."""


class ShapeError(QmambaError):
    """A tensor handed to an operator has the wrong shape, dtype or scale (exit code 1)."""
