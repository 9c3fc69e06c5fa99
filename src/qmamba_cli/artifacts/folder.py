"""A quantized model as a folder for the Hub: config.json, shards with an index, tokenizer files, a card.

The manifest is that of the one file, byte for byte, in ``qmamba.json``: what is quantized does not depend on
how it is packed, so both forms have one digest and results of either belong to both.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

from qmamba_cli.artifacts.checkpoint_config import huggingface_config
from qmamba_cli.artifacts.entries import FILES_PREFIX, check_contents, check_entries, file_records
from qmamba_cli.artifacts.files import (
    atomic_directory,
    reading,
    sha256_bytes,
    shown,
    strict_json,
)
from qmamba_cli.artifacts.manifest import (
    QuantizedManifest,
    check_digest,
    check_tensors,
    parse_manifest,
    tensor_records,
)
from qmamba_cli.artifacts.safetensors_header import DTYPES, MAX_HEADER_BYTES, TensorInfo
from qmamba_cli.artifacts.safetensors_io import (
    SafetensorsFile,
    TensorSource,
    describe,
    open_safetensors,
    write_safetensors,
)
from qmamba_cli.artifacts.spool import Tensors, at_hand
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ArtifactError

MANIFEST: Final = "qmamba.json"
CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
CARD: Final = "README.md"
WHOLE: Final = "model.safetensors"
SUMS: Final = "SHA256SUMS"
# A folder of an older version may lack its sums.
_SUMS_SINCE: Final = 2
# What has no digest anywhere else, and the manifest, so that the sums of another folder are none of this one.
_SUMMED: Final = (CARD, CONFIG, MANIFEST)
# The customary size of a shard, in bytes: the Hub serves files up to some ten times that.
MAX_SHARD_BYTES = 5 * 10**9
_FIXED_NAMES: Final = (MANIFEST, CONFIG, WHOLE, INDEX, CARD, SUMS)
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# What transformers writes as well, so that other readers take the shards for what they are.
_SHARD_METADATA = {"format": "pt"}
# A tokenizer of a million tokens takes a tenth of it.
_MAX_FILE_BYTES = 1 << 28
_MAX_SUMS_BYTES = 1 << 10
# Makes the text of the model card from the sealed manifest.
Card = Callable[[QuantizedManifest], str]


def known_entries(path: Path, files: Collection[str] = ()) -> tuple[str, ...]:
    """Names in a model folder that may be replaced with it, for `files.check_output`.

    Args:
        path: the folder, which need not exist.
        files: names of tokenizer files.
    """
    fixed: tuple[str, ...] = (*_FIXED_NAMES, *files)
    with reading(path):
        found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if MANIFEST in found:
        # The tokenizer of the model that is there may have had other files.
        with contextlib.suppress(ArtifactError):
            fixed += tuple(_read_manifest(path).model.tokenizer_files)
        fixed += tuple(name for name in found if _SHARD_NAME.fullmatch(name))
    return fixed


def write_folder(
    path: Path,
    *,
    tensors: Tensors,
    files: Mapping[str, bytes],
    manifest: QuantizedManifest,
    card: Card,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
) -> QuantizedManifest:
    """Write the folder as a whole or not at all; equal input gives equal bytes in every file.

    Args:
        path: the folder.
        tensors: as for `write_quantized`; shards take them in this order.
        files: name → content of the tokenizer's files, those of ``manifest.model.tokenizer_files``.
        manifest: its `tensors` and `content_digest` are filled in here.
        card: makes the model card.
        max_shard_bytes: data of a shard; a single tensor that is larger has a shard of its own.
        force: whether an existing model folder may be replaced; one with other files in it never is.

    Returns:
        The manifest as written, that of the one file with the same tensors.

    Raises:
        QmambaError: the folder exists and may not be replaced, or cannot be written.
        ValueError: a name cannot be used, or the files are not those of the manifest.
    """
    check_contents({}, files, manifest)
    for name in files:
        if name in _FIXED_NAMES or _SHARD_NAME.fullmatch(name):
            raise ValueError(f"file name `{name}` is taken in a model folder")
    with (
        atomic_directory(path, force=force, known=known_entries(path, files)) as folder,
        at_hand(tensors, folder.parent, folder.name) as ready,
    ):
        check_contents(ready, files, manifest)
        infos = {name: describe(value) for name, value in ready.items()}
        digests: dict[str, str] = {}
        weight_map: dict[str, str] = {}
        for name, shard in _shards(ready, max_shard_bytes).items():
            digests |= write_safetensors(folder / name, shard, _SHARD_METADATA)
            weight_map |= dict.fromkeys(shard, name)
        written = manifest.sealed(tensors=tensor_records(infos, digests) | file_records(files))
        texts = {MANIFEST: written.to_json(), CONFIG: _config_text(written), CARD: card(written)}
        if WHOLE not in weight_map.values():
            texts[INDEX] = _index_text(weight_map, sum(info.nbytes for info in infos.values()))
        texts[SUMS] = _sums_text({name: sha256_bytes(texts[name].encode()) for name in _SUMMED})
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return written


def read_folder(
    path: Path, *, verify: bool
) -> tuple[QuantizedManifest, dict[str, SafetensorsFile], dict[str, bytes]]:
    """Open a model folder and check it in the order of docs/artifact-format.md.

    config.json and README.md are for other programs and people; neither is read here, see `check_sums`.

    Args:
        path: the folder.
        verify: whether the data is read once and its digests compared.

    Returns:
        The manifest, each tensor's shard, and the tokenizer's files.

    Raises:
        QmambaError: a file cannot be read.
        ArtifactError: it is no quantized model, of another version, or damaged.
    """
    manifest = _read_manifest(path)
    weight_map = _weight_map(path, manifest)
    shards = {name: _open_shard(path, name) for name in sorted(set(weight_map.values()))}
    for name, file in shards.items():
        records = {tensor: manifest.tensors[tensor] for tensor, shard in weight_map.items() if shard == name}
        check_tensors(file, records, remedy=manifest.REMEDY, verify=verify)
    check_digest(manifest, str(path))
    check_entries(manifest, str(path))
    files = {name: _file(path, name, digest) for name, digest in manifest.model.tokenizer_files.items()}
    return manifest, {tensor: shards[name] for tensor, name in weight_map.items()}, files


def _read_manifest(path: Path) -> QuantizedManifest:
    data = _bounded(path / MANIFEST, MAX_HEADER_BYTES)
    return parse_manifest(QuantizedManifest, data, str(path))


def _shards(tensors: Mapping[str, TensorSource], limit: int) -> dict[str, dict[str, TensorSource]]:
    """Shard's name → its tensors, filled one after the other."""
    shards: list[dict[str, TensorSource]] = [{}]
    used = 0
    for name, value in tensors.items():
        size = describe(value).nbytes
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = value
        used += size
    if len(shards) == 1:
        return {WHOLE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def check_sums(path: Path, manifest: QuantizedManifest) -> bool:
    """Hold what the manifest has no digest of, config.json and README.md, against the folder's sums.

    Args:
        path: the folder.
        manifest: its checked manifest.

    Returns:
        Whether there are any: a folder of an older version may have none.

    Raises:
        QmambaError: a file cannot be read.
        ArtifactError: the sums are damaged or missing, or a file is or differs from them.
    """
    hint = f"copy the file again, or {manifest.REMEDY}"
    if not (path / SUMS).exists():
        if manifest.format_version < _SUMS_SINCE:
            return False
        raise ArtifactError(f"file `{SUMS}` is missing from model folder `{path}`", hint=hint)
    text = _bounded(path / SUMS, _MAX_SUMS_BYTES)
    named = {line[66:]: line[:64] for line in text.decode("ascii", "replace").splitlines()}
    if tuple(sorted(named)) != tuple(sorted(_SUMMED)) or _sums_text(named).encode("ascii", "replace") != text:
        raise ArtifactError(f"`{SUMS}` of `{path}` is not as it was written, so it was edited", hint=hint)
    for name in _SUMMED:
        _file(path, name, named[name])
    return True


def _sums_text(digests: Mapping[str, str]) -> str:
    """The lines of `sha256sum`, whose ``-c`` can check them."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def _index_text(weight_map: Mapping[str, str], total: int) -> str:
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=2, ensure_ascii=True) + "\n"


def _config_text(manifest: QuantizedManifest) -> str:
    quantization = manifest.quantization
    document: dict[str, Any] = huggingface_config(MambaConfig.from_dict(dict(manifest.model.config)))
    # Names the program, so that others refuse the folder by name instead of reading the weights wrongly.
    document["quantization_config"] = {
        "quant_method": "qmamba",
        "format": manifest.FORMAT,
        "format_version": manifest.format_version,
        "w_bits": quantization.w_bits,
        "group_size": quantization.group_size,
        "embedding_bits": quantization.embedding_bits,
        "activation_bits": 8,
    }
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=True) + "\n"


def _weight_map(path: Path, manifest: QuantizedManifest) -> dict[str, str]:
    """Tensor → shard, for exactly the tensors of the manifest, in its order."""
    tensors = [name for name in manifest.tensors if not name.startswith(FILES_PREFIX)]
    with reading(path / INDEX):
        if not (path / INDEX).exists():
            return dict.fromkeys(tensors, WHOLE)
        data = _bounded(path / INDEX, MAX_HEADER_BYTES)
    where = f"`{INDEX}` of `{path}`"
    try:
        document = strict_json(data)
    except ValueError as error:
        raise ArtifactError(f"{where} is not valid JSON, got: {error}", hint=manifest.REMEDY) from None
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict):
        raise ArtifactError(f"{where} has no `weight_map`, expected tensors and files", hint=manifest.REMEDY)
    for name in found.values():
        # A shard lies beside its index: an index must not make us open other files of the machine.
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            got = shown(name) if isinstance(name, str) else type(name).__name__
            raise ArtifactError(
                f"{where} has a bad file name, got `{got}`, expected `model-NNNNN-of-NNNNN.safetensors`",
                hint=manifest.REMEDY,
            )
    for name in sorted(found.keys() ^ set(tensors)):
        fault = "does not list" if name in manifest.tensors else "lists an unknown tensor"
        raise ArtifactError(f"{where} {fault} `{shown(name)}`", hint=manifest.REMEDY)
    total = sum(_nbytes(manifest, name) for name in tensors)
    if data != _index_text(found, total).encode("ascii"):
        raise ArtifactError(f"{where} is not as it was written, so it was edited", hint=manifest.REMEDY)
    return {name: found[name] for name in tensors}


def _nbytes(manifest: QuantizedManifest, name: str) -> int:
    record = manifest.tensors[name]
    return TensorInfo(record.dtype, record.shape).nbytes if record.dtype in DTYPES else -1


def _open_shard(path: Path, name: str) -> SafetensorsFile:
    if not (path / name).is_file():
        raise ArtifactError(
            f"file `{name}` is missing from model folder `{path}`",
            hint="copy or download the missing file into the same folder",
        )
    file = open_safetensors(path / name)
    if file.metadata != _SHARD_METADATA:
        raise ArtifactError(
            f"`{file.path}` has other metadata than {_SHARD_METADATA}", hint=QuantizedManifest.REMEDY
        )
    return file


def _file(path: Path, name: str, digest: str) -> bytes:
    """A file with a digest; the plain names of tokenizer files were checked with the manifest."""
    if not (path / name).is_file():
        raise ArtifactError(
            f"file `{name}` is missing from model folder `{path}`", hint=QuantizedManifest.REMEDY
        )
    data = _bounded(path / name, _MAX_FILE_BYTES)
    found = sha256_bytes(data)
    if found != digest:
        raise ArtifactError(
            f"`{name}` of `{path}` is damaged, got sha256 {found}, expected {digest}",
            hint=f"copy the file again, or {QuantizedManifest.REMEDY}",
        )
    return data


def _bounded(path: Path, limit: int) -> bytes:
    with reading(path), path.open("rb") as file:
        # A read sets aside all that it asks for.
        data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > limit:
        raise ArtifactError(
            f"`{path}` is too large, expected at most {limit} bytes", hint=QuantizedManifest.REMEDY
        )
    return data
