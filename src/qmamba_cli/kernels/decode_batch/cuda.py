"""The step of many sequences on CUDA: six kernels a block, chained by programmatic dependent launch."""

from collections.abc import Sequence

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.decode.cuda import shared_memory
from qmamba_cli.kernels.decode.pack import PackedBlock
from qmamba_cli.kernels.decode.steps import launch_steps
from qmamba_cli.kernels.decode_batch.plan import GROUPS, NORM_PARTS, BatchPlan, make_plan
from qmamba_cli.kernels.decode_batch.steps import steps
from qmamba_cli.kernels.decode_batch.tensors import BatchBlock, BatchScratch, BatchState

SOURCE = "decode_batch/decode_batch.cu"
_PRODUCTS = tuple(f"{bits}, {size // 32}" for bits in (4, 8) for size in GROUPS)
ENTRIES: tuple[str, ...] = (
    *(f"batch_norm<{parts}>" for parts in NORM_PARTS),
    *(f"batch_in<{product}>" for product in _PRODUCTS),
    "batch_conv",
    *(f"batch_scan<{int8_state}>" for int8_state in ("false", "true")),
    "batch_rotate",
    *(f"batch_out<{product}>" for product in _PRODUCTS),
)


def is_wide(device: torch.device) -> bool:
    """Whether a device multiplies by groups of warps, as its machine code is compiled for (``target_of``)."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def default_plan(packed: PackedBlock, batch: int) -> BatchPlan:
    """The plan of a block on the device where it lies."""
    return make_plan(packed, batch, shared_memory(packed.device), wide=is_wide(packed.device))


def step_blocks(
    blocks: Sequence[BatchBlock],
    residual: torch.Tensor,
    states: Sequence[BatchState],
    scratch: BatchScratch,
    plan: BatchPlan,
) -> None:
    """One token through blocks in turn; `decode.reference.decode_block` of each on packed weights.

    Launches on torch's current stream and touches only its arguments, so a CUDA graph can capture it.

    Args:
        blocks: of one size and mode.
        residual: (b, d_model) float32, updated in place.
        states: of each block, updated in place.
        scratch: of `new_scratch` for this plan.
        plan: of `make_plan` for these sizes, b sequences and this device.

    Raises:
        ShapeError: an argument is not as above.
    """
    _launch.require_cuda("residual", residual)
    if plan.wide != is_wide(residual.device):
        raise ShapeError(f"decode_batch: a plan with wide={plan.wide} is not one of {residual.device}")
    found = steps(blocks, residual, states, scratch, plan)
    launch_steps(SOURCE, found, residual.device, overlap=plan.overlap)
