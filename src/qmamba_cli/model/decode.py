"""One-token steps of a fixed batch: on a GPU one replay a token, from the embedding to the sampled token."""

from collections.abc import Sequence
from typing import Protocol

import torch

from qmamba_cli.errors import UsageError
from qmamba_cli.model import batched, fused
from qmamba_cli.model.block import BlockState
from qmamba_cli.model.dense import dense_model
from qmamba_cli.model.ends import most_likely
from qmamba_cli.model.graphs import CudaGraphs, Recorder, Replayed
from qmamba_cli.model.mamba import Mamba, ModelState
from qmamba_cli.model.prefill import Prefill
from qmamba_cli.model.state import assign, on_grid


class Stepper(Protocol):
    """One token a row through every layer, with the state in tensors of its own at fixed addresses.

    This is where a fused decode step plugs in; `ModelStepper` takes the general path. Every method may be
    recorded after it has run once.
    """

    def load(self, state: ModelState) -> None:
        """Take over the state after a prompt, on the grid of the mode."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """A step from (b, 1) int64 token ids to logits, (b, vocab_size) float32; moves the state on."""

    def choose(self, tokens: torch.Tensor, vocab_size: int | None) -> None:
        """A step that puts each row's most likely token below ``vocab_size`` in the place of its own."""


class ModelStepper:
    """A step as a call of the model with one token.

    Args:
        model: the model in its mode.
    """

    def __init__(self, model: Mamba) -> None:
        self._model = model
        self._state: ModelState | None = None

    def load(self, state: ModelState) -> None:
        """Take over a state: the first one's tensors become the stepper's own."""
        if self._state is None:
            self._state = state
        else:
            assign(self._state, state)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """One call with l = 1."""
        return self._model.logits(self._hidden(tokens))

    def choose(self, tokens: torch.Tensor, vocab_size: int | None) -> None:
        """The same, and the largest."""
        most_likely(self._model, self.logits(tokens), tokens, vocab_size)

    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self._state is not None
        if self._model.backend.device.type == "cpu":
            return self._model.forward(tokens, self._state, keep=self._keep)[0][:, -1]
        # On a GPU all of it at the end, in a few launches.
        hidden, state = self._model.forward(tokens, self._state)
        assign(self._state, state)
        return hidden[:, -1]

    def _keep(self, layer: int, state: BlockState) -> BlockState:
        """Move one layer's state on: there are never two of the whole model."""
        assert self._state is not None
        assign(self._state[layer : layer + 1], [state])
        return self._state[layer]


def _fused_stepper(model: Mamba, batch: int) -> Stepper | None:
    """The step in a few kernels a layer, or None where there is none."""
    if fused.unsupported(model, batch) is None:
        return fused.FusedStepper(model, fused.cuda_blocks(model, batch))
    return batched.cuda_stepper(model, batch) if batched.unsupported(model, batch) is None else None


class Decoder:
    """Prompts and their continuation, token by token, for one model and batch size.

    Tokens stay on the device: each step reads the tokens of the one before. On a GPU a step is recorded as
    one CUDA graph, and neither `start` nor `step` waits for the device.

    A fused step, of few or of many rows, packs the model's large matrices anew, and the packed ones take
    their place in the model. The general step on a GPU has a copy of them, expanded to one byte a weight,
    where half of the free memory holds it.

    Args:
        model: the model in its mode.
        batch: rows.
        vocab_size: ids from here on are padding of the vocabulary and are never made, or None.
        recorder: records the steps; `CudaGraphs` on a GPU and none on a CPU if left out.
        stepper: how a step is computed; the fused step where there is one, else `ModelStepper`, if left out.
        part_length: as ``longest`` of `Prefill`.
    """

    def __init__(
        self,
        model: Mamba,
        batch: int,
        *,
        vocab_size: int | None = None,
        recorder: Recorder | None = None,
        stepper: Stepper | None = None,
        part_length: int | None = None,
    ) -> None:
        self.device = model.backend.device
        if recorder is None and self.device.type == "cuda":
            recorder = CudaGraphs(self.device)
        self.batch = batch
        # Before the prefill, which shares the model's weights: packing replaces them.
        stepper = stepper or _fused_stepper(model, batch)
        if stepper is None and self.device.type == "cuda":
            model = dense_model(model)
        self._model = model
        self._vocab_size = vocab_size
        self._recorder = recorder
        self._stepper = stepper or ModelStepper(model)
        self._prefill = Prefill(model, batch, recorder, part_length)
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self._temperature = torch.ones(1, device=self.device)
        self._generator = torch.Generator(self.device)
        self._sampled = False
        self._prompt_state: ModelState | None = None
        self._load = Replayed(self._load_state, recorder)
        self._steps = {
            False: Replayed(lambda: self._step(sampled=False), recorder),
            True: Replayed(lambda: self._step(sampled=True), recorder, self._generator),
        }

    def prepare(self, temperature: float = 0.0) -> None:
        """Compile and record what steps at this temperature need, so that no later token waits for it.

        Without a recorder there is nothing to do.
        """
        if self._recorder is not None:
            self.start(torch.zeros(self.batch, 1, dtype=torch.int64), temperature=temperature)
            self._prepare()

    @torch.inference_mode()
    def start(
        self,
        ids: torch.Tensor,
        *,
        lengths: Sequence[int] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> torch.Tensor:
        """Run a prompt a row and make the first token of each.

        Args:
            ids: (b, l) int64, l >= 1, on any device.
            lengths: tokens of each row, from 1 to l, where they differ; what is behind them is not read.
            temperature: 0 takes the most likely token; above it, logits are divided by it and sampled.
            seed: of the sampling; the same arguments give the same tokens on the same device.

        Returns:
            (b,) int64 on the device; the next step overwrites it.

        Raises:
            UsageError: the temperature is negative, ids has another number of rows, or lengths do not fit it.
        """
        if temperature < 0:
            raise UsageError(f"`--temperature` must be >= 0, got {temperature}")
        if ids.shape[0] != self.batch:
            raise UsageError(f"the prompts must be {self.batch} rows, got {ids.shape[0]}")
        if lengths is not None and not (
            len(lengths) == self.batch and all(1 <= length <= ids.shape[1] for length in lengths)
        ):
            raise UsageError(
                f"lengths must be {self.batch} numbers from 1 to {ids.shape[1]}, got {list(lengths)}"
            )
        self._sampled = temperature > 0
        self._temperature.fill_(temperature if self._sampled else 1.0)
        self._generator.manual_seed(seed)
        if lengths is None or set(lengths) == {ids.shape[1]}:
            hidden, self._prompt_state = self._prefill(ids)
        else:
            hidden, self._prompt_state = self._prefill.ragged(ids, lengths)
        logits = self._model.logits(hidden)
        if self._sampled:
            self._sample(logits)
        else:
            most_likely(self._model, logits, self._tokens, self._vocab_size)
        return self._tokens.squeeze(1)

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Make the next token of each row: (b,) int64 on the device; the next step overwrites it."""
        if self._prompt_state is not None:
            # Not in `start`, where the first token would wait for it.
            self._load()
            self._prompt_state = None
        self._steps[self._sampled]()
        return self._tokens.squeeze(1)

    @torch.inference_mode()
    def _prepare(self) -> None:
        self._load.prepare()
        self._prompt_state = None
        self._steps[self._sampled].prepare()

    def _load_state(self) -> None:
        assert self._prompt_state is not None
        self._stepper.load(on_grid(self._model, self._prompt_state))

    def _step(self, *, sampled: bool) -> None:
        if sampled:
            self._sample(self._stepper.logits(self._tokens))
        else:
            self._stepper.choose(self._tokens, self._vocab_size)

    def _sample(self, logits: torch.Tensor) -> None:
        # One draw of each row's distribution: the race that exponential clocks of these rates run.
        rates = torch.softmax(logits[:, : self._vocab_size].float() / self._temperature, dim=-1)
        clocks = torch.empty_like(rates).exponential_(generator=self._generator)
        most_likely(self._model, rates.div_(clocks), self._tokens, self._vocab_size)
