"""A second Mamba, written from the papers and from docs/numerics.md alone, in float64 and plain NumPy.

Nothing here is imported from the package. Grids are simulated: a value is divided by its scale, rounded,
clipped and multiplied back; weights likewise. Widths are powers of two, so that SciPy has the rotation.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.linalg

ALPHA = 0.9995
CHUNK = 64


def on_grid(x: np.ndarray, scale: Any) -> np.ndarray:
    return np.clip(np.rint(x / scale), -128, 127) * scale


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rotation(width: int) -> np.ndarray:
    return scipy.linalg.hadamard(width) / math.sqrt(width)


def eight_bit(weight: np.ndarray) -> np.ndarray:
    return on_grid(weight, np.abs(weight).max(axis=1, keepdims=True) / 127)


def four_bit(weight: np.ndarray, group: int) -> np.ndarray:
    result = np.empty_like(weight)
    for row, values in enumerate(weight):
        scale = np.abs(values).max() / 7 / 15
        for start in range(0, len(values), group):
            part = values[start : start + group]
            tried = [np.clip(np.rint(part / (scale * m)), -8, 7) * (scale * m) for m in range(1, 16)]
            result[row, start : start + group] = min(tried, key=lambda guess: ((guess - part) ** 2).sum())
    return result


@dataclass
class Grids:
    """What a mode chooses; ``None`` scales are the float model."""

    scales: list[dict[str, float]] | None
    dynamic_conv: bool = False
    true_u: bool = False
    int8_state: bool = False


@dataclass
class Reference:
    tensors: dict[str, np.ndarray]
    layers: int
    rank: int
    states: int
    bits: int | None = None
    group: int = 128
    seen: list[dict[str, list[np.ndarray]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        t = {name: np.asarray(value, dtype=np.float64) for name, value in self.tensors.items()}
        small = eight_bit if self.bits else np.asarray
        large = {None: np.asarray, 8: eight_bit, 4: lambda w: four_bit(w, self.group)}[self.bits]
        table = small(t["backbone.embeddings.weight"])
        outer = rotation(table.shape[1])
        self.embedding = table @ outer
        self.head = (table * t["backbone.norm_f.weight"]) @ outer
        self.blocks = []
        for i in range(self.layers):
            m = {name.split("mixer.")[1]: value for name, value in t.items() if f".{i}.mixer." in name}
            gamma = t[f"backbone.layers.{i}.norm.weight"]
            inner = rotation(m["out_proj.weight"].shape[1])
            self.blocks.append(
                {
                    "in": large((m["in_proj.weight"] * gamma) @ outer),
                    "conv": small(m["conv1d.weight"][:, 0]),
                    "conv_bias": m["conv1d.bias"],
                    "x": small(m["x_proj.weight"]),
                    "dt": small(m["dt_proj.weight"]),
                    "dt_bias": m["dt_proj.bias"],
                    "A": -np.exp(m["A_log"]),
                    "D": m["D"],
                    "rotation": inner,
                    "out": large(outer @ m["out_proj.weight"] @ inner),
                }
            )
            self.seen.append({})

    def observe(self, layer: int, site: str, x: np.ndarray) -> None:
        self.seen[layer].setdefault(site, []).append(np.abs(x).ravel())

    def scales(self) -> list[dict[str, float]]:
        def absmax(site: str, parts: list[np.ndarray]) -> float:
            values = np.sort(np.concatenate(parts))
            # The quantile of u and of the state, the maximum of everything else.
            return float(values[math.ceil(ALPHA * len(values)) - 1 if site in {"u", "state"} else -1])

        return [{site: absmax(site, parts) / 127 for site, parts in layer.items()} for layer in self.seen]

    def logits(self, ids: np.ndarray, grids: Grids, cuts: tuple[int, ...] = ()) -> np.ndarray:
        """One sequence, (l,) to (l, vocab); the state is handed over at the cuts."""
        residual = self.embedding[ids]
        for layer, block in enumerate(self.blocks):
            residual = residual + self.block(layer, block, residual, grids, cuts)
        normed = residual / np.sqrt((residual**2).mean(1, keepdims=True) + 1e-5)
        return normed @ self.head.T

    def block(
        self, layer: int, w: dict[str, np.ndarray], residual: np.ndarray, grids: Grids, cuts: tuple[int, ...]
    ) -> np.ndarray:
        scales = grids.scales[layer] if grids.scales else None

        def put(site: str, x: np.ndarray) -> np.ndarray:
            self.observe(layer, site, x)
            return x if scales is None else on_grid(x, scales[site])

        length, d = len(residual), len(w["D"])
        n = put("norm", residual / np.sqrt((residual**2).mean(1, keepdims=True) + 1e-5))
        xz = n @ w["in"].T
        static = put("xz", xz)
        x, z = static[:, :d], static[:, d:]
        if grids.dynamic_conv:
            x = on_grid(xz[:, :d], np.maximum(np.abs(xz[:, :d]).max(1, keepdims=True), 1e-5) / 127)
        taps = w["conv"].shape[1]
        v = np.zeros((length, d))
        for t in range(length):
            for k in range(taps):
                if t - taps + 1 + k >= 0:
                    v[t] += w["conv"][:, k] * x[t - taps + 1 + k]
        v = silu(v + w["conv_bias"])
        read = put("u", v)
        dbl = put("dbl", read @ w["x"].T)
        r, s = self.rank, self.states
        low, B, C = dbl[:, :r], dbl[:, r : r + s], dbl[:, r + s :]
        delta = np.log1p(np.exp(put("dt", low @ w["dt"].T) + w["dt_bias"]))
        u = v if grids.true_u else read
        h, y = np.zeros((d, s)), np.zeros((length, d))
        for t in range(length):
            if t in cuts and grids.int8_state and scales is not None:
                h = on_grid(h, scales["state"])
            h = np.exp(delta[t][:, None] * w["A"]) * h + (delta[t] * u[t])[:, None] * B[t]
            y[t] = h @ C[t] + w["D"] * u[t]
            if (t + 1) % CHUNK == 0 or t + 1 == length:
                self.observe(layer, "state", h)
        y = y * silu(z)
        return put("y", y @ w["rotation"]) @ w["out"].T
