"""The quantized artifact: one safetensors file that holds all a run needs.

The manifest is the only metadata key; the tokenizer's files lie among the tensors as bytes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmamba_cli.artifacts.files import atomic_file, reading, sha256_bytes, shown
from qmamba_cli.artifacts.manifest import (
    QuantizedManifest,
    check_digest,
    check_tensors,
    parse_manifest,
    tensor_records,
)
from qmamba_cli.artifacts.safetensors_header import TensorInfo
from qmamba_cli.artifacts.safetensors_io import (
    SafetensorsFile,
    TensorSource,
    describe,
    open_safetensors,
    write_safetensors,
)
from qmamba_cli.errors import ArtifactError, QmambaError

if TYPE_CHECKING:
    import torch

METADATA_KEY = "qmamba"
FILES_PREFIX = "files/"
# A plain name: it can never point out of the folder it might be written to.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HINT_MISSING = "make one with `qmamba export --out FILE`, or name one with `--checkpoint FILE`"


class QuantizedArtifact:
    """An open quantized file; tensors are read when they are asked for.

    Args:
        file: the open file.
        manifest: its checked manifest.
    """

    def __init__(self, file: SafetensorsFile, manifest: QuantizedManifest) -> None:
        self.manifest = manifest
        self._file = file

    @property
    def path(self) -> Path:
        """The file, as given."""
        return self._file.path

    @property
    def digest(self) -> str:
        """Content digest, which stands for the whole file."""
        return self.manifest.content_digest

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's tensors, sorted; the tokenizer's files are not among them."""
        return tuple(sorted(name for name in self._file.names if not name.startswith(FILES_PREFIX)))

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of one tensor.

        Raises:
            ArtifactError: there is no such tensor.
        """
        return self._file.info(name)

    def tensor(self, name: str) -> "torch.Tensor":
        """One tensor on the CPU, without a copy; changing it does not change the file.

        Raises:
            ArtifactError: there is no such tensor.
        """
        return self._file.tensor(name)

    def numpy(self, name: str) -> npt.NDArray[Any]:
        """One tensor as a read-only array without a copy; BF16 as its bits in uint16.

        Raises:
            ArtifactError: there is no such tensor.
        """
        return self._file.numpy(name)

    @property
    def files(self) -> dict[str, bytes]:
        """Name → content of the tokenizer's files."""
        return {
            name.removeprefix(FILES_PREFIX): bytes(self._file.bytes(name))
            for name in self._file.names
            if name.startswith(FILES_PREFIX)
        }


def write_quantized(
    path: Path,
    *,
    tensors: Mapping[str, TensorSource],
    files: Mapping[str, bytes],
    manifest: QuantizedManifest,
    force: bool = False,
) -> QuantizedManifest:
    """Write the file; equal input gives equal bytes. One tensor's copy is held at a time.

    Args:
        path: the file.
        tensors: name → array, tensor or `LazyTensor`.
        files: name → content of the tokenizer's files, those of ``manifest.model.tokenizer_files``.
        manifest: its `tensors` and `content_digest` are filled in here.
        force: whether an existing file may be replaced.

    Returns:
        The manifest as written.

    Raises:
        QmambaError: the file exists and ``force`` is false, or cannot be written.
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
    contents: dict[str, TensorSource] = dict(tensors)
    contents.update(
        {f"{FILES_PREFIX}{name}": np.frombuffer(data, dtype=np.uint8) for name, data in files.items()}
    )
    infos = {name: describe(value) for name, value in contents.items()}
    written = manifest

    def metadata(digests: Mapping[str, str]) -> dict[str, str]:
        nonlocal written
        written = manifest.sealed(tensors=tensor_records(infos, digests))
        return {METADATA_KEY: written.to_json()}

    with atomic_file(path, force=force) as temporary:
        write_safetensors(temporary, contents, metadata)
    return written


def read_quantized(path: Path, *, verify: bool = True) -> QuantizedArtifact:
    """Open a file and check it in the order of docs/artifact-format.md.

    Args:
        path: the file.
        verify: whether the data is read once and its digests compared.

    Raises:
        QmambaError: there is no such file, or it cannot be read.
        ArtifactError: it is no quantized file, of another version, or damaged.
    """
    file, manifest = _open(path)
    _check(file, manifest, verify=verify)
    return QuantizedArtifact(file, manifest)


def read_quantized_manifest(path: Path) -> QuantizedManifest:
    """Read the manifest, checked against its own digest and the header; the data is not read.

    Raises:
        QmambaError: there is no such file, or it cannot be read.
        ArtifactError: it is no quantized file, of another version, or its header is damaged.
    """
    file, manifest = _open(path)
    _check(file, manifest, verify=False)
    return manifest


def _open(path: Path) -> tuple[SafetensorsFile, QuantizedManifest]:
    with reading(path):
        if not path.exists():
            raise QmambaError(f"quantized file `{path}` does not exist", hint=_HINT_MISSING)
        if path.is_dir():
            raise ArtifactError(f"`{path}` is a folder, expected a quantized file", hint=_HINT_MISSING)
    file = open_safetensors(path)
    if METADATA_KEY not in file.metadata:
        raise ArtifactError(
            f"`{path}` is a safetensors file but no quantized one, got no `{METADATA_KEY}` in its metadata",
            hint=_HINT_MISSING,
        )
    # A lone half of a surrogate pair was refused with the header, so this cannot fail.
    data = file.metadata[METADATA_KEY].encode("utf-8")
    return file, parse_manifest(QuantizedManifest, data, str(path))


def _check(file: SafetensorsFile, manifest: QuantizedManifest, *, verify: bool) -> None:
    """What the manifest and the header must agree on, then the digests."""
    if len(file.metadata) != 1:
        raise ArtifactError(
            f"`{file.path}` has other metadata beside `{METADATA_KEY}`, expected none", hint=manifest.REMEDY
        )
    stored = {}
    for name, record in manifest.tensors.items():
        if name.startswith(FILES_PREFIX):
            if not _FILE_NAME.fullmatch(name.removeprefix(FILES_PREFIX)) or record.dtype != "U8":
                raise ArtifactError(
                    f"`{shown(name)}` of `{file.path}` is no valid file entry, expected a plain name and U8",
                    hint=manifest.REMEDY,
                )
            stored[name.removeprefix(FILES_PREFIX)] = record.sha256
    check_tensors(file, manifest.tensors, remedy=manifest.REMEDY, verify=verify)
    check_digest(manifest, str(file.path))
    if stored != manifest.model.tokenizer_files:
        raise ArtifactError(
            f"the tokenizer files of `{file.path}` are not those its manifest names", hint=manifest.REMEDY
        )
