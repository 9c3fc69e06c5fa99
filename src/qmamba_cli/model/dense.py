"""A copy of a model whose matrices lie expanded on its GPU, where its memory allows."""

from dataclasses import replace

import torch

from qmamba_cli.kernels.linear.interleaved import Weight, expanded
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.weights import LinearWeights

# Of the free memory, what the copy may take: states, activations and recordings come after it.
_SHARE = 0.5


def dense_model(model: Mamba, free_bytes: int | None = None) -> Mamba:
    """A model of the same bits for batches that read each weight for many tokens at once.

    Expanding a packed matrix takes as long as multiplying a few dozen tokens with it, so it is done once:
    one byte a weight beside what the model holds. Weights that are expanded already are shared.

    Args:
        model: the model in its mode.
        free_bytes: memory that is free; asked of the device if left out.

    Returns:
        The copy, or the model itself where nothing is packed or half of the free memory does not hold it.
    """
    from qmamba_cli.kernels.linear.operands import expand

    blocks = model.weights.blocks
    packed = [
        linear.weight
        for block in blocks
        for linear in (block.in_proj, block.out_proj)
        if not isinstance(linear.weight, torch.Tensor)
    ]
    if not packed:
        return model
    if free_bytes is None:
        free_bytes = torch.cuda.mem_get_info(model.backend.device)[0]
    if sum(weight.shape[0] * weight.shape[1] for weight in packed) > _SHARE * free_bytes:
        return model

    def rows(weight: Weight) -> torch.Tensor:
        return expand(weight) if weight.device.type == "cuda" else expanded(weight)

    def dense(linear: LinearWeights) -> LinearWeights:
        return replace(linear, weight=rows(linear.weight))

    dense_blocks = tuple(
        replace(block, in_proj=dense(block.in_proj), out_proj=dense(block.out_proj)) for block in blocks
    )
    return Mamba(replace(model.weights, blocks=dense_blocks), model.mode, model.backend)
