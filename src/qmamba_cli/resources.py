"""Files that ship with the package: the demo model and the calibration data.

A wheel holds both inside the package. An editable install keeps the calibration data where it is written, in
the source tree's ``calib_data/``. Nothing here imports torch.
"""

from pathlib import Path, PurePosixPath

from qmamba_cli.errors import CheckpointError, DatasetError

_PACKAGE = Path(__file__).resolve().parent
_DEMO = "demo/mamba-5m"
_CALIB_DATA = "calib_data"
# src/qmamba_cli/resources.py: the package, src, the source tree.
_SOURCE_TREE = _PACKAGE.parents[1]


def demo_model_path() -> Path:
    """Folder of the bundled demo model, in Hugging Face's form with its tokenizer.

    Raises:
        CheckpointError: the installation lacks it.
    """
    path = _PACKAGE / _DEMO
    if not (path / "config.json").is_file():
        raise CheckpointError(
            "the bundled demo model is missing from this installation",
            hint="reinstall the package: `pip install --force-reinstall qmamba-cli`",
        )
    return path


def calib_data_path(name: str) -> Path:
    """Path of one bundled data file.

    Args:
        name: relative to the calibration data's folder, for example ``lastword.jsonl``.

    Returns:
        The package's copy, else the source tree's.

    Raises:
        DatasetError: ``name`` leaves the folder, or the installation lacks the file.
    """
    relative = PurePosixPath(name)
    if not relative.parts or relative.is_absolute() or ".." in relative.parts:
        raise DatasetError(
            f"bundled data: bad file name, got `{name}`, expected a name inside `{_CALIB_DATA}`"
        )
    for root in (_PACKAGE, _SOURCE_TREE):
        path = root / _CALIB_DATA / relative
        if path.is_file():
            return path
    raise DatasetError(
        f"the bundled data file `{name}` is missing from this installation",
        hint="reinstall the package, or name your own text with `--dataset` or `--task-data`",
    )
