"""Rotated float weights to the tensors of a quantized file, and back to weights that the block reads.

Names and dtypes are those of docs/artifact-format.md. Both directions go layer by layer, so that no more than
one float block is in memory.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import UsageError
from qmamba_cli.model.prepare import Load, float_block, rotate_inputs
from qmamba_cli.model.weights import BlockWeights, LinearWeights, ModelWeights, SiteScales
from qmamba_cli.quant.packing import pack_int4, pack_uint4, unpack_int4, unpack_uint4
from qmamba_cli.quant.weights import DEFAULT_GROUP_SIZE, GroupQuantized, quantize_groups, quantize_rows

HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Formats of the weights in a quantized file.

    Attributes:
        w_bits: bits of in_proj and out_proj, 4 or 8.
        group_size: input channels that share an integer multiplier in a W4 matrix.
        embedding_bits: bits of the embedding and of an untied head, 8 (one scale a row) or 16.
        ignore: regular expressions; a module whose whole name matches one keeps the finer format: in_proj and
            out_proj 8 bits, embeddings and lm_head 16.

    Raises:
        UsageError: a value is not supported or an expression does not compile.
    """

    w_bits: int = 4
    group_size: int = DEFAULT_GROUP_SIZE
    embedding_bits: int = 8
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
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
    config: MambaConfig, load: Load, recipe: Recipe, *, on_layer: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything a quantized file holds but the activation scales, one layer at a time.

    Args:
        config: sizes.
        load: reads a float checkpoint tensor by name.
        recipe: formats.
        on_layer: called after each block.
    """
    yield from _table("embeddings", load("backbone.embeddings.weight"), recipe)
    for layer in range(config.n_layer):
        yield from _block_tensors(config, load, recipe, layer)
        on_layer()
    yield "norm_f.weight", load("backbone.norm_f.weight").to(torch.float32)
    if not config.tie_embeddings:
        yield from _table("lm_head", load("lm_head.weight"), recipe)


def weight_schemes(config: MambaConfig, recipe: Recipe) -> dict[str, str]:
    """Format of each module's weight in words: ``w4-g128``, ``w8-row``, ``w8-channel`` or ``16-bit``."""
    words = {4: f"w4-g{recipe.group_size}", 8: "w8-row", 16: "16-bit"}
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


def _block_tensors(
    config: MambaConfig, load: Load, recipe: Recipe, layer: int
) -> Iterator[tuple[str, torch.Tensor]]:
    block = float_block(config, load, layer)
    prefix = f"layers.{layer}"
    for name, linear in (("in_proj", block.in_proj), ("out_proj", block.out_proj)):
        module = f"{prefix}.{name}"
        if recipe.projection_bits(module) == 4:
            groups = quantize_groups(linear.weight, recipe.group_size, name=module)
            yield f"{module}.qweight", pack_int4(groups.codes)
            yield f"{module}.multiplier", pack_uint4(groups.multiplier)
            yield f"{module}.scale", groups.scale
        else:
            yield from _row_tensors(module, linear.weight)
        if linear.bias is not None:
            yield f"{module}.bias", linear.bias
    yield from _row_tensors(f"{prefix}.x_proj", block.x_proj.weight)
    yield from _row_tensors(f"{prefix}.dt_proj", block.dt_proj.weight)
    yield f"{prefix}.dt_proj.bias", block.dt_bias
    yield from _row_tensors(f"{prefix}.conv1d", block.conv_weight)
    if block.conv_bias is not None:
        yield f"{prefix}.conv1d.bias", block.conv_bias
    # The stored logarithm, in the checkpoint's own dtype: exact, and half the size of A in float32.
    A_log = load(f"backbone.layers.{layer}.mixer.A_log")
    yield f"{prefix}.A_log", A_log if A_log.dtype in HALF_DTYPES else A_log.to(torch.float32)
    yield f"{prefix}.D", block.D


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
    scales: Mapping[str, float],
    *,
    group_size: int,
) -> ModelWeights:
    """The weights of a quantized file as the block reads them.

    Args:
        config: sizes.
        tensors: the file's tensors by name; read one at a time, so a lazy mapping keeps memory low.
        scales: activation scale of every site key.
        group_size: of the W4 matrices.

    Returns:
        W4 matrices expanded to int8; embedding and head float32, rotated, with the final norm folded in.
    """
    embedding = _read_table("embeddings", tensors)
    head = embedding if config.tie_embeddings else _read_table("lm_head", tensors)
    gamma = tensors["norm_f.weight"]
    return ModelWeights(
        config=config,
        embedding=rotate_inputs(embedding),
        blocks=tuple(
            _read_block(config, tensors, scales, layer, group_size) for layer in range(config.n_layer)
        ),
        norm_f=None,
        lm_head=LinearWeights(rotate_inputs(head, gamma)),
    )


def _read_block(
    config: MambaConfig,
    tensors: Mapping[str, torch.Tensor],
    scales: Mapping[str, float],
    layer: int,
    group_size: int,
) -> BlockWeights:
    prefix = f"layers.{layer}"

    def rows(name: str, columns: int) -> LinearWeights:
        module = f"{prefix}.{name}"
        qweight = tensors[f"{module}.qweight"]
        if f"{module}.multiplier" in tensors:
            qweight = GroupQuantized(
                codes=unpack_int4(qweight, columns),
                multiplier=unpack_uint4(tensors[f"{module}.multiplier"], -(-columns // group_size)),
                scale=tensors[f"{module}.scale"],
                group_size=group_size,
            ).expand()
        return LinearWeights(qweight, tensors[f"{module}.scale"], tensors.get(f"{module}.bias"))

    dt_proj = rows("dt_proj", config.dt_rank)
    return BlockWeights(
        norm=None,
        in_proj=rows("in_proj", config.d_model),
        conv_weight=tensors[f"{prefix}.conv1d.qweight"],
        conv_scale=tensors[f"{prefix}.conv1d.scale"],
        conv_bias=tensors.get(f"{prefix}.conv1d.bias"),
        x_proj=rows("x_proj", config.d_inner),
        dt_proj=LinearWeights(dt_proj.weight, dt_proj.scale),
        dt_bias=tensors[f"{prefix}.dt_proj.bias"],
        A=-torch.exp(tensors[f"{prefix}.A_log"].to(torch.float32)),
        D=tensors[f"{prefix}.D"],
        out_proj=rows("out_proj", config.d_inner),
        rotated=True,
        scales=SiteScales.from_sites(scales, layer),
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
