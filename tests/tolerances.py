"""The table of tolerances: one row an output, each with its reason. Tests of operators take theirs from here.

A `real` row's budget is ``factor * eps * magnitude``, where the magnitude is a sum of absolute terms that the
float64 oracle returns with its result: what float32 rounding can do, not what it happened to do.
"""

from dataclasses import dataclass

import numpy as np
import torch

EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """Float outputs: ``|got - oracle| <= factor * eps * magnitude``."""

    factor: float
    why: str

    def budget(self, magnitude: torch.Tensor | float, terms: int = 1) -> torch.Tensor | float:
        return self.factor * terms * EPS * magnitude


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """int8 outputs: at most ``steps`` off in at most ``share`` of the elements."""

    steps: int
    share: float
    why: str


# One rounding errs by eps / 2, so a factor of 1 counts two roundings.
RMS_NORM = Real(
    factor=1.0,
    why="terms = d_model + 6; magnitude |y|: d squares and d - 1 sums reach y through a square root, which "
    "halves them, then mean, eps, rsqrt (2 ulp), two products",
)
LINEAR_FLOAT = Real(
    factor=1.0,
    why="terms = k; magnitude sum |x w| + |bias|: k products and k sums, each eps / 2 of a partial sum",
)
LINEAR_INT8 = Real(
    factor=1.0,
    why="terms = 3; magnitude |acc s| + |bias|: the sum is exact; conversion to float32, product of the two "
    "scales, product, bias: 4 roundings, 6 allowed",
)
CONV = Real(
    factor=1.0,
    why="terms = w + 6; magnitude sum |x w| s + |bias|: w products and sums, per-token scale, scale of the "
    "channel, bias, then SiLU, whose slope is below 1.1 and whose own error is 4 ulp",
)
HADAMARD = Real(
    factor=1.0,
    why="terms = sum of the Kronecker factors' sizes; magnitude sum |x| / sqrt(n): each factor is a dot of "
    "as many terms as its size",
)
SCAN = Real(
    factor=1.0,
    why="magnitude from the oracle's running error analysis (oracles.selective_scan): every rounding of "
    "every step, damped as the state itself is",
)
GRID = Grid(
    steps=1,
    share=1e-3,
    why="a value within float error of a tie may round either way; float error is about 1e-5 of a step, so "
    "about 1 element in 1e5 is there",
)
LOGITS = Real(
    factor=1e-4 / EPS,
    why="whole float models: 1e-4 of the largest logit is what issue and docs promise; measured 1e-6",
)
PERPLEXITY_RELATIVE = 1e-5
# Whole quantized models against an independent float64 reference: rounding flips spread, so only the mean
# over many tokens is comparable.
KL_RELATIVE = 0.1
