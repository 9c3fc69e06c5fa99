"""The tokenizer's files as entries of a quantized model, in either of its forms."""

import re
from collections.abc import Mapping
from typing import Final

from qmamba_cli.artifacts.files import sha256_bytes, shown
from qmamba_cli.artifacts.manifest import QuantizedManifest
from qmamba_cli.artifacts.records import TensorRecord
from qmamba_cli.errors import ArtifactError

FILES_PREFIX: Final = "files/"
# A plain name: it can never point out of the folder it might be written to.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_contents(
    tensors: Mapping[str, object], files: Mapping[str, bytes], manifest: QuantizedManifest
) -> None:
    """Refuse to write what no reader would take.

    Raises:
        ValueError: a name cannot be used, or the files are not those of the manifest.
    """
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"file name `{name}` cannot be used in a quantized file")
    if {name: sha256_bytes(data) for name, data in files.items()} != manifest.model.tokenizer_files:
        raise ValueError("the files are not those of `model.tokenizer_files` in the manifest")
    taken = [name for name in tensors if name.startswith(FILES_PREFIX)]
    if taken:
        raise ValueError(f"tensor `{taken[0]}` begins with `{FILES_PREFIX}`, which is kept for files")


def file_records(files: Mapping[str, bytes]) -> dict[str, TensorRecord]:
    """The manifest's records of the files, by entry name."""
    return {
        f"{FILES_PREFIX}{name}": TensorRecord(dtype="U8", shape=(len(data),), sha256=sha256_bytes(data))
        for name, data in files.items()
    }


def check_entries(manifest: QuantizedManifest, source: str) -> None:
    """Hold the entries of the files against each other.

    Args:
        manifest: as it was read.
        source: the artifact's path, for messages.

    Raises:
        ArtifactError: an entry has no plain name, is no bytes, or is not one of `model.tokenizer_files`.
    """
    stored = {}
    for name, record in manifest.tensors.items():
        if not name.startswith(FILES_PREFIX):
            continue
        plain = name.removeprefix(FILES_PREFIX)
        if not _FILE_NAME.fullmatch(plain) or record.dtype != "U8" or len(record.shape) != 1:
            raise ArtifactError(
                f"`{shown(name)}` of `{source}` is no valid file entry, expected a plain name and U8",
                hint=manifest.REMEDY,
            )
        stored[plain] = record.sha256
    if stored != manifest.model.tokenizer_files:
        raise ArtifactError(
            f"the tokenizer files of `{source}` are not those its manifest names", hint=manifest.REMEDY
        )
