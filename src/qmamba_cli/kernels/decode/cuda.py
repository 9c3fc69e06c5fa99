"""The decode step on CUDA: three kernels a block, chained by programmatic dependent launch."""

from functools import cache
from weakref import WeakValueDictionary

import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.decode.pack import PackedBlock
from qmamba_cli.kernels.decode.plan import DecodePlan, InputKind, SharedMemory, in_entry, make_plan
from qmamba_cli.kernels.decode.scratch import DecodeScratch, new_scratch
from qmamba_cli.kernels.decode.steps import launch_steps, steps
from qmamba_cli.kernels.decode.tensors import BLOCKS, DecodeState

SOURCE = "decode/decode.cu"
ENTRIES: tuple[str, ...] = (
    *(in_entry(bits, kind) for bits in (4, 8) for kind in InputKind),
    "decode_conv",
    *(f"decode_scan<{tokens}>" for tokens in (1, 2, 4, 8)),
    "decode_rotate",
    *(f"decode_out<{bits}, {rotate}>" for bits in (4, 8) for rotate in ("false", "true")),
    *(f"decode_out_columns<{bits}>" for bits in (4, 8)),
    *(f"decode_unpack<{bits}>" for bits in (4, 8)),
)
# Buffers whose kernels' thread blocks meet, one a device: of two such kernels side by side, each could hold
# the multiprocessors that the other's blocks wait for.
_meeting: WeakValueDictionary[torch.device, DecodeScratch] = WeakValueDictionary()


def make_scratch(packed: PackedBlock, batch: int, plan: DecodePlan | None = None) -> DecodeScratch:
    """Buffers for every block of the sizes and columns of ``packed``, on its device."""
    return new_scratch(packed, batch, plan or default_plan(packed, batch))


def default_plan(packed: PackedBlock, batch: int) -> DecodePlan:
    """The plan of a block on the device where it lies, for one stream of the device at a time."""
    # Its blocks meet only where each has a multiprocessor to run on.
    meet = packed.columns.dynamic_input and _launch.sm_count(packed.device) >= BLOCKS
    return make_plan(packed, batch, shared_memory(packed.device), meet=meet)


def plan_beside_others(packed: PackedBlock, batch: int) -> tuple[DecodePlan, DecodeScratch]:
    """A plan and its buffers that may run while those of other calls do: blocks meet for one of them only.

    A device's first call gets `default_plan`; the next ones, while its buffers are in use, the same bits
    without blocks that meet.
    """
    plan = default_plan(packed, batch)
    if plan.meet and packed.device in _meeting:
        plan = make_plan(packed, batch, shared_memory(packed.device), meet=False)
    scratch = make_scratch(packed, batch, plan)
    if plan.meet:
        _meeting[packed.device] = scratch
    return plan, scratch


def decode_block(
    packed: PackedBlock,
    residual: torch.Tensor,
    state: DecodeState,
    scratch: DecodeScratch,
    *,
    plan: DecodePlan | None = None,
    layer: int = 0,
    after: PackedBlock | None = None,
    last: bool = True,
) -> None:
    """One token of one block; `decode.reference.decode_block` on packed weights.

    Launches on torch's current stream and touches only its arguments, so a CUDA graph can capture it.

    Args:
        packed: the block.
        residual: (b, d_model) float32, updated in place.
        state: updated in place.
        scratch: of `make_scratch` for this batch and plan, shared by all blocks.
        plan: how to launch, by default `default_plan`.
        layer: 0, or how many calls with this scratch and residual came directly before this one in the
            stream, the first of them with layer 0. Such a call takes up the last one's result sooner.
        after: the block of the call before, which was not its model's last one.
        last: whether the residual is to be whole after this call. Else, with `DecodePlan.columns`, a part of
            it stays in the scratch for the next call, which names this block as ``after``.

    Raises:
        ShapeError: an argument is not as above.
    """
    plan = plan or default_plan(packed, residual.shape[0])
    for name, tensor in (("residual", residual), ("state.ssm", state.ssm)):
        _launch.require_cuda(name, tensor)
    found = steps(packed, residual, state, scratch, plan, layer=layer, after=after, last=last)
    launch_steps(SOURCE, found, residual.device, overlap=plan.overlap)


@cache
def shared_memory(device: torch.device) -> SharedMemory:
    """Shared memory of a device."""
    properties = torch.cuda.get_device_properties(device)
    multiprocessor = properties.shared_memory_per_multiprocessor
    # The driver keeps 1 KiB of every block; older versions of torch do not tell the limit.
    block = getattr(properties, "shared_memory_per_block_optin", multiprocessor - 1024)
    return SharedMemory(multiprocessor=multiprocessor, block=block)
