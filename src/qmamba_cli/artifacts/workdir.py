"""The work folder, through which the stages find each other's last artifact."""

import os
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from qmamba_cli.artifacts.calibration import read_calibration_manifest
from qmamba_cli.artifacts.files import atomic_file, canonical_json, reading, recover_directory, strict_json
from qmamba_cli.artifacts.manifest import Sha256
from qmamba_cli.artifacts.quantized import read_quantized_manifest
from qmamba_cli.errors import ArtifactError, QmambaError

RECORD: Final = "workdir.json"
_VERSION: Final = 1
_MAX_BYTES = 1 << 16
# Seconds to wait for another process's record, which takes milliseconds.
_PATIENCE = 2.0
_STAGE = {"calibration": "qmamba calibrate MODEL", "export": "qmamba export --out FILE"}
_OPTION = {"calibration": "--calibration DIR", "export": "--checkpoint FILE"}


_Kind: TypeAlias = Literal["calibration", "export"]


class Record(NamedTuple):
    """An artifact and the content digest it had when it was made."""

    path: Path
    digest: str


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Entry(_Strict):
    # Relative to the work folder, so that both can be moved together.
    path: str
    digest: Sha256


class _State(_Strict):
    format: Literal["qmamba-workdir"] = "qmamba-workdir"
    format_version: Literal[1] = _VERSION
    calibration: _Entry | None = None
    export: _Entry | None = None


class Workdir:
    """A work folder; it need not exist until something is recorded.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def calibration_path(self) -> Path:
        """Where `calibrate` writes its artifact."""
        return self.path / "calibration"

    def record_calibration(self, path: Path, digest: str) -> None:
        """Remember the last calibration.

        Args:
            path: the artifact.
            digest: its content digest.

        Raises:
            QmambaError: the record cannot be written, another process keeps writing it, or has put another
                artifact at ``path``.
            ArtifactError: the record that is there is damaged.
        """
        self._record("calibration", path, digest)

    def record_export(self, path: Path, digest: str) -> None:
        """Remember the last export; arguments and errors as for `record_calibration`."""
        self._record("export", path, digest)

    def last_calibration(self) -> Record | None:
        """The last calibration recorded, whether or not it still exists.

        Raises:
            ArtifactError: the record is damaged.
        """
        return self._last(self._read().calibration)

    def last_export(self) -> Record | None:
        """The last export recorded, whether or not it still exists.

        Raises:
            ArtifactError: the record is damaged.
        """
        return self._last(self._read().export)

    def resolve_calibration(self) -> Record:
        """The last calibration, which must be there with the digest it had.

        Raises:
            QmambaError: none was recorded.
            ArtifactError: the record or the artifact is damaged, or the artifact vanished or was replaced.
        """
        record = self._require("calibration", self.last_calibration())
        with reading(record.path):
            recover_directory(record.path)
        if not record.path.exists():
            raise self._vanished("calibration", record)
        return self._unchanged("calibration", record, _digest("calibration", record.path))

    def resolve_export(self) -> Record:
        """The last export, which must be there with the digest it had; errors as for the calibration."""
        record = self._require("export", self.last_export())
        if not record.path.exists():
            raise self._vanished("export", record)
        return self._unchanged("export", record, _digest("export", record.path))

    def _require(self, what: str, record: Record | None) -> Record:
        if record is None:
            raise QmambaError(
                f"work folder `{self.path}` has no {what} on record",
                hint=f"run `{_STAGE[what]}` first, or name one with `{_OPTION[what]}`",
            )
        return record

    def _vanished(self, what: str, record: Record) -> ArtifactError:
        return ArtifactError(
            f"the {what} on record in `{self.path}` is gone, expected it at `{record.path}`",
            hint=f"run `{_STAGE[what]}` again, or name one with `{_OPTION[what]}`",
        )

    def _unchanged(self, what: str, record: Record, digest: str) -> Record:
        if digest != record.digest:
            raise ArtifactError(
                f"`{record.path}` is not the {what} on record in `{self.path}`, got digest {digest}, "
                f"expected {record.digest}",
                hint=f"run `{_STAGE[what]}` again, or name it with `{_OPTION[what]}` if the change was meant",
            )
        return record

    def _record(self, what: _Kind, path: Path, digest: str) -> None:
        # Links are followed first: `..` from behind a link leads elsewhere.
        relative = os.path.relpath(os.path.realpath(path), os.path.realpath(self.path))
        entry = _Entry(path=Path(relative).as_posix(), digest=digest)
        with atomic_file(self.path / RECORD, force=True, patience=_PATIENCE) as temporary:
            # Read under the lock, so that two stages that end together lose neither record.
            state = self._read().model_copy(update={what: entry})
            # Of two that wrote the same path one after the other, only the last may record it.
            if path.exists() and (found := _digest(what, path)) != digest:
                raise QmambaError(
                    f"`{path}` was replaced by another process before it was recorded, got digest {found}, "
                    f"expected {digest}",
                    hint="run the command again if this one is meant, or choose another path or `--workdir`",
                )
            temporary.write_text(canonical_json(state.model_dump(mode="json")) + "\n", encoding="ascii")

    def _last(self, entry: _Entry | None) -> Record | None:
        if entry is None:
            return None
        found = Path(os.path.normpath(Path(os.path.realpath(self.path), entry.path)))
        here = Path(os.path.realpath(Path.cwd()))
        return Record(found.relative_to(here) if found.is_relative_to(here) else found, entry.digest)

    def _read(self) -> _State:
        path = self.path / RECORD
        hint = f"remove `{path}` and name the artifacts with `--calibration` and `--checkpoint`"
        with reading(path):
            try:
                with path.open("rb") as file:
                    data = file.read(_MAX_BYTES)
            except FileNotFoundError:
                return _State()
        try:
            document = strict_json(data)
            version = document.get("format_version") if isinstance(document, dict) else None
            if type(version) is int and version > _VERSION:
                raise ArtifactError(
                    f"`{path}` has format version {version}, expected {_VERSION}",
                    hint="`pip install --upgrade qmamba-cli`, or choose another `--workdir`",
                )
            return _State.model_validate_json(data)
        except ValidationError as error:
            raise ArtifactError(f"`{path}` is damaged, got: {error.errors()[0]['msg']}", hint=hint) from None
        except ValueError as error:
            raise ArtifactError(f"`{path}` is damaged, got: {error}", hint=hint) from None


def _digest(what: _Kind, path: Path) -> str:
    """Content digest that an artifact states."""
    if what == "calibration":
        return read_calibration_manifest(path).content_digest
    return read_quantized_manifest(path).content_digest
