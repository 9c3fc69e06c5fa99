"""Weights as the block reads them, float or quantized."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from qmamba_cli import sites
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.linear.interleaved import Weight, expanded
from qmamba_cli.quant.grid import Scale

HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """One projection.

    Attributes:
        weight: (m, k) float32, float16 or bfloat16; or int8 with ``scale``; a W4 matrix is int8, expanded,
            code times group multiplier, or as it was packed, in the file or for decoding.
        scale: (m,) float32, real units a step of each row, or None.
        bias: (m,) float32, or None.
    """

    weight: Weight
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as a (m, k) tensor; a packed one is expanded anew each time."""
        return expanded(self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteScales:
    """Activation scales of one layer, real units a step; all None in the float model.

    ``x_proj_input``, that of u, is one number, or (d,) float32 with one a channel. The columns of x_proj's
    weight hold the latter, so that the product of the codes needs no scale but that of the row.
    """

    in_proj_input: float | None = None
    in_proj_output: float | None = None
    x_proj_input: Scale | None = None
    x_proj_output: float | None = None
    dt_proj_output: float | None = None
    ssm_state: float | None = None
    out_proj_input: float | None = None

    @property
    def x_proj_codes(self) -> float | None:
        """What a step of x_proj's input counts in its product: u's scale, or 1 where the weight holds it."""
        return 1.0 if isinstance(self.x_proj_input, torch.Tensor) else self.x_proj_input

    @classmethod
    def from_sites(
        cls, scales: Mapping[str, Scale], layer: int, device: torch.device | None = None
    ) -> "SiteScales":
        """Scales of one layer out of a model's, keyed by `sites.site_key`.

        Raises:
            ShapeError: a site other than ``x_proj:input`` has a scale a channel.
        """

        def number(site: str) -> float:
            scale = scales[sites.site_key(site, layer)]
            if isinstance(scale, torch.Tensor):
                raise ShapeError(f"`{site}` has {scale.numel()} scales in layer {layer}, expected one")
            return scale

        u_scale = scales[sites.site_key(sites.X_PROJ_INPUT, layer)]
        return cls(
            in_proj_input=number(sites.IN_PROJ_INPUT),
            in_proj_output=number(sites.IN_PROJ_OUTPUT),
            x_proj_input=u_scale.to(device) if isinstance(u_scale, torch.Tensor) else u_scale,
            x_proj_output=number(sites.X_PROJ_OUTPUT),
            dt_proj_output=number(sites.DT_PROJ_OUTPUT),
            ssm_state=number(sites.SSM_STATE),
            out_proj_input=number(sites.OUT_PROJ_INPUT),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights:
    """One Mamba block.

    Attributes:
        norm: (d_model,) float32 RMSNorm weight, or None where in_proj has absorbed it.
        in_proj: (2d, d_model); the x half first, then z.
        conv_weight: (d, w) float32, or int8 with ``conv_scale`` (d,); newest tap last.
        conv_scale: (d,) float32, or None.
        conv_bias: (d,) float32, or None.
        x_proj: (r + 2n, d).
        dt_proj: (d, r), without its bias.
        dt_bias: (d,) float32, added in the scan before softplus.
        A: (d, n) float32, ``-exp(A_log)``.
        D: (d,) float32.
        out_proj: (d_model, d).
        rotated: whether in_proj and out_proj expect and emit the Hadamard basis.
        scales: activation scales, or all None.
    """

    norm: torch.Tensor | None
    in_proj: LinearWeights
    conv_weight: torch.Tensor
    conv_scale: torch.Tensor | None
    conv_bias: torch.Tensor | None
    x_proj: LinearWeights
    dt_proj: LinearWeights
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    out_proj: LinearWeights
    rotated: bool
    scales: SiteScales

    @property
    def half(self) -> torch.dtype | None:
        """The 16-bit dtype that the block computes in, or None."""
        weight = self.in_proj.weight
        half = isinstance(weight, torch.Tensor) and weight.dtype in HALF_DTYPES
        return weight.dtype if half and isinstance(weight, torch.Tensor) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """A whole model.

    Attributes:
        config: sizes.
        embedding: (vocab_size, d_model) float32, float16 or bfloat16, or int8 with ``embedding_scale``.
        blocks: one entry a layer; a tuple, or on a CPU what reads them from elsewhere as they are asked for.
        norm_f: (d_model,) float32, or None where lm_head has absorbed it.
        lm_head: (vocab_size, d_model); the embedding's own tensors where the head is tied and both are in one
            basis.
        embedding_scale: (vocab_size,) float32, or None.
        rotate_ends: whether embedding and lm_head are in the trained basis while the blocks are rotated: what
            is read from the table is then rotated as the model runs, what lm_head reads is rotated back, and
            ``norm_f`` is applied there.
    """

    config: MambaConfig
    embedding: torch.Tensor
    blocks: Sequence[BlockWeights]
    norm_f: torch.Tensor | None
    lm_head: LinearWeights
    embedding_scale: torch.Tensor | None = None
    rotate_ends: bool = False


W = TypeVar("W", LinearWeights, BlockWeights, ModelWeights)


def on_device(weights: W, device: torch.device) -> W:
    """The same weights with every tensor on ``device``.

    Tensors that are there already are shared, and one that serves twice is moved once.
    """
    done: dict[int, torch.Tensor] = {}
    return map_tensors(weights, lambda tensor: done.setdefault(id(tensor), tensor.to(device)))


def map_tensors(weights: W, function: Callable[[torch.Tensor], torch.Tensor]) -> W:
    """The same weights with every tensor replaced by what ``function`` makes of it, in a fixed order.

    Blocks that are not a tuple are where they are, and stay as they are.
    """
    mapped: W = _mapped(weights, function)
    return mapped


def _mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_mapped(item, function) for item in value)
    if is_dataclass(value) and not isinstance(value, type | MambaConfig):
        changed = {field.name: _mapped(getattr(value, field.name), function) for field in fields(value)}
        return replace(value, **changed)
    return value
