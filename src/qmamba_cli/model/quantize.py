"""Rotated float weights to the tensors of a quantized file, and back to weights that the block reads.

Names and dtypes are those of docs/artifact-format.md. Both directions go layer by layer, so that no more than
one float block is in memory.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import UsageError
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.model.prepare import Load, float_block, rotate_inputs
from qmamba_cli.model.weights import HALF_DTYPES, BlockWeights, LinearWeights, ModelWeights, SiteScales
from qmamba_cli.quant.grid import Scale
from qmamba_cli.quant.packing import pack_int4, pack_uint4, unpack_int4, unpack_uint4
from qmamba_cli.quant.weights import DEFAULT_GROUP_SIZE, GroupQuantized, quantize_groups, quantize_rows
from qmamba_cli.sites import X_PROJ_INPUT, site_key

METHODS = ("plain", "best")
_NO_SCALES: Mapping[str, Scale] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Formats of the weights in a quantized file.

    Attributes:
        w_bits: bits of in_proj and out_proj, 4 or 8.
        group_size: input channels that share an integer multiplier in a W4 matrix.
        embedding_bits: bits of the embedding and of an untied head, 8 (one scale a row) or 16.
        ignore: regular expressions; a module whose whole name matches one keeps the finer format: in_proj and
            out_proj 8 bits, embeddings and lm_head 16.
        method: plain, or best: what is rounded is chosen for the least error of the outputs, at the same
            formats and the same speed.

    Raises:
        UsageError: a value is not supported or an expression does not compile.
    """

    w_bits: int = 4
    group_size: int = DEFAULT_GROUP_SIZE
    embedding_bits: int = 8
    ignore: Sequence[str] = ()
    method: str = "plain"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown `--recipe {self.method}`, expected one of {', '.join(METHODS)}")
        if self.w_bits not in (4, 8):
            raise UsageError(f"`--w-bits` must be 4 or 8, got {self.w_bits}")
        if self.embedding_bits not in (8, 16):
            raise UsageError(f"`--embedding-bits` must be 8 or 16, got {self.embedding_bits}")
        if self.group_size < 1:
            raise UsageError(f"`--group-size` must be at least 1, got {self.group_size}")
        for pattern in self.ignore:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"`--ignore`: `{pattern}` is no regular expression: {error}") from None

    def ignores(self, module: str) -> bool:
        """Whether a module keeps the finer format."""
        return any(re.fullmatch(pattern, module) for pattern in self.ignore)

    def projection_bits(self, module: str) -> int:
        """Bits of an in_proj or out_proj."""
        return 8 if self.ignores(module) else self.w_bits

    def table_bits(self, module: str) -> int:
        """Bits of the embedding or of an untied head."""
        return 16 if self.ignores(module) else self.embedding_bits


def quantized_tensors(
    config: MambaConfig,
    load: Load,
    recipe: Recipe,
    *,
    scales: Mapping[str, Scale] = _NO_SCALES,
    blocks: Iterator[Mapping[str, torch.Tensor]] | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything a quantized file holds but the activation scales, one layer at a time.

    Args:
        config: sizes.
        load: reads a float checkpoint tensor by name.
        recipe: formats.
        scales: of the activations; the columns of x_proj hold those of u where each channel has one.
        blocks: the tensors of each block in turn, or None for those of `block_tensors`.
        on_layer: called after each block.
    """
    yield from _table("embeddings", load("backbone.embeddings.weight"), recipe)
    for layer in range(config.n_layer):
        if blocks is None:
            yield from block_tensors(config, load, recipe, layer, scales)
        else:
            yield from next(blocks).items()
        on_layer()
    yield "norm_f.weight", load("backbone.norm_f.weight").to(torch.float32)
    if not config.tie_embeddings:
        yield from _table("lm_head", load("lm_head.weight"), recipe)


def weight_schemes(config: MambaConfig, recipe: Recipe) -> dict[str, str]:
    """Format of each module's weight in words: ``w4-g128``, ``w8-row``, ``w8-channel`` or ``16-bit``.

    A W4 matrix of the best recipe has ``-gptq`` behind it.
    """
    fitted = "-gptq" if recipe.method == "best" else ""
    words = {4: f"w4-g{recipe.group_size}{fitted}", 8: "w8-row", 16: "16-bit"}
    schemes = {"embeddings": words[recipe.table_bits("embeddings")]}
    for layer in range(config.n_layer):
        for name in ("in_proj", "out_proj"):
            module = f"layers.{layer}.{name}"
            schemes[module] = words[recipe.projection_bits(module)]
        schemes |= {f"layers.{layer}.{name}": "w8-row" for name in ("x_proj", "dt_proj")}
        schemes[f"layers.{layer}.conv1d"] = "w8-channel"
    if not config.tie_embeddings:
        schemes["lm_head"] = words[recipe.table_bits("lm_head")]
    return schemes


def block_tensors(
    config: MambaConfig, load: Load, recipe: Recipe, layer: int, scales: Mapping[str, Scale] = _NO_SCALES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything that one block stores, each weight rounded by itself.

    The arguments are those of `quantized_tensors`.
    """
    block = float_block(config, load, layer)
    prefix = f"layers.{layer}"
    for name, linear in (("in_proj", block.in_proj), ("out_proj", block.out_proj)):
        module = f"{prefix}.{name}"
        if recipe.projection_bits(module) == 4:
            yield from group_tensors(module, quantize_groups(linear.matrix, recipe.group_size, name=module))
        else:
            yield from _row_tensors(module, linear.matrix)
        if linear.bias is not None:
            yield f"{module}.bias", linear.bias
    u_scale = scales.get(site_key(X_PROJ_INPUT, layer))
    x_proj = block.x_proj.matrix
    yield from _row_tensors(
        f"{prefix}.x_proj", x_proj * u_scale if isinstance(u_scale, torch.Tensor) else x_proj
    )
    yield from _row_tensors(f"{prefix}.dt_proj", block.dt_proj.matrix)
    yield f"{prefix}.dt_proj.bias", block.dt_bias
    yield from _row_tensors(f"{prefix}.conv1d", block.conv_weight)
    if block.conv_bias is not None:
        yield f"{prefix}.conv1d.bias", block.conv_bias
    # The stored logarithm, in the checkpoint's own dtype: exact, and half the size of A in float32.
    A_log = load(f"backbone.layers.{layer}.mixer.A_log")
    yield f"{prefix}.A_log", A_log if A_log.dtype in HALF_DTYPES else A_log.to(torch.float32)
    yield f"{prefix}.D", block.D


def group_tensors(module: str, groups: GroupQuantized) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of a W4 matrix as it is stored."""
    yield f"{module}.qweight", pack_int4(groups.codes)
    yield f"{module}.multiplier", pack_uint4(groups.multiplier)
    yield f"{module}.scale", groups.scale


def _row_tensors(module: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    rows = quantize_rows(weight, name=module)
    yield f"{module}.qweight", rows.qweight
    yield f"{module}.scale", rows.scale


def _table(module: str, weight: torch.Tensor, recipe: Recipe) -> Iterator[tuple[str, torch.Tensor]]:
    """Embedding or untied head, unrotated: one table serves a tied head, which folds the final norm."""
    if recipe.table_bits(module) == 8:
        yield from _row_tensors(module, weight)
    else:
        yield f"{module}.weight", weight if weight.dtype in HALF_DTYPES else weight.to(torch.float16)


def quantized_model(
    config: MambaConfig,
    tensors: Mapping[str, torch.Tensor],
    scales: Mapping[str, Scale],
    *,
    group_size: int,
    device: torch.device | None = None,
    packed: bool = False,
) -> ModelWeights:
    """The weights of a quantized file as the block reads them.

    Both forms compute one function. Packed, the weights take the file's own size in memory and the ends are
    rotated as the model runs; expanded, they cost a CPU nothing when it runs.

    Args:
        config: sizes.
        tensors: the file's tensors by name; read one at a time, so a lazy mapping keeps memory low.
        scales: activation scale of every site key; a tensor where each channel has one.
        group_size: of the W4 matrices.
        device: where each tensor goes as soon as it is read, or None to leave it.
        packed: keep W4 matrices, the embedding and an untied head as they are stored.

    Returns:
        Packed: 4-bit matrices, and tables in the trained basis, one for a tied head. Else W4 matrices
        expanded to int8; embedding and head float32, rotated, with the final norm folded in.
    """
    read = _Reader(tensors, device, group_size, packed)
    blocks = tuple(_read_block(config, read, scales, layer) for layer in range(config.n_layer))
    gamma = tensors["norm_f.weight"]
    if packed:
        table, table_scale = read.table("embeddings")
        head = (table, table_scale) if config.tie_embeddings else read.table("lm_head")
        return ModelWeights(
            config=config,
            embedding=table,
            blocks=blocks,
            norm_f=read.moved(gamma),
            lm_head=LinearWeights(*head),
            embedding_scale=table_scale,
            rotate_ends=True,
        )
    embedding = _read_table("embeddings", tensors)
    untied = embedding if config.tie_embeddings else _read_table("lm_head", tensors)
    return ModelWeights(
        config=config,
        embedding=read.moved(rotate_inputs(embedding)),
        blocks=blocks,
        norm_f=None,
        lm_head=LinearWeights(read.moved(rotate_inputs(untied, gamma))),
    )


def quantized_block(
    config: MambaConfig,
    tensors: Mapping[str, torch.Tensor],
    scales: Mapping[str, Scale],
    layer: int,
    *,
    group_size: int,
    device: torch.device | None = None,
) -> BlockWeights:
    """One block of `quantized_model`, expanded; ``tensors`` and ``scales`` need hold only that layer's."""
    return _read_block(config, _Reader(tensors, device, group_size, False), scales, layer)


class _Reader:
    """Tensors of a quantized file, each where it is to stay."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device | None,
        group_size: int,
        packed: bool,
    ) -> None:
        self._tensors = tensors
        self.device = device
        self._group_size = group_size
        self._packed = packed

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the device."""
        return tensor if self.device is None else tensor.to(self.device)

    def get(self, name: str) -> torch.Tensor:
        return self.moved(self._tensors[name])

    def find(self, name: str) -> torch.Tensor | None:
        return self.get(name) if name in self._tensors else None

    def linear(self, module: str, columns: int) -> LinearWeights:
        """A projection in its own format."""
        weight: torch.Tensor | PackedInt4 = self.get(f"{module}.qweight")
        packed_multiplier = self.find(f"{module}.multiplier")
        scale = self.get(f"{module}.scale")
        if packed_multiplier is not None and isinstance(weight, torch.Tensor):
            multiplier = unpack_uint4(packed_multiplier, -(-columns // self._group_size))
            if self._packed:
                weight = PackedInt4(
                    codes=weight, multiplier=multiplier, group_size=self._group_size, columns=columns
                )
            else:
                weight = GroupQuantized(
                    codes=unpack_int4(weight, columns),
                    multiplier=multiplier,
                    scale=scale,
                    group_size=self._group_size,
                ).expand()
        return LinearWeights(weight, scale, self.find(f"{module}.bias"))

    def table(self, module: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A table as it is stored, and the scale of its rows."""
        stored = self.find(f"{module}.weight")
        if stored is not None:
            return stored, None
        return self.get(f"{module}.qweight"), self.get(f"{module}.scale")

    def decay(self, layer: int) -> torch.Tensor:
        """A; the host's exponential, so that every device has the same bits."""
        return self.moved(-torch.exp(self._tensors[f"layers.{layer}.A_log"].to(torch.float32)))


def _read_block(config: MambaConfig, read: _Reader, scales: Mapping[str, Scale], layer: int) -> BlockWeights:
    prefix = f"layers.{layer}"
    dt_proj = read.linear(f"{prefix}.dt_proj", config.dt_rank)
    bias = dt_proj.bias
    if bias is None:
        raise KeyError(f"{prefix}.dt_proj.bias")
    return BlockWeights(
        norm=None,
        in_proj=read.linear(f"{prefix}.in_proj", config.d_model),
        conv_weight=read.get(f"{prefix}.conv1d.qweight"),
        conv_scale=read.get(f"{prefix}.conv1d.scale"),
        conv_bias=read.find(f"{prefix}.conv1d.bias"),
        x_proj=read.linear(f"{prefix}.x_proj", config.d_inner),
        dt_proj=LinearWeights(dt_proj.weight, dt_proj.scale),
        dt_bias=bias,
        A=read.decay(layer),
        D=read.get(f"{prefix}.D"),
        out_proj=read.linear(f"{prefix}.out_proj", config.d_inner),
        rotated=True,
        scales=SiteScales.from_sites(scales, layer, read.device),
    )


def _read_table(module: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if f"{module}.weight" in tensors:
        return tensors[f"{module}.weight"]
    return tensors[f"{module}.qweight"].to(torch.float32) * tensors[f"{module}.scale"].unsqueeze(1)


def planned_tensors(config: MambaConfig, recipe: Recipe, log_dtype: torch.dtype) -> dict[str, int]:
    """Name and size in bytes of what `quantized_tensors` would give, without reading a weight.

    Args:
        config: sizes.
        recipe: formats.
        log_dtype: dtype of the checkpoint's A_log.
    """
    sizes: dict[str, int] = {}

    def rows(module: str, m: int, k: int) -> None:
        sizes[f"{module}.qweight"] = m * k
        sizes[f"{module}.scale"] = 4 * m

    def table(module: str) -> None:
        if recipe.table_bits(module) == 8:
            rows(module, config.vocab_size, config.d_model)
        else:
            sizes[f"{module}.weight"] = 2 * config.vocab_size * config.d_model

    d = config.d_inner
    table("embeddings")
    for layer in range(config.n_layer):
        prefix = f"layers.{layer}"
        for name, m, k in (("in_proj", 2 * d, config.d_model), ("out_proj", config.d_model, d)):
            module = f"{prefix}.{name}"
            rows(module, m, k)
            if recipe.projection_bits(module) == 4:
                groups = -(-k // recipe.group_size)
                sizes[f"{module}.qweight"] = m * -(-k // 2)
                sizes[f"{module}.multiplier"] = m * -(-groups // 2)
            if config.proj_bias:
                sizes[f"{module}.bias"] = 4 * m
        rows(f"{prefix}.x_proj", config.dt_rank + 2 * config.d_state, d)
        rows(f"{prefix}.dt_proj", d, config.dt_rank)
        sizes[f"{prefix}.dt_proj.bias"] = 4 * d
        rows(f"{prefix}.conv1d", d, config.d_conv)
        if config.conv_bias:
            sizes[f"{prefix}.conv1d.bias"] = 4 * d
        sizes[f"{prefix}.A_log"] = (2 if log_dtype in HALF_DTYPES else 4) * d * config.d_state
        sizes[f"{prefix}.D"] = 4 * d
    sizes["norm_f.weight"] = 4 * config.d_model
    if not config.tie_embeddings:
        table("lm_head")
    return sizes
