"""Weight files of a source checkpoint: what is stored where, read one tensor at a time.

Opening a file reads its table of contents only. A tensor of a safetensors file is read with plain reads:
torch's private mapping counts against the memory a machine may promise, so a file larger than that would not
open. A ``pytorch_model.bin`` in torch's zip format is mapped; one from before torch 1.6 is held in memory.
Pickles are read with weights-only loading, so that no code in them runs.
"""

import hashlib
import json
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from qmamba_cli.artifacts.files import json_excess
from qmamba_cli.artifacts.safetensors_header import MAX_HEADER_BYTES
from qmamba_cli.errors import CheckpointError

# (one file, index of a sharded set), the preferred format first.
WEIGHT_FORMATS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ZIP_MAGIC = b"PK\x03\x04"
_LFS_MAGIC = b"version https://git-lfs"
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")
_DOWNLOAD_AGAIN = "the file is damaged or incomplete; copy or download it again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its file describes it.

    Attributes:
        shape: its dimensions.
        dtype: ``float32`` and the like for floating types of 16 bits and more, else the file's own word.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        """Whether the values are floating point numbers of 16, 32 or 64 bits."""
        return self.dtype in _FLOAT_DTYPES.values()


class WeightFile(Protocol):
    """One file of named tensors.

    Attributes:
        path: where it lies.
        tensors: what it holds, by stored name.
    """

    path: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> torch.Tensor:
        """The tensor stored as ``name``, dense, on the CPU, in the stored dtype."""
        ...


class SafetensorsFile:
    """A ``.safetensors`` file.

    Args:
        path: the file.
        label: how messages name it.

    Raises:
        CheckpointError: the file cannot be read or is no whole safetensors file.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self._label = label
        try:
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                text = file.read(min(header_bytes, MAX_HEADER_BYTES + 1))
            # Before the library, which would parse a hundred megabytes.
            if len(text) > MAX_HEADER_BYTES or json_excess(text):
                raise ValueError(f"a header of {header_bytes} bytes that describes more than any model has")
            # The library's checks of the header and of the file's length; the mapping it makes is read-only.
            with safe_open(path, framework="np"):
                pass
            header = json.loads(text)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{label} cannot be read, got `{error}`, expected a whole safetensors file",
                hint=_DOWNLOAD_AGAIN,
            ) from None
        rows = {name: row for name, row in header.items() if name != "__metadata__"}
        self.tensors = {
            name: StoredTensor(tuple(row["shape"]), _FLOAT_DTYPES.get(row["dtype"], row["dtype"]))
            for name, row in rows.items()
        }
        self._starts = {name: 8 + header_bytes + row["data_offsets"][0] for name, row in rows.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor stored as ``name``, which must be of a floating type, in memory of its own.

        Raises:
            CheckpointError: the file changed since it was opened.
        """
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        content = tensor.view(-1).view(torch.uint8).numpy().data
        try:
            with self.path.open("rb") as file:
                file.seek(self._starts[name])
                got = file.readinto(content)
        except OSError as error:
            got, reason = -1, str(error.strerror)
        else:
            reason = f"{got} bytes"
        if got != content.nbytes:
            raise CheckpointError(
                f"`{name}` of {self._label} cannot be read, got {reason}, expected {content.nbytes} bytes",
                hint="the file changed while it was in use; start again",
            )
        return tensor


class PickledFile:
    """A ``.bin`` file written by ``torch.save``, unpickled with weights-only loading.

    Args:
        path: the file.
        label: how messages name it.

    Raises:
        CheckpointError: the file cannot be read, would run code, or holds anything but tensors by name.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self._tensors = _check_state_dict(_unpickle(path, label), label)
        self.tensors = {
            name: StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """A contiguous copy of the tensor stored as ``name``."""
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)


def _unpickle(path: Path, label: str) -> Any:
    """The object in a ``torch.save`` file, by torch's restricted unpickler."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        with warnings.catch_warnings():
            # Odd pickle protocols, which are refused or read; nothing a user could act on.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = _REFUSED_GLOBAL.search(str(error))
        what = (
            f"a reference to `{found.group(1)}`" if found else "a pickle that is not a plain dict of tensors"
        )
        raise CheckpointError(
            f"{label} is refused because reading it could run code, got {what}, expected tensors only",
            hint="get the weights as safetensors; an untrusted pickle must not be loaded",
        ) from None
    except Exception as error:
        # Damaged bytes make the unpickler raise nearly any class.
        first_line = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{label} cannot be read, got `{type(error).__name__}: {first_line}`, "
            "expected a file written by `torch.save`",
            hint=_DOWNLOAD_AGAIN,
        ) from None


def _check_state_dict(state: Any, label: str) -> dict[str, torch.Tensor]:
    """Refuse anything but a dict from names to dense tensors."""
    hint = "save `model.state_dict()`, or use safetensors"
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{label} holds no state dict, got `{type(state).__name__}`, expected a dict of tensors by name",
            hint=hint,
        )
    for name, value in state.items():
        dense = (
            isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        )
        if not isinstance(name, str) or not dense:
            raise CheckpointError(
                f"{label}: bad entry `{name}`, got `{type(value).__name__}`, expected a dense tensor",
                hint=hint,
            )
    return dict(state)


def open_weight_files(folder: Path, source: str) -> list[WeightFile]:
    """Open every weight file of a checkpoint folder, safetensors before pickles, one file before shards.

    Args:
        folder: the checkpoint.
        source: how messages name it.

    Raises:
        CheckpointError: there are no weights, a shard is missing, or a file cannot be read.
    """
    for single, index in WEIGHT_FORMATS:
        if (folder / single).is_file():
            return [_open_weight_file(folder / single, source)]
        if (folder / index).is_file():
            return [_open_weight_file(folder / name, source) for name in _shards(folder, index, source)]
    expected = ", ".join(f"`{name}`" for row in WEIGHT_FORMATS for name in row)
    raise CheckpointError(
        f"no weights in `{source}`, expected one of {expected}",
        hint="download the weight files into the same folder as config.json",
    )


def _open_weight_file(path: Path, source: str) -> WeightFile:
    label = f"`{path.name}` of `{source}`"
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_MAGIC)) == _LFS_MAGIC
    except OSError as error:
        raise CheckpointError(
            f"{label} cannot be read, got `{error.strerror}`, expected a weight file"
        ) from None
    if is_pointer:
        raise CheckpointError(
            f"{label} is a Git LFS pointer, expected the weights themselves",
            hint="run `git lfs pull` in the folder it was cloned to",
        )
    return SafetensorsFile(path, label) if path.suffix == ".safetensors" else PickledFile(path, label)


def _shards(folder: Path, index: str, source: str) -> list[str]:
    """File names that a shard index lists, sorted, all present."""
    try:
        document = json.loads((folder / index).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"`{index}` of `{source}` cannot be read, got `{error}`, expected JSON", hint=_DOWNLOAD_AGAIN
        ) from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"`{index}` of `{source}` has no `weight_map`, expected tensor names mapped to files",
            hint=_DOWNLOAD_AGAIN,
        )
    suffix = Path(index.removesuffix(".index.json")).suffix
    for name in weight_map.values():
        # A shard lies beside its index: an index must not make us open other files of the machine.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(
                f"`{index}` of `{source}`: bad shard name, got `{name}`, "
                f"expected a `*{suffix}` file in the same folder"
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        listed = ", ".join(f"`{name}`" for name in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards of `{source}` are missing: {listed}",
            hint="download the missing files into the same folder",
        )
    return names


def sha256_of_file(path: Path, source: str) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in pieces.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"`{path.name}` of `{source}` cannot be read, got `{error.strerror}`, expected a weight file"
        ) from None
