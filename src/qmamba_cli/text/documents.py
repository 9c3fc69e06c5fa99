"""Text sources with random access: jsonl, txt and parquet files, the bundled text and Hub datasets.

No source holds its text in memory: a jsonl file is an index of line offsets (8 bytes a row), a parquet file
is read one small batch of rows at a time, a txt file in pieces, a Hub dataset is memory-mapped.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from qmamba_cli.errors import DatasetError, UsageError
from qmamba_cli.resources import calib_data_path
from qmamba_cli.text.hub import load_hub_dataset

BUNDLED = "bundled"
"""The name of the text that ships with the package."""
SELF = "self"
"""The name of text sampled from the model; the caller handles it with `sample_from_model`."""

LOCAL_ALTERNATIVES = (
    "name a local file (`--dataset FILE.jsonl`, `.txt` or `.parquet`), "
    "or use `--dataset bundled` or `--dataset self`"
)
_SUFFIXES = (".jsonl", ".txt", ".parquet")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_HASH_CHUNK = 1 << 20
_PARQUET_BATCH_ROWS = 64


class Documents(ABC):
    """A sequence of texts, read when asked for.

    Attributes:
        name: the source as the user named it.
        digest: sha256 in hex, over the file's bytes; for a Hub dataset over the fingerprint that ``datasets``
            gives its revision, configuration and split.
    """

    name: str
    digest: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def __getitem__(self, index: int) -> str:
        """The text of row ``index``, 0-based.

        Raises:
            IndexError: there is no such row.
            DatasetError: the row cannot be read.
        """


def open_documents(dataset: str, *, text_column: str = "text", offline: bool = False) -> Documents:
    """Open a text source.

    Args:
        dataset: ``bundled``; a path ending in ``.jsonl`` (a JSON object a line, blank lines are passed over),
            ``.txt`` (one document) or ``.parquet``; or a Hub name ``name[:config[:split]]``, split ``train``
            unless given.
        text_column: the field or column that holds the text; ``bundled`` and ``.txt`` do not use it.
        offline: use only what is cached of a Hub dataset.

    Returns:
        The documents. A jsonl file has been checked line by line.

    Raises:
        DatasetError: the source is missing, malformed, empty or out of reach.
        UsageError: ``dataset`` cannot be a name of anything.
    """
    if dataset == BUNDLED:
        return _JsonLines(calib_data_path("calibration.jsonl"), dataset, "text")
    try:
        documents = _open_file(Path(dataset), dataset, text_column)
    except OSError as error:
        raise DatasetError(f"`{dataset}`: cannot be read, got {error.strerror or error}") from error
    return _open_hub(dataset, text_column, offline) if documents is None else documents


def _open_file(path: Path, dataset: str, text_column: str) -> Documents | None:
    """Open a local file; None where ``dataset`` neither exists nor ends as a text file's name does."""
    suffix = path.suffix.lower()
    if suffix in _SUFFIXES:
        if not path.is_file():
            raise DatasetError(f"`{dataset}`: no such file", hint=LOCAL_ALTERNATIVES)
        if suffix == ".jsonl":
            return _JsonLines(path, dataset, text_column)
        return TextFile(path, dataset) if suffix == ".txt" else _Parquet(path, dataset, text_column)
    if not path.exists():
        return None
    kind = "a folder" if path.is_dir() else f"a file ending in `{path.suffix}`"
    raise DatasetError(
        f"`{dataset}`: not a text source, got {kind}, expected a file ending in .jsonl, .txt or .parquet",
        hint=LOCAL_ALTERNATIVES,
    )


class _JsonLines(Documents):
    """A jsonl file, as an index of the offsets of its lines."""

    def __init__(self, path: Path, name: str, column: str) -> None:
        self.name = name
        self._path = path
        self._column = column
        self._starts = array("q")
        digest = hashlib.sha256()
        position = 0
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                digest.update(line)
                if not line.isspace():
                    # Every line is checked now, so that whether a file is accepted depends on no seed.
                    self._parse(line, number)
                    self._starts.append(position)
                position += len(line)
        self.digest = digest.hexdigest()
        _require_rows(self)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        with self._path.open("rb") as handle:
            handle.seek(self._starts[index])
            return self._parse(handle.readline(), None)

    def _parse(self, line: bytes, number: int | None) -> str:
        """The text of one line; ``number`` is 1-based, None where the line was checked before."""
        where = f"`{self.name}`" if number is None else f"`{self.name}`, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number in (1, None) else "utf-8"))
        except (ValueError, RecursionError) as error:
            detail = error.msg if isinstance(error, json.JSONDecodeError) else _unreadable(error)
            raise DatasetError(
                f"{where}: not JSON, got {detail}, expected one object a line",
                hint="a jsonl file holds one complete JSON object on every line",
            ) from None
        if not isinstance(row, dict):
            raise DatasetError(
                f"{where}: not an object, got {_json_kind(row)}, "
                f"expected an object with a field `{self._column}`"
            )
        if self._column not in row:
            fields = ", ".join(f"`{key}`" for key in list(row)[:8]) or "none"
            raise DatasetError(
                f"{where}: no field `{self._column}`, got {fields}",
                hint="name the field that holds the text with `--text-column`",
            )
        return _checked_text(row[self._column], f"{where}, field `{self._column}`")


class TextFile(Documents):
    """A txt file: one document, UTF-8, read in pieces."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._path = path
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            while block := handle.read(_HASH_CHUNK):
                digest.update(block)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        if index not in (0, -1):
            raise IndexError(index)
        return "".join(self.blocks(_HASH_CHUNK))

    def blocks(self, characters: int) -> Iterator[str]:
        """The text in order, ``characters`` at a time; line ends are kept, a byte order mark is dropped.

        Raises:
            DatasetError: the file is not UTF-8.
        """
        try:
            with self._path.open(encoding="utf-8-sig", newline="") as handle:
                while block := handle.read(characters):
                    yield block
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"`{self.name}`: not UTF-8, got {_unreadable(error)}", hint="convert the file to UTF-8"
            ) from None


class _Parquet(Documents):
    """A parquet file; rows are quickest in ascending order, which decodes every batch at most once."""

    def __init__(self, path: Path, name: str, column: str) -> None:
        # Imported here: needed for parquet only.
        import pyarrow
        import pyarrow.parquet

        self.name = name
        self._column = column
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            while block := handle.read(_HASH_CHUNK):
                digest.update(block)
        self.digest = digest.hexdigest()
        self._errors = (pyarrow.ArrowException, OSError)
        try:
            # A buffer instead of whole column chunks: memory stays at a few pages, however large a group is.
            self._file = pyarrow.parquet.ParquetFile(path, buffer_size=_HASH_CHUNK, pre_buffer=False)
        except self._errors as error:
            raise DatasetError(f"`{name}`: not a readable parquet file, got {_first_line(error)}") from error
        schema = self._file.schema_arrow
        _require_column(schema.names, column, name)
        kind = schema.field(column).type
        # Categories of pandas are stored so; their values come out as plain strings.
        stored = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(stored) or pyarrow.types.is_large_string(stored)):
            raise DatasetError(f"`{name}`: column `{column}` must hold strings, got {kind}")
        metadata = self._file.metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        # Row group g holds the rows from _starts[g] up to _starts[g + 1].
        self._starts: list[int] = list(accumulate(sizes, initial=0))
        self._group = -1
        self._batches: Iterator[Any] = iter(())
        self._batch: list[object] = []
        self._batch_start = 0
        _require_rows(self)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._starts, index) - 1
        try:
            if group != self._group or index < self._batch_start:
                self._batches = self._file.iter_batches(
                    batch_size=_PARQUET_BATCH_ROWS, row_groups=[group], columns=[self._column]
                )
                self._group, self._batch, self._batch_start = group, [], self._starts[group]
            while index >= self._batch_start + len(self._batch):
                self._batch_start += len(self._batch)
                self._batch = next(self._batches).column(0).to_pylist()
        except self._errors as error:
            raise DatasetError(f"`{self.name}`, row {index}: damaged, got {_first_line(error)}") from error
        return _checked_text(
            self._batch[index - self._batch_start], f"`{self.name}`, row {index}, column `{self._column}`"
        )


class _HubRows(Documents):
    """A split of a Hub dataset, memory-mapped."""

    def __init__(self, rows: Any, name: str, column: str) -> None:
        self.name = name
        self._column = column
        _require_column(rows.column_names, column, name)
        # The other columns, which may be images or sound, are never decoded.
        self._rows = rows.select_columns([column])
        self.digest = hashlib.sha256(str(rows._fingerprint).encode()).hexdigest()
        _require_rows(self)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        return _checked_text(
            self._rows[index][self._column], f"`{self.name}`, row {index}, column `{self._column}`"
        )


def _open_hub(dataset: str, text_column: str, offline: bool) -> Documents:
    """Open ``name[:config[:split]]``."""
    # A split may hold colons of its own: `train[:1000]`.
    parts = dataset.split(":", 2)
    if not _HUB_NAME.fullmatch(parts[0]):
        raise UsageError(
            f"`--dataset` names no text source, got `{dataset}`, expected `bundled`, `self`, "
            "a file ending in .jsonl, .txt or .parquet, or a Hub name `name[:config[:split]]`",
            hint="`--dataset bundled` is the text that ships with the package",
        )
    name, config, split = (*parts, "", "")[:3]
    rows = load_hub_dataset(name, config or None, split or "train", offline=offline, hint=LOCAL_ALTERNATIVES)
    return _HubRows(rows, dataset, text_column)


def _require_rows(documents: Documents) -> None:
    if len(documents) == 0:
        raise DatasetError(f"`{documents.name}`: no text, got 0 rows, expected at least 1")


def _require_column(columns: list[str], column: str, name: str) -> None:
    if column not in columns:
        found = ", ".join(f"`{key}`" for key in columns[:8]) or "none"
        raise DatasetError(
            f"`{name}`: no column `{column}`, got {found}",
            hint="name the column that holds the text with `--text-column`",
        )


def _checked_text(value: object, where: str) -> str:
    """``value`` if it is text that can be encoded."""
    if not isinstance(value, str):
        raise DatasetError(f"{where}: must be a string, got {_json_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can escape half of a surrogate pair; no tokenizer accepts that.
        raise DatasetError(f"{where}: must be Unicode text, got a lone surrogate") from None
    return value


def _json_kind(value: object) -> str:
    """What JSON calls the type of ``value``."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _unreadable(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
    return "nesting too deep" if isinstance(error, RecursionError) else str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
