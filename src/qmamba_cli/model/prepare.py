"""Float checkpoint to block weights: fold the norms, rotate, leave the rest alone.

    embedding E' = F(E)                       in_proj W' = F(W * gamma)
    lm_head  W' = F(W * gamma_f)              out_proj W' = F on both sides of W

F is the orthonormal Hadamard transform. Folding and rotating run in float64 and are rounded once to float32.

Source: Ashkboos et al., "QuaRot" (2024), section 4; Chiang et al., "Quamba" (2024), section 4.2. We rotate
the residual stream (both sides of out_proj) as well, so that no rotation is left on in_proj's input when it
runs.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from qmamba_cli.config import MambaConfig
from qmamba_cli.kernels.hadamard.reference import hadamard
from qmamba_cli.model.weights import BlockWeights, LinearWeights, ModelWeights, SiteScales

# Reads one tensor of a float checkpoint by its Hugging Face name, in whatever float dtype it is stored.
Load = Callable[[str], torch.Tensor]

# Rows transformed at a time: bounds the float64 copy of a large embedding.
_ROWS = 8192


def rotate_inputs(weight: torch.Tensor, gamma: torch.Tensor | None = None) -> torch.Tensor:
    """``F(weight * gamma)`` along the input axis.

    Args:
        weight: (m, k), any float dtype.
        gamma: (k,), any float dtype, or None.

    Returns:
        (m, k) float32.
    """
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS):
        rows = weight[start : start + _ROWS].to(torch.float64)
        if gamma is not None:
            rows = rows * gamma.to(torch.float64)
        out[start : start + _ROWS] = hadamard(rows).to(torch.float32)
    return out


def rotate_outputs(weight: torch.Tensor) -> torch.Tensor:
    """F along the output axis of a (m, k) weight, or of a (m,) bias; float32."""
    if weight.dim() == 1:
        return hadamard(weight.to(torch.float64)).to(torch.float32)
    return hadamard(weight.to(torch.float64).t()).t().to(torch.float32).contiguous()


def float_block(config: MambaConfig, load: Load, layer: int, *, rotate: bool = True) -> BlockWeights:
    """One block of the float model, rotated or as it was trained.

    Args:
        config: sizes.
        load: reads a checkpoint tensor by name.
        layer: 0-based index.
        rotate: fold the norm and rotate; False keeps the trained basis.
    """
    mixer = f"backbone.layers.{layer}.mixer"

    def real(name: str) -> torch.Tensor:
        return load(f"{mixer}.{name}").to(torch.float32)

    norm = load(f"backbone.layers.{layer}.norm.weight")
    in_weight, out_weight = load(f"{mixer}.in_proj.weight"), load(f"{mixer}.out_proj.weight")
    in_bias = real("in_proj.bias") if config.proj_bias else None
    out_bias = real("out_proj.bias") if config.proj_bias else None
    if rotate:
        in_weight = rotate_inputs(in_weight, norm)
        out_weight = rotate_outputs(rotate_inputs(out_weight))
        out_bias = None if out_bias is None else rotate_outputs(out_bias)
    return BlockWeights(
        norm=None if rotate else norm.to(torch.float32),
        in_proj=LinearWeights(in_weight.to(torch.float32), bias=in_bias),
        conv_weight=real("conv1d.weight").squeeze(1),
        conv_scale=None,
        conv_bias=real("conv1d.bias") if config.conv_bias else None,
        x_proj=LinearWeights(real("x_proj.weight")),
        dt_proj=LinearWeights(real("dt_proj.weight")),
        dt_bias=real("dt_proj.bias"),
        A=-torch.exp(real("A_log")),
        D=real("D"),
        out_proj=LinearWeights(out_weight.to(torch.float32), bias=out_bias),
        rotated=rotate,
        scales=SiteScales(),
    )


def float_ends(
    config: MambaConfig, load: Load, *, rotate: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Embedding, final norm and head of the float model: ``(embedding, norm_f or None, lm_head)``, float32.

    A tied head is untied where it is rotated: the two then differ by the final norm's weight.
    """
    embedding = load("backbone.embeddings.weight")
    gamma = load("backbone.norm_f.weight")
    if not rotate:
        real = embedding.to(torch.float32)
        return (
            real,
            gamma.to(torch.float32),
            real if config.tie_embeddings else load("lm_head.weight").to(torch.float32),
        )
    head = embedding if config.tie_embeddings else load("lm_head.weight")
    return rotate_inputs(embedding), None, rotate_inputs(head, gamma)


def float_model(
    config: MambaConfig,
    load: Load,
    *,
    rotate: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> ModelWeights:
    """The float model, rotated or as it was trained; both compute the same function.

    Args:
        config: sizes.
        load: reads a checkpoint tensor by name.
        rotate: fold the norms and rotate; False keeps the trained basis, and a tied head shares its table.
        dtype: of the projections, the embedding and the head; the rest, and the residual, stay float32.
        device: where each tensor is prepared and stays, or None for where it is read to.
    """

    def read(name: str) -> torch.Tensor:
        return load(name) if device is None else load(name).to(device)

    embedding, norm_f, head = float_ends(config, read, rotate=rotate)
    shared = head is embedding
    embedding = embedding.to(dtype)
    return ModelWeights(
        config=config,
        embedding=embedding,
        blocks=tuple(
            _in_dtype(float_block(config, read, layer, rotate=rotate), dtype)
            for layer in range(config.n_layer)
        ),
        norm_f=norm_f,
        lm_head=LinearWeights(embedding if shared else head.to(dtype)),
    )


def _in_dtype(block: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    """The block with the matrices of its projections in another float dtype."""

    def cast(linear: LinearWeights) -> LinearWeights:
        assert isinstance(linear.weight, torch.Tensor)
        return replace(linear, weight=linear.weight.to(dtype))

    return replace(
        block,
        in_proj=cast(block.in_proj),
        x_proj=cast(block.x_proj),
        dt_proj=cast(block.dt_proj),
        out_proj=cast(block.out_proj),
    )
