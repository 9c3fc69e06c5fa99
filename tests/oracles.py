"""Float64 oracles in plain loops, each with the magnitude that its rounding errors are measured by."""

import math
from typing import Any, NamedTuple

import torch
from tolerances import EPS

from qmamba_cli.kernels.backend import Backend

CHUNK = 64


def call(backend: Backend, op: str, *args: Any, **kwargs: Any) -> Any:
    """Run one operator with CPU tensors; its results come back to the CPU."""
    result = getattr(backend, op)(
        *(_move(value, backend.device) for value in args),
        **{name: _move(value, backend.device) for name, value in kwargs.items()},
    )
    return _move(result, torch.device("cpu"))


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [_move(part, device) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Saturated, half to even; float64 to int8."""
    # The product with the float32 reciprocal is the rule; the quotient would place some ties elsewhere.
    inverse = float(torch.tensor(1.0) / torch.tensor(scale, dtype=torch.float32))
    return torch.round(x.to(torch.float64) * inverse).clamp(-128, 127).to(torch.int8)


class Conv(NamedTuple):
    v: torch.Tensor
    magnitude: torch.Tensor


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, history: torch.Tensor | None = None
) -> Conv:
    """Real values: x (b, d, l), weight (d, w), bias (d,), history (b, d, w-1)."""
    b, d, l = x.shape
    w = weight.shape[1]
    before = torch.zeros(b, d, w - 1) if history is None else history
    padded = torch.cat([before.double(), x.double()], dim=2)
    taps = weight.double()
    offset = torch.zeros(d).double() if bias is None else bias.double()
    a, magnitude = torch.zeros(2, b, d, l, dtype=torch.float64)
    for t in range(l):
        for k in range(w):
            a[:, :, t] += padded[:, :, t + k] * taps[:, k]
            magnitude[:, :, t] += (padded[:, :, t + k] * taps[:, k]).abs()
    a += offset[:, None]
    return Conv(a / (1 + torch.exp(-a)), magnitude + offset.abs()[:, None])


class Scan(NamedTuple):
    """y (b, l, d), state and its history (b, l, d, n); each with an absolute bound of the float32 error."""

    y: torch.Tensor
    y_bound: torch.Tensor
    states: torch.Tensor
    state_bounds: torch.Tensor


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor | None = None,
) -> Scan:
    """The recurrence from left to right, with a running error analysis (Higham, section 3.3) beside it.

    The bound holds for both orders: at the end of each chunk it adds what exp(A * sum(delta)) may err by.
    """
    u, dt, A, B, C, D, z, dt_bias = (x.double() for x in (u, dt, A, B, C, D, z, dt_bias))
    b, d, l = u.shape
    n = A.shape[1]
    h = torch.zeros(b, d, n, dtype=torch.float64) if state is None else state.double()
    size, error = h.abs(), EPS * h.abs()
    span = torch.zeros(b, d, dtype=torch.float64)
    start = size
    ys, y_bounds, states, bounds = [], [], [], []
    for t in range(l):
        raw = dt[:, :, t] + dt_bias
        delta = torch.where(raw > 20, raw, torch.log1p(torch.exp(raw.clamp(max=30))))
        slope = 1 / (1 + torch.exp(-raw))
        delta_error = EPS * (2 * (dt[:, :, t].abs() + dt_bias.abs()) * slope + 4 * delta)
        exponent = delta[:, :, None] * A
        decay = torch.exp(exponent)
        decay_error = delta_error[:, :, None] * A.abs() + EPS * (exponent.abs() + 2)
        increment = (delta * u[:, :, t])[:, :, None] * B[:, None, :, t]
        increment_error = (delta_error * u[:, :, t].abs())[:, :, None] * B[:, None, :, t].abs()

        error = decay * (error + size * decay_error) + increment_error + 4 * EPS * increment.abs()
        h = decay * h + increment
        size = decay * size + increment.abs()
        error = error + 2 * EPS * size
        span = span + delta
        if (t + 1) % CHUNK == 0:
            chunk_exponent = span[:, :, None] * A
            error = error + torch.exp(chunk_exponent) * start * EPS * (CHUNK * chunk_exponent.abs() + 4)
            span, start = torch.zeros_like(span), size

        y = (C[:, None, :, t] * h).sum(2) + D * u[:, :, t]
        weight = (C[:, None, :, t].abs() * size).sum(2) + (D * u[:, :, t]).abs()
        y_error = (C[:, None, :, t].abs() * error).sum(2) + EPS * (n + 4) * weight
        gate = z[:, :, t] / (1 + torch.exp(-z[:, :, t]))
        ys.append(y * gate)
        y_bounds.append(gate.abs() * (y_error + EPS * (z[:, :, t].abs() + 6) * weight))
        states.append(h)
        bounds.append(error)
    return Scan(torch.stack(ys, 1), torch.stack(y_bounds, 1), torch.stack(states, 1), torch.stack(bounds, 1))


def hadamard_matrix(width: int) -> torch.Tensor:
    """The dense orthonormal matrix of `plan_for(width)`: blocks of H_K ⊗ S_2 ⊗ … on the diagonal, float64."""
    from qmamba_cli.kernels.hadamard.matrix import core_matrix, plan_for

    plan = plan_for(width)
    block = core_matrix(plan.core)
    for _ in range(int(math.log2(plan.order // plan.core))):
        block = torch.kron(block, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return torch.block_diag(*[block] * (width // plan.order)) / math.sqrt(plan.order)
