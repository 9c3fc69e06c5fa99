"""The language model: embedding, blocks, final norm, head; prefill and one-token steps."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from qmamba_cli import sites
from qmamba_cli.errors import UsageError
from qmamba_cli.kernels.backend import Backend
from qmamba_cli.model.block import BlockState, block_forward
from qmamba_cli.model.weights import BlockWeights, ModelWeights, on_device
from qmamba_cli.modes import Mode, Precision

# One entry a layer.
ModelState: TypeAlias = Sequence[BlockState]
# Called as hook(key, tensor) with a key of `sites.site_key`.
ModelHook: TypeAlias = Callable[[str, torch.Tensor], None]


class Mamba:
    """A Mamba language model in one numeric mode on one backend.

    Args:
        weights: float or quantized weights.
        mode: the row that says which grid each tensor lies on.
        backend: the operators.

    Raises:
        UsageError: the mode needs quantized weights and these are float, or the other way round.
    """

    def __init__(self, weights: ModelWeights, mode: Mode, backend: Backend) -> None:
        quantized = weights.blocks[0].in_proj.scale is not None
        if quantized != (mode.precision is Precision.INT8):
            have = "quantized" if quantized else "float"
            raise UsageError(f"mode {mode.name} has precision={mode.precision}, got {have} weights")
        self.weights = on_device(weights, backend.device)
        self.mode = mode
        self.backend = backend
        self.config = weights.config
        self.vocab_size = weights.config.vocab_size

    def replace_block(self, layer: int, weights: BlockWeights) -> None:
        """Give a layer weights of the same function in another form; nothing else of the model changes."""
        blocks = self.weights.blocks
        self.weights = replace(self.weights, blocks=(*blocks[:layer], weights, *blocks[layer + 1 :]))

    @torch.inference_mode()
    def forward(
        self,
        ids: torch.Tensor,
        state: ModelState | None = None,
        *,
        hook: ModelHook | None = None,
        blocks: Iterable[BlockWeights] | None = None,
        keep: Callable[[int, BlockState], BlockState] | None = None,
    ) -> tuple[torch.Tensor, ModelState]:
        """Run tokens through every block and the final norm.

        A prompt and a single token take the same path; decoding is a call with l = 1 and the state of the
        call before.

        Args:
            ids: (b, l) int64, l >= 1, on any device.
            state: from the call before, or None at the start of a sequence.
            hook: sees every observed tensor under its site key.
            blocks: the layers' weights in another form, each asked for when its turn comes; the model's own
                if left out.
            keep: called with each layer and its new state as soon as that is there; what it returns takes the
                state's place, so that there need not be two whole ones.

        Returns:
            hidden (b, l, d_model) float32, what lm_head reads, and the new state.
        """
        ends, ids = self.weights, ids.to(self.backend.device)
        residual = self.backend.embedding(ids, ends.embedding, ends.embedding_scale)
        if ends.rotate_ends:
            residual = self.backend.hadamard(residual)
        new_state = []
        for layer, weights in enumerate(self.weights.blocks if blocks is None else blocks):
            options = {} if hook is None else {"hook": _layer_hook(hook, layer)}
            residual, block_state = block_forward(
                weights,
                self.mode,
                self.backend,
                residual,
                None if state is None else state[layer],
                norm_eps=self.config.norm_eps,
                **options,
            )
            new_state.append(block_state if keep is None else keep(layer, block_state))
            # What was handed on is not held until the next layer's is there.
            del block_state
        # Where the head is in another basis, the norm's weight belongs to it.
        norm_f = None if ends.rotate_ends else ends.norm_f
        hidden = self.backend.rms_norm(residual, norm_f, eps=self.config.norm_eps)
        if hook is not None:
            hook(sites.site_key(sites.LM_HEAD_INPUT, None), hidden)
        return hidden, new_state

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of whole sequences: (b, l) int64 to (b, l, d_model) float32."""
        return self.forward(ids)[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits: (..., d_model) float32 to (..., vocab_size) float32."""
        head = self.weights.lm_head
        if self.weights.rotate_ends:
            hidden = self.backend.unrotate(hidden, self.weights.norm_f)
        if self.mode.precision is Precision.FP32 and isinstance(head.weight, torch.Tensor):
            # A model in half precision computes its logits in it.
            hidden = hidden.to(head.weight.dtype)
        y = self.backend.linear(hidden, head.weight, head.bias, weight_scale=head.scale)
        return y.to(torch.float32)


def _layer_hook(hook: ModelHook, layer: int) -> Callable[[str, torch.Tensor], None]:
    def observe(site: str, tensor: torch.Tensor) -> None:
        hook(sites.site_key(site, layer), tensor)

    return observe
