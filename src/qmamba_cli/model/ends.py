"""The two ends of a decode step: tokens to the residual, and the residual behind the last block to tokens."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch

from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.weights import LinearWeights


class Ends(Protocol):
    """What of a step lies around the blocks. Every implementation computes the same bits."""

    def begin(self, tokens: torch.Tensor) -> torch.Tensor:
        """(b, 1) int64 tokens to their residual in the basis of the blocks, (b, d_model) float32."""

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """The residual behind the last block to logits, (b, vocab_size) float32."""

    def choose(self, residual: torch.Tensor, tokens: torch.Tensor, vocab_size: int | None) -> None:
        """Write each row's most likely token below ``vocab_size`` into (b, 1) tokens."""


class PlainEnds:
    """The backend's operators one by one.

    Args:
        model: embedding, final norm, head and epsilon come from here.
    """

    def __init__(self, model: Mamba) -> None:
        self._model = model

    def begin(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Ends`."""
        ends, ops = self._model.weights, self._model.backend
        residual = ops.embedding(tokens.squeeze(1), ends.embedding, ends.embedding_scale)
        return ops.hadamard(residual) if ends.rotate_ends else residual

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """See `Ends`."""
        ends = self._model.weights
        norm_f = None if ends.rotate_ends else ends.norm_f
        return self._model.logits(
            self._model.backend.rms_norm(residual, norm_f, eps=self._model.config.norm_eps)
        )

    def choose(self, residual: torch.Tensor, tokens: torch.Tensor, vocab_size: int | None) -> None:
        """See `Ends`."""
        most_likely(self._model, self.logits(residual), tokens, vocab_size)


class FusedEnds:
    """One launch before the blocks; behind them one for one row, a few for several.

    Args:
        model: as for `PlainEnds`; `fused_ends` says which have these.
        head: its head, whose weight is a tensor.
    """

    def __init__(self, model: Mamba, head: LinearWeights) -> None:
        from qmamba_cli.kernels.decode_ends import cuda

        self._kernels = cuda
        self._model = model
        self._ends = model.weights
        self._head = cuda.Head(
            gain=model.weights.norm_f,
            weight=head.matrix,
            weight_scale=head.scale,
            bias=head.bias,
            eps=model.config.norm_eps,
        )

    def begin(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Ends`."""
        return self._kernels.begin(tokens.squeeze(1), self._ends.embedding, self._ends.embedding_scale)

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """See `Ends`."""
        if residual.shape[0] == 1:
            return self._head.logits(residual)
        head = self._ends.lm_head
        hidden = self._kernels.turn(residual, self._ends.norm_f, self._model.config.norm_eps)
        return self._model.backend.linear(hidden, head.weight, head.bias, weight_scale=head.scale)

    def choose(self, residual: torch.Tensor, tokens: torch.Tensor, vocab_size: int | None) -> None:
        """See `Ends`."""
        if residual.shape[0] == 1:
            self._head.choose(residual, tokens, vocab_size)
        else:
            most_likely(self._model, self.logits(residual), tokens, vocab_size)


def step_ends(model: Mamba) -> Ends:
    """The ends of a model's decode step: fused where there are kernels for its sizes."""
    ends, head = model.weights, model.weights.lm_head
    if model.backend.device.type == "cuda" and ends.rotate_ends and isinstance(head.weight, torch.Tensor):
        from qmamba_cli.kernels.decode_ends.cuda import supported

        if supported(ends.embedding, head.weight, ends.norm_f):
            return FusedEnds(model, head)
    return PlainEnds(model)


def most_likely(model: Mamba, logits: torch.Tensor, tokens: torch.Tensor, vocab_size: int | None) -> None:
    """Write the place of each row's largest logit below ``vocab_size`` into (b, 1) tokens."""
    tokens.copy_(model.backend.argmax(logits[:, :vocab_size].float()).unsqueeze(1))


class BetweenEnds(ABC):
    """What a `decode.Stepper` does with tokens where its blocks take one residual.

    Args:
        model: embedding, final norm, head and epsilon come from here.
    """

    def __init__(self, model: Mamba) -> None:
        self._ends = step_ends(model)

    @abstractmethod
    def _run(self, residual: torch.Tensor) -> None:
        """Every block, in place."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Every block on one residual, then norm and head."""
        return self._ends.logits(self._residual(tokens))

    def choose(self, tokens: torch.Tensor, vocab_size: int | None) -> None:
        """The same, and the largest."""
        self._ends.choose(self._residual(tokens), tokens, vocab_size)

    def _residual(self, tokens: torch.Tensor) -> torch.Tensor:
        residual = self._ends.begin(tokens)
        self._run(residual)
        return residual
