"""Quantized models made in memory, and backends that record what the operators are handed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qmamba_cli.config import MambaConfig
from qmamba_cli.kernels.backend import CPU, Backend
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model
from qmamba_cli.model.quantize import Recipe, quantized_model, quantized_tensors
from qmamba_cli.model.weights import ModelWeights
from qmamba_cli.modes import MODES, Mode
from qmamba_cli.quant.grid import Scale
from qmamba_cli.quant.observers import ObserverSet
from qmamba_cli.sites import X_PROJ_INPUT

ALPHA = 0.9995


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model, float and quantized, with the tokens it is tested on."""

    config: MambaConfig
    tensors: Mapping[str, torch.Tensor]
    rotated: ModelWeights
    quantized: ModelWeights
    scales: Mapping[str, Scale]
    ids: torch.Tensor

    def weights(self, mode: Mode) -> ModelWeights:
        return self.rotated if str(mode.precision) == "fp32" else self.quantized

    def model(self, mode: str | Mode, backend: Backend = CPU) -> Mamba:
        row = MODES[mode] if isinstance(mode, str) else mode
        return Mamba(self.weights(row), row, backend)


def make_subject(
    config: MambaConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    calibration: torch.Tensor,
    ids: torch.Tensor,
    recipe: Recipe | None = None,
    by_channel: bool = False,
) -> Subject:
    rotated = float_model(config, tensors.__getitem__)
    scales = observed_scales(rotated, calibration)
    if by_channel:
        scales |= observed_channel_scales(rotated, calibration)
    return Subject(
        config=config,
        tensors=tensors,
        rotated=rotated,
        quantized=quantize(config, tensors, scales, recipe or Recipe(w_bits=8)),
        scales=scales,
        ids=ids,
    )


def observed_channel_scales(rotated: ModelWeights, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scale a channel of u, of which the largest values of every channel clip."""
    found: dict[str, torch.Tensor] = {}

    def observe(key: str, tensor: torch.Tensor) -> None:
        if key.endswith(X_PROJ_INPUT):
            found[key] = (tensor.abs().amax(dim=(0, 2)) * (0.98 / 127)).clamp_min(1e-6)

    Mamba(rotated, MODES["fp"], CPU).forward(ids, hook=observe)
    return found


def observed_scales(rotated: ModelWeights, ids: torch.Tensor) -> dict[str, Scale]:
    observers = ObserverSet(rotated.config.n_layer, alpha=ALPHA)
    Mamba(rotated, MODES["fp"], CPU).forward(ids, hook=observers.observe)
    return dict(observers.scales())


def quantize(
    config: MambaConfig, tensors: Mapping[str, torch.Tensor], scales: Mapping[str, Scale], recipe: Recipe
) -> ModelWeights:
    stored = dict(quantized_tensors(config, tensors.__getitem__, recipe, scales=scales))
    return quantized_model(config, stored, scales, group_size=recipe.group_size)


@dataclass
class Recorder:
    """A CPU backend that keeps the arguments and the result of every call of one operator."""

    op: str
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)

    @property
    def backend(self) -> Backend:
        inner: Callable[..., Any] = getattr(CPU, self.op)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self.calls.append((args, kwargs, result))
            return result

        return replace(CPU, **{self.op: recorded})


def mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence of logits (..., vocab), nats a token, in float64."""
    p, q = (x.double().log_softmax(-1) for x in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def run_in_parts(model: Mamba, ids: torch.Tensor, cuts: list[int]) -> tuple[torch.Tensor, Any]:
    """Hidden states (b, l, d_model) of ids fed in the parts between the cuts, and the last state."""
    parts, state = [], None
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        hidden, state = model.forward(ids[:, start:stop], state)
        parts.append(hidden)
    return torch.cat(parts, dim=1), state
