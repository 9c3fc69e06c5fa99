"""Hadamard matrices of order K·2^k and the plan for any width.

``H_n = H_K ⊗ S_2 ⊗ … ⊗ S_2`` with K varying slowest, so that the Sylvester part is contiguous in memory.
H_K comes from Paley's constructions over a prime field.

Source: R. E. A. C. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933), constructions I and II.
"""

from dataclasses import dataclass
from functools import cache

import torch

# Larger cores would cost more than the transform saves; widths of published models need at most 40.
MAX_CORE = 256


@dataclass(frozen=True, slots=True)
class HadamardPlan:
    """How a width is transformed.

    Attributes:
        width: length n of the transformed axis.
        order: order of one Hadamard block; ``width // order`` equal blocks lie on the diagonal.
        core: K, order of the slowest Kronecker factor (1 where the order is a power of two).
    """

    width: int
    order: int
    core: int

    @property
    def is_full(self) -> bool:
        """Whether one Hadamard matrix spans the whole width."""
        return self.order == self.width

    def describe(self) -> str:
        """One line for tables and logs.

        >>> plan_for(1536).describe(), plan_for(90).describe()
        ('H12 x 2^7', '45 blocks of 2^1')
        """
        exponent = (self.order // self.core).bit_length() - 1
        shape = f"2^{exponent}" if self.core == 1 else f"H{self.core} x 2^{exponent}"
        return shape if self.is_full else f"{self.width // self.order} blocks of {shape}"


@cache
def plan_for(width: int) -> HadamardPlan:
    """The transform of an axis of ``width`` elements.

    The smallest constructible core K with ``width = K * 2^k`` is taken. A width with none is cut into blocks
    of the largest power of two that divides it, so every width has a transform; at such an odd width it is
    the identity.

    >>> plan_for(768)
    HadamardPlan(width=768, order=768, core=12)
    >>> plan_for(100)
    HadamardPlan(width=100, order=4, core=1)

    Raises:
        ValueError: width < 1.
    """
    if width < 1:
        raise ValueError(f"a width must be at least 1, got {width}")
    two_part = width & -width
    odd = width // two_part
    if odd == 1:
        return HadamardPlan(width, width, 1)
    core = odd
    while core <= min(width, MAX_CORE):
        if _constructible(core):
            return HadamardPlan(width, width, core)
        core *= 2
    return HadamardPlan(width, two_part, 1)


@cache
def core_matrix(order: int) -> torch.Tensor:
    """A Hadamard matrix H with entries ±1 and ``H @ H.T = order * I``.

    Args:
        order: 1, 2, q + 1 for a prime q = 3 mod 4, or 2(q + 1) for a prime q = 1 mod 4.

    Returns:
        (order, order) float64.

    Raises:
        ValueError: no construction is known here for the order.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if _paley_one(order):
        skew = _bordered(order - 1, sign=-1.0)
        return skew + torch.eye(order, dtype=torch.float64)
    if _paley_two(order):
        symmetric = _bordered(order // 2 - 1, sign=1.0)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        eye = torch.eye(order // 2, dtype=torch.float64)
        return torch.kron(symmetric, plus) + torch.kron(eye, diagonal)
    raise ValueError(f"no Hadamard matrix of order {order} is constructed here")


@cache
def sylvester_matrix(exponent: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix of order 2^exponent, (2^exponent, 2^exponent) float64, entries ±1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(exponent):
        matrix = torch.kron(core_matrix(2), matrix)
    return matrix


def _constructible(order: int) -> bool:
    return order == 1 or _paley_one(order) or _paley_two(order)


def _paley_one(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _paley_two(order: int) -> bool:
    return order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1)


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, int(q**0.5) + 1))


def _bordered(q: int, sign: float) -> torch.Tensor:
    """Jacobsthal matrix of the field of q elements, bordered by ones; sign makes it skew or symmetric."""
    squares = {(x * x) % q for x in range(1, q)}
    character = torch.tensor(
        [0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)], dtype=torch.float64
    )
    index = torch.arange(q)
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:] = 1.0
    bordered[1:, 0] = sign
    bordered[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return bordered
