"""What an interrupted command has measured so far, kept beside its results so that it can go on.

One file of arrays, `partial_path`, says how far the command came and carries a fingerprint of everything
that its numbers depend on. A command that goes on reads it back only where the fingerprint is its own, so
that the resumed result is the one of a command that was never interrupted.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.artifacts.files import atomic_file, canonical_json
from qmamba_cli.artifacts.safetensors_io import open_safetensors, write_safetensors
from qmamba_cli.errors import ArtifactError, QmambaError, UsageError
from qmamba_cli.evaluation.batches import Batch
from qmamba_cli.stages.reports import check_reports, save_reports

_FORMAT = "qmamba-partial-scores"
_KEY = "qmamba"
_START_OVER = "start over with `--force`"

Arrays = Mapping[str, NDArray[Any]]


def partial_path(output: Path) -> Path:
    """Where what is behind a partial results file is kept.

    >>> partial_path(Path("out/results.json")).as_posix()
    'out/results.partial.safetensors'
    """
    return output.with_name(f"{output.stem}.partial.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """Where a command keeps what it has when it is interrupted, and whether it goes on from there.

    Attributes:
        command: its name.
        output: the results file, or None where nothing is kept.
        resume: go on where an interrupted command stopped, if there was one.
        force: replace what is there.
    """

    command: str
    output: Path | None = None
    resume: bool = False
    force: bool = False

    @property
    def replaces(self) -> bool:
        """Whether files that are there may be replaced: those of the interrupted command are its own."""
        return self.force or (self.resume and self._kept)

    @property
    def _kept(self) -> bool:
        return self.output is not None and partial_path(self.output).exists()

    def check(self, *others: Path | None) -> None:
        """Refuse output paths before any work is done for them.

        Args:
            others: files that the command writes beside its results; None for what was not asked for.

        Raises:
            UsageError: no output is named to go on from, or two outputs are one file.
            QmambaError: a file exists and may not be replaced, or cannot be written, or an interrupted
                command left its scores and neither ``force`` nor ``resume`` says what to do.
        """
        if self.resume and self.output is None:
            raise UsageError(
                "`--resume` needs `--output FILE`, got none", hint="name the file of the earlier run"
            )
        if self.output is not None and self._kept and not (self.force or self.resume):
            raise QmambaError(
                f"an interrupted `qmamba {self.command}` left its scores, got `{partial_path(self.output)}`, "
                "expected none",
                hint="go on with `--resume`, or start over with `--force`",
            )
        check_reports((self.output, *others), force=self.replaces)

    def load(self, fingerprint: str) -> tuple[dict[str, NDArray[Any]], int] | None:
        """The arrays that were kept and how much was done, or None where there is nothing to go on from.

        Args:
            fingerprint: of everything that the arrays depend on.

        Raises:
            ArtifactError: the file is damaged, or belongs to something else.
        """
        if self.output is None or not (self.resume and self._kept):
            return None
        path = partial_path(self.output)
        file = open_safetensors(path)
        try:
            record = json.loads(file.metadata[_KEY])
            found, done = record["fingerprint"], int(record["done"])
            if record["format"] != _FORMAT or done < 0:
                raise ValueError("another format")
            arrays = {name: file.numpy(name).copy() for name in file.names}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.damaged(error) from None
        if found != fingerprint:
            raise ArtifactError(
                f"`{path}` belongs to another `qmamba {self.command}`: a model, an option, a document or a "
                "library differs",
                hint="repeat the command as it was and add `--resume`, or start over with `--force`",
            )
        return arrays, done

    def damaged(self, error: object) -> ArtifactError:
        """The error of a file whose arrays are not what the command keeps."""
        assert self.output is not None
        return ArtifactError(
            f"`{partial_path(self.output)}` holds no scores of an interrupted `qmamba {self.command}`, got: "
            f"{error}",
            hint=_START_OVER,
        )

    def save(self, fingerprint: str, arrays: Arrays, done: int) -> None:
        """Keep what is there; without an output, nothing.

        Args:
            fingerprint: of everything that the arrays depend on.
            arrays: booleans are kept as uint8.
            done: how much of the work they come from, its first units.

        Raises:
            QmambaError: the file cannot be written.
        """
        if self.output is None:
            return
        record = {"format": _FORMAT, "fingerprint": fingerprint, "done": done}
        plain = {
            name: np.ascontiguousarray(array.astype(np.uint8) if array.dtype == np.bool_ else array)
            for name, array in arrays.items()
        }
        with atomic_file(partial_path(self.output), force=True) as temporary:
            write_safetensors(temporary, plain, {_KEY: canonical_json(record)})

    def write(self, results: str, others: Mapping[Path, str], *, partial: bool) -> list[Path]:
        """Write the results and what goes beside them; whole results end what an interrupted command left.

        Args:
            results: the text of the results file, which is not written where no output is named.
            others: path → text.
            partial: whether they are partial, so that the scores behind them stay.

        Returns:
            The files that were written, the results first.

        Raises:
            QmambaError: a file exists and may not be replaced, or cannot be written.
        """
        own = {} if self.output is None else {self.output: results}
        # The results last: where they are, everything is.
        save_reports({**others, **own}, force=self.replaces)
        if self.output is not None and not partial:
            partial_path(self.output).unlink(missing_ok=True)
        return [*own, *others]


def fingerprint_of(record: Mapping[str, Any], tensors: Iterable[torch.Tensor]) -> str:
    """Digest of everything that scores depend on.

    Args:
        record: JSON's types: artifacts, options, versions.
        tensors: the tokens that are scored, on the CPU.
    """
    digest = hashlib.sha256(canonical_json(dict(record)).encode("ascii"))
    for tensor in tensors:
        digest.update(canonical_json(list(tensor.shape)).encode("ascii"))
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensors_of(batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
    """What the scores of batches depend on."""
    for batch in batches:
        yield from (batch.ids, batch.rows, batch.positions, batch.targets)


def documents_of(batches: Sequence[Batch]) -> int:
    """Documents (windows) in all of the batches."""
    return sum(len(batch.documents) for batch in batches)
