"""What a path names: a work folder, one of the two artifacts, or results."""

from enum import StrEnum
from pathlib import Path

from qmamba_cli.artifacts.calibration import MANIFEST
from qmamba_cli.artifacts.quantized import is_model_folder
from qmamba_cli.artifacts.workdir import RECORD
from qmamba_cli.stages.results_file import is_results


class Kind(StrEnum):
    """The kinds of artifact, in words."""

    WORKDIR = "work folder"
    CALIBRATION = "calibration"
    QUANTIZED = "quantized model"
    RESULTS = "results"


def kind_of(path: Path) -> Kind:
    """What can only be meant by ``path``; whether it is sound shows when it is read.

    Raises:
        QmambaError: it cannot be read.
    """
    if is_model_folder(path):
        return Kind.QUANTIZED
    if path.is_dir():
        return Kind.WORKDIR if is_workdir(path) else Kind.CALIBRATION
    return Kind.RESULTS if is_results(path) else Kind.QUANTIZED


def is_workdir(path: Path) -> bool:
    """Whether ``path`` is a work folder."""
    return (path / RECORD).is_file() and not (path / MANIFEST).exists()
