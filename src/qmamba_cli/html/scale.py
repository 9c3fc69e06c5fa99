"""Axes: where a value lies, which values are ticks, and how numbers read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Steps of a linear axis, times a power of ten.
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
# Up to this ratio of its ends a logarithmic axis has ticks at 1, 2 and 5 times powers of ten.
_FEW_DECADES = 200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps values to coordinates.

    Attributes:
        low: value at ``start``.
        high: value at ``end``; where it equals ``low`` everything lies in the middle.
        start: coordinate in user units.
        end: coordinate in user units; may lie below ``start``, as for a y axis.
        log: whether equal ratios, not equal differences, are equal distances; ``low`` is then above 0.
        ticks: values with a label, within the ends.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Coordinate of a value; beyond the ends it is the end's."""
        if self.low == self.high:
            return (self.start + self.end) / 2
        clamped = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(clamped / self.low) / math.log(self.high / self.low)
        else:
            share = (clamped - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def scale(
    values: Sequence[float], start: float, end: float, *, log: bool = False, from_zero: bool = False
) -> Scale:
    """An axis that holds every finite value, with round ticks.

    >>> scale([0.3, 9.1], 0, 100, from_zero=True).ticks
    (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)
    >>> scale([3, 4000], 0, 100, log=True).ticks
    (10.0, 100.0, 1000.0)
    >>> scale([0.004, 0.03], 0, 100, log=True).ticks
    (0.002, 0.005, 0.01, 0.02, 0.05)

    Args:
        values: what is drawn; without a finite one (above 0 where ``log``) the axis goes from 0 or 1 on.
        start: coordinate of the lower end.
        end: coordinate of the upper end.
        log: a logarithmic axis; values that are not above 0 are left out of account.
        from_zero: let a linear axis begin at 0.
    """
    finite = [float(value) for value in values if math.isfinite(value) and (value > 0 or not log)]
    if log:
        low, high, ticks = _decades(finite)
    else:
        low, high, ticks = _steps([*finite, 0.0] if from_zero or not finite else finite)
    return Scale(low=low, high=high, start=start, end=end, log=log, ticks=ticks)


def powers_of_two(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic axis from the smallest to the largest value, with powers of two as ticks, at most 8.

    >>> powers_of_two([1, 1024], 0, 100).ticks
    (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
    """
    low, high = float(min(values)), float(max(values))
    if not low < high:
        low, high = low / 2, high * 2
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first) / 7))
    ticks = tuple(float(2**exponent) for exponent in range(last, first - 1, -step))
    return Scale(low=low, high=high, start=start, end=end, log=True, ticks=ticks[::-1])


def _decades(values: Sequence[float]) -> tuple[float, float, tuple[float, ...]]:
    if not values:
        return 1.0, 10.0, (1.0, 10.0)
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    # Rounded to the digits that it is written with: 5 · 10^-3 is not 0.005 in floating point.
    # One decade more below: a logarithm just under a whole number is rounded up to it.
    marks = [float(f"{step}e{power}") for power in range(first - 1, last + 1) for step in (1, 2, 5)]
    low = max(mark for mark in marks if mark <= min(values))
    high = min((mark for mark in marks if mark >= max(values) and mark > low), default=10.0 ** (last + 1))
    if high / low <= _FEW_DECADES:
        return low, high, tuple(mark for mark in marks if low <= mark <= high)
    step = max(1, math.ceil((last - first) / 6))
    ticks = (float(f"1e{power}") for power in range(first, last + 1, step))
    return low, high, tuple(tick for tick in ticks if low <= tick <= high)


def _steps(values: Sequence[float]) -> tuple[float, float, tuple[float, ...]]:
    low, high = min(values), max(values)
    if low == high:
        low, high = (0.0, high) if high > 0 else (low, 0.0) if low < 0 else (0.0, 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in _NICE if nice * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Multiplied, not added up, and rounded, so that 3 · 0.1 reads 0.3.
    ticks = tuple(round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1))
    return ticks[0], ticks[-1], ticks


def number(value: float | None, digits: int = 3) -> str:
    """A number for people, with ``digits`` significant digits; ``n/a`` for none.

    >>> [number(value) for value in (0.0, 0.012345, 1.5e-07, 1234.5, 98765.0, None, float("inf"))]
    ['0', '0.0123', '1.5e-7', '1234', '98765', 'n/a', 'inf']
    """
    if value is None:
        return "n/a"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 10**digits:
        text = f"{value:.{digits}g}"
        return text if "e" not in text else f"{value:.0f}"
    if 10**digits <= abs(value) < 1e5:
        return f"{value:.0f}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def tick_label(value: float) -> str:
    """A tick's value, as short as it goes.

    >>> tick_label(0.25), tick_label(1000.0), tick_label(1e6)
    ('0.25', '1000', '1e6')
    """
    return number(value, 4)


def percent(share: float | None, *, sign: bool = False) -> str:
    """A share for people, with a sign where it is a change.

    >>> percent(0.4137), percent(0.00046), percent(0.0), percent(None), percent(-0.031, sign=True)
    ('41 %', '0.046 %', '0 %', 'n/a', '-3.1 %')
    """
    if share is None:
        return "n/a"
    return f"{'+' if sign and share > 0 else ''}{number(share * 100, 2)} %"


def real(value: float | str | None) -> float | None:
    """A number of a JSON file, in which infinities and NaN are strings.

    >>> real(0.5), real("inf"), real(None)
    (0.5, inf, None)
    """
    return None if value is None else float(value)
