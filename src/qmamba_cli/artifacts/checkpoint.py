"""Source checkpoints: float Mamba-1 models from a folder, the Hub or the package, under one set of names.

Opening reads config.json and the weight files' tables of contents. Tensors are read one at a time when asked
for, so that a model larger than the memory can be calibrated and exported.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from qmamba_cli.artifacts.checkpoint_config import read_config
from qmamba_cli.artifacts.checkpoint_tokenizer import read_tokenizer
from qmamba_cli.artifacts.hub import fetch, parse_hub_id
from qmamba_cli.artifacts.weight_files import StoredTensor, WeightFile, open_weight_files, sha256_of_file
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import CheckpointError
from qmamba_cli.resources import demo_model_path

DEMO = "demo"
_EMBEDDING = "backbone.embeddings.weight"
_HEAD = "lm_head.weight"
# Stored names to canonical names (Hugging Face's MambaForCausalLM). mamba_ssm says `embedding`; transformers'
# MambaModel without a head is stored without the prefix. The first row that matches counts.
_NAME_ROWS = (
    (re.compile(r"(?:backbone\.)?embeddings?\.weight"), _EMBEDDING),
    (re.compile(r"(?:backbone\.)?(layers\.(?:0|[1-9]\d*)\..+)"), r"backbone.\1"),
    (re.compile(r"(?:backbone\.)?norm_f\.weight"), "backbone.norm_f.weight"),
    (re.compile(r"lm_head\.weight"), _HEAD),
)
# Elements looked at together.
_CHECKED = 1 << 22
# Names listed in one message.
_LISTED = 4
_Table = dict[str, tuple[WeightFile, str]]


class Checkpoint:
    """A float Mamba-1 model on disk. Made by `open_checkpoint`.

    Attributes:
        source: the model as the user named it.
        config: its architecture. ``tie_embeddings`` says what the weights do, see `open_checkpoint`.
        revision: the Hub's commit, or None for a local folder.
    """

    def __init__(
        self,
        *,
        source: str,
        config: MambaConfig,
        folder: Path,
        table: Mapping[str, tuple[WeightFile, str]],
        files: Sequence[WeightFile],
        tokenizer: str | None,
        offline: bool,
        revision: str | None,
    ) -> None:
        self.source = source
        self.config = config
        self.revision = revision
        self._folder = folder
        self._table = table
        self._files = files
        self._tokenizer = tokenizer
        self._offline = offline

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names in layer order, those of ``config.tensor_shapes()``."""
        return tuple(self.config.tensor_shapes())

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the dtype it is stored in.

        Args:
            name: canonical, one of `names`.

        Raises:
            CheckpointError: there is no such tensor, or it holds NaN or infinite values.
        """
        if name not in self._table:
            raise CheckpointError(
                f"`{self.source}` has no tensor `{name}`, expected one of its {len(self._table)}"
            )
        file, stored_name = self._table[name]
        tensor = file.read(stored_name)
        # Piece by piece: looking at a whole table would take three times its size.
        bad = sum(int((~part.isfinite()).sum()) for part in torch.split(tensor.view(-1), _CHECKED))
        if bad:
            nans = sum(int(part.isnan().sum()) for part in torch.split(tensor.view(-1), _CHECKED))
            raise CheckpointError(
                f"`{stored_name}` in `{file.path.name}` of `{self.source}` is not finite, got {nans} NaN and "
                f"{bad - nans} infinite values of {tensor.numel()}, expected finite weights",
                hint="the file is damaged or the training diverged; use another checkpoint",
            )
        return tensor

    @property
    def stored_bytes(self) -> int:
        """Bytes of its tensors as they are stored; a tied head counts once."""
        stored = (_stored(self._table, name) for name in self.names)
        return sum(math.prod(row.shape) * getattr(torch, row.dtype).itemsize for row in stored)

    @cached_property
    def weight_files(self) -> dict[str, str]:
        """SHA-256 of each weight file in hexadecimal, by file name. Reads all of them, once.

        Raises:
            CheckpointError: a file cannot be read.
        """
        return {file.path.name: sha256_of_file(file.path, self.source) for file in self._files}

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hexadecimal of the canonical JSON of ``{"config": …, "files": weight_files}``.

        The config enters as `MambaConfig.to_dict`, so keys that do not shape the model do not count. The same
        weights in another set of files have another digest.

        Raises:
            CheckpointError: a file cannot be read.
        """
        document = {"config": self.config.to_dict(), "files": self.weight_files}
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """tokenizer.json and, where there are any, its companions, by file name.

        Raises:
            CheckpointError: there is no tokenizer, it is damaged or it does not fit the model.
        """
        if self._tokenizer is None:
            return read_tokenizer(self._folder, self.source, self.config.vocab_size)
        folder = _resolve(self._tokenizer, option="tokenizer", offline=self._offline)[0]
        return read_tokenizer(folder, self._tokenizer, self.config.vocab_size)


def open_checkpoint(source: str, *, tokenizer: str | None = None, offline: bool = False) -> Checkpoint:
    """Open a float Mamba-1 model and check that its tensors are those its config asks for.

    The head is tied where the config says so, with the exceptions transformers makes: a stored head that
    differs from the embedding is untied whatever the config says, and a tied head stored without an embedding
    stands for both.

    Args:
        source: ``demo`` (the bundled model; a folder of that name is ``./demo``), a folder in Hugging Face's
            or mamba_ssm's form, or a Hub id ``organisation/name`` with an optional ``@revision``.
        tokenizer: a folder or a Hub id to take the tokenizer from instead of ``source``.
        offline: use only the Hub's local cache.

    Raises:
        CheckpointError: the model is missing, of another architecture, incomplete or damaged.
    """
    folder, revision = _resolve(source, option="model", offline=offline)
    config = read_config(folder, source)
    files = open_weight_files(folder, source)
    table = _name_table(files, source)
    config = _settle_head(config, table)
    _check_tensors(config, table, source)
    return Checkpoint(
        source=source,
        config=config,
        folder=folder,
        table=table,
        files=files,
        tokenizer=tokenizer,
        offline=offline,
        revision=revision,
    )


def _resolve(source: str, *, option: str, offline: bool) -> tuple[Path, str | None]:
    """Folder and Hub commit of a model or tokenizer as the user named it."""
    hint = "name a folder that exists, a Hub id `organisation/name`, or `demo`, the bundled model"
    if source == DEMO:
        return demo_model_path(), None
    path = Path(source)
    # Path("") is the current folder, which nobody means by an empty name.
    try:
        is_folder, exists = bool(source) and path.is_dir(), bool(source) and path.exists()
        is_empty = is_folder and not any(path.iterdir())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{option} `{source}` cannot be opened, got `{error}`", hint=hint) from None
    if is_empty:
        raise CheckpointError(f"{option} `{source}` is an empty folder, expected model files", hint=hint)
    if is_folder:
        return path, None
    if exists:
        raise CheckpointError(
            f"{option} `{source}` is a file, expected a folder", hint="name the folder the file lies in"
        )
    hub_id = parse_hub_id(source)
    if hub_id is None:
        raise CheckpointError(
            f"{option} `{source}` not found: no such folder, and no Hub id by its form", hint=hint
        )
    folder = fetch(hub_id, weights=option == "model", offline=offline)
    return folder, folder.name


def _name_table(files: Iterable[WeightFile], source: str) -> _Table:
    """Canonical name of every stored tensor, with the file and the name it is stored under."""
    table: _Table = {}
    for file in files:
        for stored in file.tensors:
            name = _canonical_name(stored)
            if name in table:
                other_file, other = table[name]
                raise CheckpointError(
                    f"`{source}` holds `{name}` twice, got `{other}` in `{other_file.path.name}` "
                    f"and `{stored}` in `{file.path.name}`, expected it once",
                    hint="remove the weight files that do not belong to the model",
                )
            table[name] = (file, stored)
    return table


def _canonical_name(stored: str) -> str:
    """Hugging Face's name of a stored tensor; a name that no row knows stays as it is."""
    for pattern, replacement in _NAME_ROWS:
        match = pattern.fullmatch(stored)
        if match:
            return match.expand(replacement)
    return stored


def _stored(table: Mapping[str, tuple[WeightFile, str]], name: str) -> StoredTensor:
    file, stored_name = table[name]
    return file.tensors[stored_name]


def _settle_head(config: MambaConfig, table: _Table) -> MambaConfig:
    """Decide by the weights whether a head that the config ties is tied; a tied head leaves the table."""
    if not config.tie_embeddings or _HEAD not in table:
        return config
    if _EMBEDDING not in table:
        table[_EMBEDDING] = table[_HEAD]
    elif not _equal(table, _EMBEDDING, _HEAD):
        return replace(config, tie_embeddings=False)
    del table[_HEAD]
    return config


def _equal(table: _Table, first: str, second: str) -> bool:
    """Whether two stored tensors hold the same values; the only look at values while opening."""
    if _stored(table, first) != _stored(table, second) or not _stored(table, first).is_float:
        return False
    (first_file, first_name), (second_file, second_name) = table[first], table[second]
    return torch.equal(first_file.read(first_name), second_file.read(second_name))


def _check_tensors(config: MambaConfig, table: _Table, source: str) -> None:
    """Refuse missing, unexpected, mis-shaped and non-floating tensors, in this order.

    Raises:
        CheckpointError: the first of these found, naming tensors with shapes got and expected.
    """
    damaged = "the weight files do not belong to this config.json, or some are missing"
    if config.n_layer > len(table):
        raise CheckpointError(
            f"`{source}` has too few tensors, got {len(table)}, expected those of {config.n_layer} layers",
            hint=damaged,
        )
    shapes = config.tensor_shapes()
    missing = [f"`{name}` {shape}" for name, shape in shapes.items() if name not in table]
    if missing:
        raise CheckpointError(
            f"`{source}` lacks {_count(missing)}, expected {_listing(missing)}", hint=damaged
        )
    extra = [
        f"`{stored}` {file.tensors[stored].shape}"
        for name, (file, stored) in table.items()
        if name not in shapes
    ]
    if extra:
        raise CheckpointError(
            f"`{source}` has {_count(extra)} that its config has no place for, got {_listing(sorted(extra))}",
            hint=damaged,
        )
    wrong = [
        f"`{name}` {_stored(table, name).shape}, expected {shape}"
        for name, shape in shapes.items()
        if _stored(table, name).shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"`{source}` has {_count(wrong)} of a wrong shape, got {_listing(wrong, '; ')}", hint=damaged
        )
    other = [f"`{name}` {_stored(table, name).dtype}" for name in shapes if not _stored(table, name).is_float]
    if other:
        raise CheckpointError(
            f"`{source}` has {_count(other)} of an unsupported dtype, got {_listing(other)}, "
            "expected float64, float32, float16 or bfloat16",
            hint="start from the float model: a quantized checkpoint cannot be calibrated",
        )


def _count(items: Sequence[str]) -> str:
    return "1 tensor" if len(items) == 1 else f"{len(items)} tensors"


def _listing(items: Sequence[str], separator: str = ", ") -> str:
    """The first few items and how many more there are."""
    rest = len(items) - _LISTED
    return separator.join(items[:_LISTED]) + (f"{separator}and {rest} more" if rest > 0 else "")
