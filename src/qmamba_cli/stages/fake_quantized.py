"""The float model with chosen tensors put on their grids and everything else left float.

A tensor between two operators is replaced by ``dequantize(quantize(x))`` as it passes the block's hook, a
weight by its dequantized form. With everything chosen this is the arithmetic of mode 0 in float32.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from qmamba_cli import sites
from qmamba_cli.config import MambaConfig
from qmamba_cli.evaluation.sensitivity import Target, TensorError
from qmamba_cli.kernels.backend import Backend
from qmamba_cli.kernels.selective_scan.reference import CHUNK
from qmamba_cli.model.mamba import Mamba, ModelState
from qmamba_cli.model.prepare import Load, float_model
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.model.weights import BlockWeights, ModelWeights
from qmamba_cli.modes import MODES
from qmamba_cli.quant.grid import Scale, fake_quantize, quantize_per_token
from qmamba_cli.quant.weights import CODE_MAX, CODE_MIN, quantize_groups, quantize_rows

# What is quantized between the operators: every observed site but the head's input, since the head stays
# float.
ACTIVATIONS = tuple(name for name in sites.SITES if name != sites.LM_HEAD_INPUT)
# The weights of a block by name, and the one table of the whole model (two where the head is untied).
BLOCK_WEIGHTS = ("in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
TABLES = "embeddings.weight"
# Tensors that share the scale of a site; each can be quantized on its own.
PARTS: Mapping[str, tuple[str, ...]] = {
    sites.IN_PROJ_OUTPUT: ("x", "z"),
    sites.X_PROJ_OUTPUT: ("dt_low", "B", "C"),
}
_TABLE_NAMES = ("backbone.embeddings.weight", "lm_head.weight")

Errors: TypeAlias = dict[Target, TensorError]


def activation_targets(layer: int | None = None) -> list[Target]:
    """The activations of a layer, or of all layers at once."""
    return [Target(site=site, layer=layer) for site in ACTIVATIONS]


def weight_targets(layer: int | None = None) -> list[Target]:
    """The weights of a layer, or of all layers at once with the embedding and head."""
    names = BLOCK_WEIGHTS if layer is not None else (*BLOCK_WEIGHTS, TABLES)
    return [Target(site=name, layer=layer) for name in names]


def per_token_targets() -> list[Target]:
    """What could take one scale a token, in all layers at once: the activations but the state, and parts."""
    return [target for target in activation_targets() if target.site != sites.SSM_STATE] + part_targets()


def part_targets() -> list[Target]:
    """The tensors that share a site's scale, in all layers at once."""
    return [Target(site=site, part=part) for site, parts in PARTS.items() for part in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeQuantizer:
    """Makes float models with chosen tensors on their grids.

    Attributes:
        weights: the rotated float model on the backend's device.
        quantized: the same weights, every one dequantized from its stored format.
        scales: activation scale of every site key, real units a step.
        backend: the operators.
        errors: own error of each weight.
    """

    weights: ModelWeights
    quantized: ModelWeights
    scales: Mapping[str, Scale]
    backend: Backend
    errors: Errors

    @property
    def config(self) -> MambaConfig:
        """Sizes of the model."""
        return self.weights.config

    def float_model(self) -> Mamba:
        """The float model itself."""
        return Mamba(self.weights, MODES["fp"], self.backend)

    def model(self, targets: Collection[Target], per_token: Collection[Target] = ()) -> "FakeQuantizedModel":
        """The float model with ``targets`` on their grids; without any it is the float model, bit for bit.

        Args:
            targets: what is quantized.
            per_token: those of them that take one scale a token in place of the site's scale. A site takes
                one over all its channels, its parts one each. The state has no tokens and is none of them.
        """
        wanted, dynamic = set(targets), set(per_token)

        def chosen(
            site: str, layer: int | None, part: str | None = None, among: Collection[Target] = wanted
        ) -> bool:
            places = (Target(site=site, layer=one, part=part) for one in {None, layer})
            return any(place in among for place in places)

        pairs = zip(self.weights.blocks, self.quantized.blocks, strict=True)
        blocks = []
        for layer, (block, coarse) in enumerate(pairs):
            names = {name for name in BLOCK_WEIGHTS if chosen(name, layer)}
            blocks.append(_mixed(block, coarse, names))
        ends = self.quantized if chosen(TABLES, None) else self.weights
        weights = replace(self.weights, blocks=tuple(blocks), embedding=ends.embedding, lm_head=ends.lm_head)
        grids: dict[str, list[tuple[slice, Scale | None]]] = {}
        for layer in range(self.config.n_layer):
            for site in ACTIVATIONS:
                key = sites.site_key(site, layer)
                parts = part_columns(self.config, site)
                whole = chosen(site, layer)
                places: list[tuple[str | None, slice]] = [
                    (part, columns) for part, columns in parts.items() if whole or chosen(site, layer, part)
                ]
                if whole and not any(chosen(site, layer, part, dynamic) for part in parts):
                    places = [(None, slice(None))]
                if places:
                    grids[key] = [
                        (columns, None if chosen(site, layer, part, dynamic) else self.scales[key])
                        for part, columns in places
                    ]
        return FakeQuantizedModel(Mamba(weights, MODES["fp"], self.backend), grids)

    def observe_errors(self) -> tuple[Errors, Callable[[str, torch.Tensor], None]]:
        """Own errors of the activations, to be filled by the hook that is returned with them."""
        errors: Errors = {}
        # Every target with the key of its site and its channels there.
        watched: dict[str, list[tuple[TensorError, slice]]] = {}
        for layer in range(self.config.n_layer):
            for site in ACTIVATIONS:
                parts = part_columns(self.config, site)
                for part, columns in ((None, slice(None)), *parts.items()):
                    error = errors[Target(site=site, layer=layer, part=part)] = TensorError()
                    watched.setdefault(sites.site_key(site, layer), []).append((error, columns))

        def observe(key: str, tensor: torch.Tensor) -> None:
            for error, columns in watched.get(key, ()):
                error.update(tensor[..., columns], self.scales[key])

        return errors, observe


class FakeQuantizedModel:
    """A float model that puts tensors on their grids as they pass.

    The state has a grid only where it leaves a call. Running text is one call, so where the state is chosen a
    text is run in pieces of ``CHUNK`` tokens, and the state is put on its grid between them: at the places
    where calibration observed it, and more often than a prefill would.

    Args:
        model: the float model with the chosen weights already replaced.
        grids: site key → the channels that are put on a grid, with its scale, or None for one scale a token.
    """

    def __init__(self, model: Mamba, grids: Mapping[str, list[tuple[slice, Scale | None]]]) -> None:
        self._model = model
        self._state_scales = {
            int(key.split(".")[1]): scale
            for key, ((_columns, scale), *_rest) in grids.items()
            if key.endswith(sites.SSM_STATE) and scale is not None
        }
        self._grids = {key: grid for key, grid in grids.items() if not key.endswith(sites.SSM_STATE)}

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self._model.vocab_size

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head reads: (b, l) int64 to (b, l, d_model) float32."""
        hook = self._replace if self._grids else None
        if not self._state_scales:
            return self._model.forward(ids, hook=hook)[0]
        parts, state = [], None
        for piece in torch.split(ids, CHUNK, dim=1):
            hidden, state = self._model.forward(piece, state, hook=hook)
            state = self._on_grid(state)
            parts.append(hidden)
        return torch.cat(parts, dim=1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits: (..., d_model) to (..., vocab_size) float32."""
        return self._model.logits(hidden)

    def _replace(self, key: str, tensor: torch.Tensor) -> None:
        # The operators that follow read the tensor they are shown here, so it is overwritten in place.
        for columns, scale in self._grids.get(key, ()):
            view = tensor[..., columns]
            view.copy_(per_token(view) if scale is None else fake_quantize(view, scale))

    def _on_grid(self, state: ModelState) -> ModelState:
        return [
            block._replace(ssm=fake_quantize(block.ssm, self._state_scales[layer]))
            if layer in self._state_scales
            else block
            for layer, block in enumerate(state)
        ]


def per_token(x: torch.Tensor) -> torch.Tensor:
    """(b, l, channels) on grids of one scale a token."""
    q, scale = quantize_per_token(x.transpose(1, 2))
    return (q * scale.unsqueeze(1)).transpose(1, 2)


def part_columns(config: MambaConfig, site: str) -> dict[str, slice]:
    """Channels of the tensors that share a site's scale, along the last axis; empty where there is one."""
    d, r, n = config.d_inner, config.dt_rank, config.d_state
    match site:
        case sites.IN_PROJ_OUTPUT:
            return {"x": slice(0, d), "z": slice(d, 2 * d)}
        case sites.X_PROJ_OUTPUT:
            return {"dt_low": slice(0, r), "B": slice(r, r + n), "C": slice(r + n, r + 2 * n)}
        case _:
            return {}


def fake_quantizer(
    config: MambaConfig,
    load: Load,
    recipe: Recipe,
    scales: Mapping[str, Scale],
    backend: Backend,
    *,
    on_layer: Callable[[], None] = lambda: None,
) -> FakeQuantizer:
    """Prepare the float model and the dequantized form of its weights; both are held in memory.

    Args:
        config: sizes.
        load: reads a float checkpoint tensor by name.
        recipe: formats of the weights, as `export` would store them.
        scales: activation scale of every site key.
        backend: the operators.
        on_layer: called after each block.
    """
    weights = float_model(config, load, device=backend.device)
    errors: Errors = {}
    blocks = []
    for layer, block in enumerate(weights.blocks):
        u_scale = scales[sites.site_key(sites.X_PROJ_INPUT, layer)]
        blocks.append(_coarse_block(block, recipe, layer, u_scale, errors))
        on_layer()
    ends = _coarse_ends(config, load, recipe, backend, errors)
    quantized = replace(weights, blocks=tuple(blocks), embedding=ends.embedding, lm_head=ends.lm_head)
    return FakeQuantizer(weights=weights, quantized=quantized, scales=scales, backend=backend, errors=errors)


def _mixed(block: BlockWeights, coarse: BlockWeights, names: Collection[str]) -> BlockWeights:
    """``block`` with the weights of these names from ``coarse``."""

    def pick(name: str) -> BlockWeights:
        return coarse if name in names else block

    return replace(
        block,
        in_proj=pick("in_proj.weight").in_proj,
        conv_weight=pick("conv1d.weight").conv_weight,
        x_proj=pick("x_proj.weight").x_proj,
        dt_proj=pick("dt_proj.weight").dt_proj,
        out_proj=pick("out_proj.weight").out_proj,
    )


def _coarse_block(
    block: BlockWeights, recipe: Recipe, layer: int, u_scale: Scale, errors: Errors
) -> BlockWeights:
    # Where each channel of u has a scale, x_proj's columns are rounded together with them.
    columns = u_scale if isinstance(u_scale, torch.Tensor) else torch.ones(())
    columns = columns.to(block.D.device)

    def coarse(module: str, weight: torch.Tensor) -> torch.Tensor:
        name = f"layers.{layer}.{module}"
        projection = module in ("in_proj", "out_proj")
        bits = recipe.projection_bits(name) if projection else 8
        real, error = dequantized(weight, bits, recipe.group_size, name=name)
        errors[Target(site=f"{module}.weight", layer=layer)] = error
        return real

    return replace(
        block,
        in_proj=replace(block.in_proj, weight=coarse("in_proj", block.in_proj.matrix)),
        conv_weight=coarse("conv1d", block.conv_weight),
        x_proj=replace(block.x_proj, weight=coarse("x_proj", block.x_proj.matrix * columns) / columns),
        dt_proj=replace(block.dt_proj, weight=coarse("dt_proj", block.dt_proj.matrix)),
        out_proj=replace(block.out_proj, weight=coarse("out_proj", block.out_proj.matrix)),
    )


def _coarse_ends(
    config: MambaConfig, load: Load, recipe: Recipe, backend: Backend, errors: Errors
) -> ModelWeights:
    """A model of one block whose embedding and head are those that a quantized file holds."""
    error = errors.setdefault(Target(site=TABLES), TensorError())
    tables: dict[str, torch.Tensor] = {}

    def coarse(name: str) -> torch.Tensor:
        if name not in _TABLE_NAMES:
            return load(name)
        if name not in tables:
            weight = load(name)
            module = "lm_head" if name.startswith("lm_head") else "embeddings"
            if recipe.table_bits(module) == 8:
                weight, one = dequantized(weight.to(torch.float32), 8, recipe.group_size, name=module)
                error.signal += one.signal
                error.noise += one.noise
                error.clipped += one.clipped
                error.count += one.count
            tables[name] = weight
        return tables[name]

    return float_model(replace(config, n_layer=1), coarse, device=backend.device)


def dequantized(
    weight: torch.Tensor, bits: int, group_size: int, *, name: str
) -> tuple[torch.Tensor, TensorError]:
    """A weight as its stored format gives it back, and what that lost.

    Args:
        weight: (rows, k) float32.
        bits: 8 (one scale a row) or 4 (groups).
        group_size: of the 4-bit format.
        name: what the matrix is called in an error.

    Returns:
        (rows, k) float32 and its error; a value counts as clipped where its code is an end of the grid that
        rounding alone would have passed.
    """
    error = TensorError()
    if bits == 8:
        real = quantize_rows(weight, name=name).dequantize()
        error.add(weight, real, 0)
        return real, error
    groups = quantize_groups(weight, group_size, name=name)
    real = groups.dequantize()
    step = groups.scale.unsqueeze(1) * groups.multiplier.to(torch.float32)
    steps = weight / step.repeat_interleave(group_size, dim=1)[:, : weight.shape[1]]
    codes = steps.round()
    error.add(weight, real, int(((codes > CODE_MAX) | (codes < CODE_MIN)).sum()))
    return real, error
