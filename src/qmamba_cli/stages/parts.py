"""What a quantized file spends its bytes on. Imports no torch, so that `inspect` answers at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qmamba_cli.config import MambaConfig

FILES_PART = "tokenizer files"
# Rows of a matrix that are rotated at a time, see model/prepare.py.
_ROTATED_ROWS = 8192
_FILES_PREFIX = "files/"
# Part → what the names of its tensors hold, in a float checkpoint and in a quantized file alike.
_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "embeddings, head": ("embeddings.", "lm_head."),
    "in_proj": (".in_proj.",),
    "out_proj": (".out_proj.",),
    "x_proj": (".x_proj.",),
    "dt_proj": (".dt_proj.",),
    "conv1d": (".conv1d.",),
    "A_log, D": (".A_log", ".D"),
    "norms": ("norm_f.", ".norm."),
    "activation scales": ("scales.",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One line of the size table.

    Attributes:
        name: what the tensors belong to.
        bytes: size in the file.
        parameters: parameters of the float model they stand for; 0 where they stand for none.
    """

    name: str
    bytes: int
    parameters: int

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits a parameter, scales included."""
        return 8 * self.bytes / self.parameters if self.parameters else None


def parts_of(sizes: Mapping[str, int], config: MambaConfig) -> tuple[Part, ...]:
    """Sizes by part, largest first.

    Args:
        sizes: tensor name → bytes, of a quantized file.
        config: sizes of the model.
    """
    bytes_by_part: dict[str, int] = {}
    for name, size in sizes.items():
        part = FILES_PART if name.startswith(_FILES_PREFIX) else _part(name)
        bytes_by_part[part] = bytes_by_part.get(part, 0) + size
    parameters: dict[str, int] = {}
    for name, shape in config.tensor_shapes().items():
        parameters[_part(name)] = parameters.get(_part(name), 0) + math.prod(shape)
    parts = (
        Part(name=name, bytes=size, parameters=parameters.get(name, 0))
        for name, size in bytes_by_part.items()
    )
    return tuple(sorted(parts, key=lambda part: (-part.bytes, part.name)))


def bits_per_weight(sizes: Mapping[str, int], config: MambaConfig) -> float:
    """Stored bits a parameter over the whole model, scales included, the tokenizer's files left out."""
    stored = sum(size for name, size in sizes.items() if not name.startswith(_FILES_PREFIX))
    return 8 * stored / sum(math.prod(shape) for shape in config.tensor_shapes().values())


def export_memory(config: MambaConfig, fitted_tokens: int = 0) -> int:
    """Bytes that quantizing takes beside the program itself, about: the largest table, or one block.

    A table is read whole in float32, looked at once for values that are not finite (a byte each) and kept
    quantized while it is written. A block is held in float32 while its largest matrix is rotated in float64,
    of which the transform has about four copies.

    Args:
        config: sizes.
        fitted_tokens: what the best recipe fits its matrices to. Three residual streams of them are held,
            with what the larger projection reads and should give, and second moments of that in float64.
    """
    d_model, d = config.d_model, config.d_inner
    table = config.vocab_size * d_model * (4 + 1 + 1)
    block = 4 * sum(
        math.prod(shape)
        for name, shape in config.tensor_shapes().items()
        if name.startswith("backbone.layers.0.")
    )
    rotated = 8 * 4 * d_model * max(min(2 * d, _ROTATED_ROWS), d)
    fitting = 4 * fitted_tokens * (4 * d_model + d + d // 4) + 8 * 6 * d * d if fitted_tokens else 0
    return max(table, block + 4 * 2 * d * d_model + max(rotated, fitting))


def _part(name: str) -> str:
    return next(
        (part for part, patterns in _PATTERNS.items() if any(pattern in name for pattern in patterns)),
        "other",
    )
