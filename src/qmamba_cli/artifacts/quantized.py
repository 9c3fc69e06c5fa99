"""The quantized artifact: all a run needs, in one safetensors file or in a folder for the Hub.

In one file the manifest is the only metadata key, and the tokenizer's files lie among the tensors as bytes;
`folder` has the other form. Both have the same manifest, and so the same digest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmamba_cli.artifacts.entries import FILES_PREFIX, check_contents, check_entries
from qmamba_cli.artifacts.files import atomic_file, reading, recover_directory
from qmamba_cli.artifacts.folder import MANIFEST, read_folder
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
from qmamba_cli.artifacts.spool import Tensors, at_hand
from qmamba_cli.errors import ArtifactError, QmambaError

if TYPE_CHECKING:
    import torch

METADATA_KEY = "qmamba"
_HINT_MISSING = "make one with `qmamba export --out FILE`, or name one with `--checkpoint FILE`"


class QuantizedArtifact:
    """An open quantized model; tensors are read when they are asked for.

    Args:
        path: the file or folder, as given.
        manifest: its checked manifest.
        stores: name of a model's tensor → the open file it lies in.
        files: name → content of the tokenizer's files.
    """

    def __init__(
        self,
        path: Path,
        manifest: QuantizedManifest,
        stores: Mapping[str, SafetensorsFile],
        files: Mapping[str, bytes],
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.files = dict(files)
        self._stores = stores

    @property
    def digest(self) -> str:
        """Content digest, which stands for the whole artifact in either form."""
        return self.manifest.content_digest

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's tensors, sorted; the tokenizer's files are not among them."""
        return tuple(sorted(self._stores))

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of one tensor.

        Raises:
            ArtifactError: there is no such tensor.
        """
        return self._store(name).info(name)

    def tensor(self, name: str) -> "torch.Tensor":
        """One tensor on the CPU, without a copy; changing it does not change the file.

        Raises:
            ArtifactError: there is no such tensor.
        """
        return self._store(name).tensor(name)

    def numpy(self, name: str) -> npt.NDArray[Any]:
        """One tensor as a read-only array without a copy; BF16 as its bits in uint16.

        Raises:
            ArtifactError: there is no such tensor.
        """
        return self._store(name).numpy(name)

    def _store(self, name: str) -> SafetensorsFile:
        try:
            return self._stores[name]
        except KeyError:
            raise ArtifactError(f"tensor `{name}` is missing from `{self.path}`") from None


def write_quantized(
    path: Path,
    *,
    tensors: Tensors,
    files: Mapping[str, bytes],
    manifest: QuantizedManifest,
    force: bool = False,
) -> QuantizedManifest:
    """Write the file; equal input gives equal bytes. One tensor's copy is held at a time.

    Args:
        path: the file.
        tensors: name → array, tensor or `LazyTensor`; or pairs of them as they are made, which are put aside
            on the disk of ``path`` until all are there.
        files: name → content of the tokenizer's files, those of ``manifest.model.tokenizer_files``.
        manifest: its `tensors` and `content_digest` are filled in here.
        force: whether an existing file may be replaced.

    Returns:
        The manifest as written.

    Raises:
        QmambaError: the file exists and ``force`` is false, or cannot be written.
        ValueError: a name cannot be used, or the files are not those of the manifest.
    """
    check_contents({}, files, manifest)
    written = manifest
    with (
        atomic_file(path, force=force) as temporary,
        at_hand(tensors, temporary.parent, temporary.name) as ready,
    ):
        check_contents(ready, files, manifest)
        contents: dict[str, TensorSource] = dict(ready)
        contents.update(
            {f"{FILES_PREFIX}{name}": np.frombuffer(data, dtype=np.uint8) for name, data in files.items()}
        )
        infos = {name: describe(value) for name, value in contents.items()}

        def metadata(digests: Mapping[str, str]) -> dict[str, str]:
            nonlocal written
            written = manifest.sealed(tensors=tensor_records(infos, digests))
            return {METADATA_KEY: written.to_json()}

        write_safetensors(temporary, contents, metadata)
    return written


def read_quantized(path: Path, *, verify: bool = True) -> QuantizedArtifact:
    """Open a quantized file or folder and check it in the order of docs/artifact-format.md.

    Args:
        path: the file or folder.
        verify: whether the data is read once and its digests compared.

    Raises:
        QmambaError: there is no such file, or it cannot be read.
        ArtifactError: it is no quantized model, of another version, or damaged.
    """
    if is_model_folder(path):
        manifest, stores, files = read_folder(path, verify=verify)
        return QuantizedArtifact(path, manifest, stores, files)
    file, manifest = _open(path)
    _check(file, manifest, verify=verify)
    entries = {name.removeprefix(FILES_PREFIX): name for name in file.names if name.startswith(FILES_PREFIX)}
    return QuantizedArtifact(
        path,
        manifest,
        {name: file for name in file.names if not name.startswith(FILES_PREFIX)},
        {plain: bytes(file.bytes(name)) for plain, name in entries.items()},
    )


def read_quantized_manifest(path: Path) -> QuantizedManifest:
    """Read the manifest, checked against its own digest and the header; the data is not read.

    Raises:
        QmambaError: there is no such file, or it cannot be read.
        ArtifactError: it is no quantized model, of another version, or its header is damaged.
    """
    if is_model_folder(path):
        return read_folder(path, verify=False)[0]
    file, manifest = _open(path)
    _check(file, manifest, verify=False)
    return manifest


def is_model_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with the manifest of a quantized model."""
    with reading(path):
        recover_directory(path)
        return path.is_dir() and (path / MANIFEST).exists()


def _open(path: Path) -> tuple[SafetensorsFile, QuantizedManifest]:
    with reading(path):
        if not path.exists():
            raise QmambaError(f"quantized file `{path}` does not exist", hint=_HINT_MISSING)
        if path.is_dir():
            raise ArtifactError(
                f"`{path}` is a folder without `{MANIFEST}`, expected a quantized file or model folder",
                hint=_HINT_MISSING,
            )
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
    check_tensors(file, manifest.tensors, remedy=manifest.REMEDY, verify=verify)
    check_digest(manifest, str(file.path))
    check_entries(manifest, str(file.path))
