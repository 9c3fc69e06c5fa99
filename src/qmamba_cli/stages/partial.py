"""Scores of a comparison that was interrupted, kept beside its results so that it can go on."""

import json
from pathlib import Path

import numpy as np

from qmamba_cli.artifacts.files import atomic_file, canonical_json
from qmamba_cli.artifacts.safetensors_io import open_safetensors, write_safetensors
from qmamba_cli.errors import ArtifactError, QmambaError
from qmamba_cli.evaluation.score_table import ScoreTable

_FORMAT = "qmamba-partial-scores"
_KEY = "qmamba"
_BOOLEAN = {"correct", "agrees"}


def partial_path(output: Path) -> Path:
    """Where the scores behind a partial results file are kept.

    >>> partial_path(Path("out/results.json")).as_posix()
    'out/results.partial.safetensors'
    """
    return output.with_name(f"{output.stem}.partial.safetensors")


def check_partial(output: Path, *, force: bool, resume: bool) -> None:
    """Refuse to start over where an interrupted comparison left its scores.

    Raises:
        QmambaError: it did, and neither ``force`` nor ``resume`` says what to do.
    """
    path = partial_path(output)
    if path.exists() and not (force or resume):
        raise QmambaError(
            f"an interrupted comparison left its scores, got `{path}`, expected none",
            hint="go on with `--resume`, or start over with `--force`",
        )


def save_partial(output: Path, table: ScoreTable, *, batches: int, fingerprint: str) -> None:
    """Keep the scores of the batches that are done.

    Args:
        output: the results file.
        table: the scores.
        batches: how many batches they come from, the first ones.
        fingerprint: of everything the scores depend on.

    Raises:
        QmambaError: the file cannot be written.
    """
    record = {"format": _FORMAT, "fingerprint": fingerprint, "batches": batches}
    arrays = {
        name: array.astype(np.uint8) if name in _BOOLEAN else array for name, array in table.arrays().items()
    }
    with atomic_file(partial_path(output), force=True) as temporary:
        write_safetensors(temporary, arrays, {_KEY: canonical_json(record)})


def load_partial(output: Path, *, fingerprint: str, models: int) -> tuple[ScoreTable, int] | None:
    """The scores that were kept and the number of batches they come from, or None where there are none.

    Args:
        output: the results file.
        fingerprint: of everything the scores depend on.
        models: rows the table must have.

    Raises:
        ArtifactError: the scores are damaged, or belong to another comparison.
    """
    path = partial_path(output)
    if not path.exists():
        return None
    file = open_safetensors(path)
    try:
        record = json.loads(file.metadata[_KEY])
        found, batches = record["fingerprint"], int(record["batches"])
        if record["format"] != _FORMAT or batches < 1:
            raise ValueError("another format")
        arrays = {name: file.numpy(name).copy() for name in file.names}
        table = ScoreTable.from_arrays(
            {name: array.astype(np.bool_) if name in _BOOLEAN else array for name, array in arrays.items()}
        )
        shape = (models, int(table.tokens.sum()))
        if any(array is not None and array.shape != shape for array in (table.ll, table.correct, table.kl)):
            raise ValueError("another shape")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"`{path}` holds no scores of an interrupted comparison, got: {error}",
            hint="start over with `--force`",
        ) from None
    if found != fingerprint:
        raise ArtifactError(
            f"`{path}` belongs to another comparison: a model, an option, a document or a library differs",
            hint="repeat the command as it was and add `--resume`, or start over with `--force`",
        )
    return table, batches
