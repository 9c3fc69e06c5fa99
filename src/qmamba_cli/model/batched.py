"""The decode step of a whole model for many sequences: a few kernels a layer, with the state in place."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.decode.tensors import DecodeState
from qmamba_cli.kernels.decode_batch.plan import BatchPlan, unsupported_batch
from qmamba_cli.kernels.decode_batch.tensors import (
    BatchState,
    batch_block,
    load_state,
    new_scratch,
    new_state,
)
from qmamba_cli.model import fused
from qmamba_cli.model.ends import BetweenEnds
from qmamba_cli.model.mamba import Mamba, ModelState

# One token through every block: (b, d_model) float32 residual and states, both updated in place.
BatchStep: TypeAlias = Callable[[torch.Tensor, Sequence[BatchState]], None]


class BatchedStepper(BetweenEnds):
    """A `decode.Stepper` of blocks whose state lies in the order of their kernels.

    Args:
        model: embedding, final norm, head and epsilon come from here.
        states: one a layer.
        step: every block.
    """

    def __init__(self, model: Mamba, states: Sequence[BatchState], step: BatchStep) -> None:
        super().__init__(model)
        self._states = states
        self._step = step

    def load(self, state: ModelState) -> None:
        """Take over a state: a copy."""
        for to, layer in zip(self._states, state, strict=True):
            load_state(to, DecodeState(*layer))

    def _run(self, residual: torch.Tensor) -> None:
        self._step(residual, self._states)


def unsupported(model: Mamba, batch: int) -> str | None:
    """Why a model has no such step at this batch size, or None where it has one."""
    return unsupported_batch(batch) or fused.unsupported(model, 1)


def cuda_stepper(model: Mamba, batch: int) -> BatchedStepper | None:
    """The step of a model on its GPU, or None where its blocks do not fit in the GPU's shared memory.

    Its large matrices are packed as `fused.cuda_blocks` says.
    """
    from qmamba_cli.kernels.decode_batch.cuda import default_plan, step_blocks

    packed = fused.packed_blocks(model)
    try:
        plan: BatchPlan = default_plan(packed[0], batch)
    except ShapeError:
        return None
    blocks = [batch_block(block) for block in packed]
    states = [new_state(block, plan) for block in packed]
    step = partial(step_blocks, blocks, scratch=new_scratch(packed[0], plan), plan=plan)
    return BatchedStepper(model, states, lambda residual, held: step(residual, held))
