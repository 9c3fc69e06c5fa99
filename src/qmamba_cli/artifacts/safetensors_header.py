"""The header of a safetensors file: its rules, its limits, and one spelling of it.

A header is text from anyone. Every length is compared with the file's size before anything of that length is
touched, so a hostile one costs no more than its own bytes.

Source: the format of huggingface/safetensors (README, "Format"); the order of tensors, the alignment and the
limits are ours, see docs/artifact-format.md.
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qmamba_cli.artifacts.files import shown, strict_json
from qmamba_cli.errors import ArtifactError

# The data starts at a multiple of this, and so does every tensor whose size is one.
ALIGNMENT = 64
# Ten times what a model of 64 layers needs; `files.json_excess` bounds what may be in it.
MAX_HEADER_BYTES = 1 << 22
MAX_RANK = 8
# Bounds the product of the dimensions, empty ones left out, so that no stride overflows.
MAX_ELEMENTS = 1 << 40
LENGTH_BYTES = 8
METADATA = "__metadata__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtype:
    """One element type: bytes an element, and its names in NumPy and torch.

    NumPy has no bfloat16; such tensors are read as their bits, in uint16.
    """

    size: int
    numpy: str
    torch: str


# BOOL is left out: a byte that is neither 0 nor 1 would have no meaning.
DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        "U8": Dtype(size=1, numpy="u1", torch="uint8"),
        "I8": Dtype(size=1, numpy="i1", torch="int8"),
        "I16": Dtype(size=2, numpy="<i2", torch="int16"),
        "U16": Dtype(size=2, numpy="<u2", torch="uint16"),
        "F16": Dtype(size=2, numpy="<f2", torch="float16"),
        "BF16": Dtype(size=2, numpy="<u2", torch="bfloat16"),
        "I32": Dtype(size=4, numpy="<i4", torch="int32"),
        "U32": Dtype(size=4, numpy="<u4", torch="uint32"),
        "F32": Dtype(size=4, numpy="<f4", torch="float32"),
        "I64": Dtype(size=8, numpy="<i8", torch="int64"),
        "U64": Dtype(size=8, numpy="<u8", torch="uint64"),
        "F64": Dtype(size=8, numpy="<f8", torch="float64"),
    }
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        dtype: a key of `DTYPES`.
        shape: dimensions, outermost first; empty for a scalar.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return DTYPES[self.dtype].size * math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header.

    Attributes:
        infos: name → dtype and shape, in the order of the data.
        offsets: name → first byte and one past the last, counted from the start of the file.
        metadata: the strings under ``__metadata__``.
        stored: length and header as they are in the file.
    """

    infos: Mapping[str, TensorInfo]
    offsets: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]
    stored: bytes

    @property
    def canonical(self) -> bool:
        """Whether the header is spelled and ordered as `write_safetensors` does it."""
        return self.stored == render_header(self.infos, self.metadata)


def parse_header(data: "bytes | mmap.mmap", source: str) -> Header:
    """Check the header of a whole safetensors file.

    Args:
        data: the file.
        source: how messages name it.

    Raises:
        ArtifactError: a rule of the format or a limit is broken; the first one found speaks.
    """
    size = len(data)
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        limit = min(MAX_HEADER_BYTES, max(size - LENGTH_BYTES, 0))
        raise ArtifactError(
            f"`{source}` is no safetensors file or is cut short, got a header of {length} bytes, "
            f"expected at most {limit}",
            hint="copy the file again, or make it again",
        )
    start = LENGTH_BYTES + length
    text = data[LENGTH_BYTES:start]
    try:
        document = strict_json(text)
    except ValueError as error:
        raise ArtifactError(f"the header of `{source}` is not valid JSON, got: {error}") from None
    if not isinstance(document, dict):
        raise ArtifactError(f"the header of `{source}` is not a JSON object")
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError(f"`{METADATA}` of `{source}` must map strings to strings")
    entries = {name: _parse_entry(name, entry, size - start, source) for name, entry in document.items()}
    ordered = sorted(entries.items(), key=lambda item: item[1][1])
    _require_contiguous([(name, offsets) for name, (_, offsets) in ordered], size - start, source)
    infos = {name: info for name, (info, _) in ordered}
    return Header(
        infos=MappingProxyType(infos),
        offsets=MappingProxyType({name: (start + begin, start + end) for name, (_, (begin, end)) in ordered}),
        metadata=MappingProxyType(metadata),
        stored=bytes(data[:start]),
    )


def _parse_entry(name: str, entry: object, available: int, source: str) -> tuple[TensorInfo, tuple[int, int]]:
    """Dtype, shape and data offsets of one tensor, each checked by itself and against the others."""
    where = f"tensor `{shown(name)}` of `{source}`"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where} must have exactly the keys `dtype`, `shape` and `data_offsets`")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        got = shown(dtype) if isinstance(dtype, str) else type(dtype).__name__
        raise ArtifactError(f"{where} has dtype `{got}`, expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise ArtifactError(f"{where} has no valid shape, expected at most {MAX_RANK} integers of 0 or more")
    elements = 1
    for dimension in shape:
        elements *= max(dimension, 1)
        if elements > MAX_ELEMENTS:
            raise ArtifactError(f"{where} is too large, expected at most {MAX_ELEMENTS} elements")
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
        raise ArtifactError(
            f"{where} has no valid data offsets, expected 0 <= begin <= end <= {available}",
            hint="the file is cut short or damaged; copy it again, or make it again",
        )
    info = TensorInfo(dtype, tuple(shape))
    begin, end = offsets
    if end - begin != info.nbytes:
        raise ArtifactError(
            f"{where} has {end - begin} bytes of data, expected {info.nbytes} for {dtype} {shape}"
        )
    return info, (begin, end)


def _are_sizes(values: object) -> bool:
    """Whether this is a list of integers of 0 or more (a JSON true is none)."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _require_contiguous(spans: list[tuple[str, tuple[int, int]]], available: int, source: str) -> None:
    """The tensors, in the order of their offsets, must cover the data once and wholly."""
    cursor = 0
    for name, (begin, end) in spans:
        if begin != cursor:
            fault = "overlaps the one before it" if begin < cursor else "leaves a gap before it"
            raise ArtifactError(
                f"tensor `{shown(name)}` of `{source}` {fault}, got offset {begin}, expected {cursor}"
            )
        cursor = end
    if cursor != available:
        raise ArtifactError(
            f"the tensors of `{source}` take {cursor} bytes, got {available} bytes of data",
            hint="the file was cut or something was added to it; copy it again, or make it again",
        )


def data_order(name: str, info: TensorInfo) -> tuple[bool, int, str]:
    """Sort key of the order in which tensors are written."""
    # Whole multiples of the alignment first keep each other aligned; behind them, from wide elements to
    # narrow ones, every element is aligned to its own size.
    return info.nbytes % ALIGNMENT != 0, -DTYPES[info.dtype].size, name


def render_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and header as the writer spells them: metadata first, then the tensors as they lie.

    Args:
        infos: name → dtype and shape, in the order of the data.
        metadata: strings for ``__metadata__``, left out when there are none.
    """
    document: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    cursor = 0
    for name, info in infos.items():
        end = cursor + info.nbytes
        document[name] = {"data_offsets": [cursor, end], "dtype": info.dtype, "shape": list(info.shape)}
        cursor = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    padding = -(LENGTH_BYTES + len(text)) % ALIGNMENT
    return (len(text) + padding).to_bytes(LENGTH_BYTES, "little") + text + b" " * padding
