"""What a case of `selftest` is."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from qmamba_cli.kernels.backend import Backend


class Exactness(StrEnum):
    """What an output promises, as in docs/numerics.md."""

    EXACT = "exact"
    GRID = "grid"
    REAL = "real"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel at one shape.

    Attributes:
        operator: name of the operator, as in `Backend`.
        variant: what distinguishes the case.
        exactness: class of its output.
        budget: exact: 0; grid: share of elements that may be one step off; real: relative error.
        call: runs the operator of a backend on what ``prepare`` made and returns the output that is compared.
        inputs: CPU tensors by name.
        bytes: bytes read and written at least once.
        prepare: makes of a backend and its inputs what ``call`` takes, untimed; by default the inputs.
    """

    operator: str
    variant: str
    exactness: Exactness
    budget: float
    call: Callable[[Backend, Any], torch.Tensor]
    inputs: dict[str, torch.Tensor]
    bytes: int
    prepare: Callable[[Backend, dict[str, torch.Tensor]], Any] = lambda _ops, inputs: inputs
