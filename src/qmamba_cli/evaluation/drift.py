"""How far a quantized model's scan state and logits part from the float model's as the sequence grows.

Both models read the same text, a number of streams side by side, once in one pass to each length (prefill)
and once token by token with carried state (decode). What an int8 state costs shows only in decode, where it
is rounded at every token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from numpy.typing import NDArray

from qmamba_cli.evaluation.divergence import interval
from qmamba_cli.progress import Advance

PREFILL, DECODE = "prefill", "decode"
PATHS = (PREFILL, DECODE)

# Logits held at once: 32 MB of float32.
_LOGITS_BLOCK = 1 << 23

# One scan state a layer, (b, d, n) float32 in real units.
States: TypeAlias = Sequence[torch.Tensor]


class StatefulModel(Protocol):
    """What this measurement asks of a model."""

    @property
    def vocab_size(self) -> int:
        """Number of logits."""

    def forward(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        """(b, l) int64 and the state of the call before to (b, l, d_model) and the new state."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d_model) to (..., vocab_size) float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The difference at one length.

    Attributes:
        t: tokens read; the scores are the mean over the tokens after the point before, up to this one.
        kl: KL divergence float ‖ quantized, nats a token.
        kl_ci: its 95 % interval, from a bootstrap of the streams; None with one stream.
        logits_error: ‖Δ‖ / ‖logits‖ of the logits less their mean, which no probability depends on.
        state_error: ‖Δ‖ / ‖state‖ of the scan state after t tokens as it leaves the call, mean of the layers.
        layers: the same for each layer.
    """

    t: int
    kl: float
    kl_ci: tuple[float, float] | None
    logits_error: float
    state_error: float
    layers: Sequence[float]

    def record(self) -> dict[str, Any]:
        """The point as one JSON object."""
        return {
            "t": self.t,
            "kl": self.kl,
            "kl_ci": None if self.kl_ci is None else list(self.kl_ci),
            "logits_error": self.logits_error,
            "state_error": self.state_error,
            "state_error_layers": list(self.layers),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a model made of the streams between two of the marks.

    Attributes:
        t: tokens read so far.
        hidden: (b, tokens since the mark before, d_model), what the head reads.
        states: the scan states after ``t`` tokens.
    """

    t: int
    hidden: torch.Tensor
    states: States


def marks(length: int) -> list[int]:
    """Lengths to look at: powers of two up to ``length``, and ``length`` itself.

    >>> marks(6), marks(8)
    ([1, 2, 4, 6], [1, 2, 4, 8])
    """
    powers = [1 << exponent for exponent in range(length.bit_length())]
    return powers if powers[-1] == length else [*powers, length]


def trace(
    model: StatefulModel,
    ids: torch.Tensor,
    read_states: Callable[[Any], States],
    *,
    path: str,
    advance: Advance = lambda _tokens: None,
) -> Iterator[Step]:
    """Run the streams to each of the marks, one after another.

    Prefill starts anew for every mark, so that each state is one that a prompt of that length leaves behind.

    Args:
        model: the model.
        ids: (b, l) int64.
        read_states: takes the scan states out of the model's own state.
        path: prefill or decode.
        advance: called with the number of tokens (a stream) that were read.
    """
    state: Any = None
    done = 0
    for mark in marks(ids.shape[1]):
        if path == PREFILL:
            hidden, state = model.forward(ids[:, :mark])
            hidden = hidden[:, done:]
            advance(mark)
        else:
            parts = []
            for position in range(done, mark):
                one, state = model.forward(ids[:, position : position + 1], state)
                parts.append(one)
                advance(1)
            hidden = torch.cat(parts, dim=1)
        yield Step(t=mark, hidden=hidden, states=read_states(state))
        done = mark


def tokens_read(length: int, path: str) -> int:
    """Tokens a stream that `trace` reads."""
    return sum(marks(length)) if path == PREFILL else length


@torch.inference_mode()
def point(baseline: StatefulModel, expected: Step, model: StatefulModel, got: Step) -> Point:
    """The difference of two models at one of the marks.

    Args:
        baseline: the float model, for its head.
        expected: what it made of the streams.
        model: the other model, for its head.
        got: what that one made of them, up to the same mark.
    """
    streams, tokens = got.hidden.shape[:2]
    kl, error = _token_errors(baseline, expected.hidden, model, got.hidden.to(expected.hidden.device))
    layers = [
        _relative(state, reference) for state, reference in zip(got.states, expected.states, strict=True)
    ]
    return Point(
        t=got.t,
        kl=float(kl.mean()),
        kl_ci=interval(kl.sum(axis=1), np.full(streams, tokens, dtype=np.int64)),
        logits_error=float(error.mean()),
        state_error=sum(layers) / len(layers),
        layers=layers,
    )


def _token_errors(
    baseline: StatefulModel, expected: torch.Tensor, model: StatefulModel, got: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """KL divergence in nats and relative error of the logits, each (b, l) float64, of (b, l, d_model)."""
    kls, errors = [], []
    rows = max(1, _LOGITS_BLOCK // model.vocab_size)
    for reference, hidden in zip(
        torch.split(expected.flatten(0, 1), rows), torch.split(got.flatten(0, 1), rows), strict=True
    ):
        p, q = baseline.logits(reference), model.logits(hidden)
        log_p, log_q = F.log_softmax(p, dim=-1), F.log_softmax(q, dim=-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64).cpu())
        p, q = p - p.mean(dim=-1, keepdim=True), q - q.mean(dim=-1, keepdim=True)
        errors.append(((q - p).norm(dim=-1) / p.norm(dim=-1)).double().cpu())
    shape = got.shape[:2]
    return torch.cat(kls).view(shape).numpy(), torch.cat(errors).view(shape).numpy()


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got - expected‖ / ‖expected‖ over everything."""
    expected = expected.double()
    return float((got.to(expected.device).double() - expected).norm() / expected.norm())
