"""What separates two models, as a sentence to quote."""

import math
from dataclasses import dataclass, replace

from qmamba_cli.evaluation.paired import CONFIDENCE, McNemar

_ALPHA = 1 - CONFIDENCE
# Smaller p-values are not told apart in words.
_SMALLEST_P = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What was counted.

    Attributes:
        documents: number of documents (windows).
        tokens: scored tokens in all of them.
        document: the word for one: document or window.
        answer: the word for what is right or wrong: document or token.
        reference: name of the model that KL is measured against, or None.
        above: names of the models with a larger log-likelihood than the reference, which lose nothing.
    """

    documents: int
    tokens: int
    document: str
    answer: str
    reference: str | None
    above: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How a differs from b; every difference is a - b, every p-value two-sided.

    Attributes:
        accuracy: the discordant answers.
        accuracy_p_corrected: McNemar's p-value, corrected for many comparisons.
        ll: log-likelihood, nats a token.
        ll_interval: its interval, NaN where there is none.
        ll_p: its p-value.
        ll_p_corrected: the same, corrected.
        kl: mean KL divergence to the reference, nats a token, or None.
        kl_interval: its interval, or None.
        kl_p: its p-value, or None.
        kl_p_corrected: the same, corrected, or None.
        tests: number of pairs the correction counts.
    """

    accuracy: McNemar
    accuracy_p_corrected: float
    ll: float
    ll_interval: tuple[float, float]
    ll_p: float
    ll_p_corrected: float
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    kl_p: float | None = None
    kl_p_corrected: float | None = None
    tests: int = 1

    def swapped(self) -> "Difference":
        """How b differs from a."""
        return replace(
            self,
            accuracy=replace(self.accuracy, only_a=self.accuracy.only_b, only_b=self.accuracy.only_a),
            ll=-self.ll,
            ll_interval=(-self.ll_interval[1], -self.ll_interval[0]),
            kl=None if self.kl is None else -self.kl,
            kl_interval=None if self.kl_interval is None else (-self.kl_interval[1], -self.kl_interval[0]),
        )


def verdict(a: str, b: str, difference: Difference | None, units: Units) -> str:
    """Whether a and b differ, in one sentence.

    Args:
        a: name of the first.
        b: name of the second.
        difference: a - b, or None where both have the same bits.
        units: what was counted.
    """
    n = f"n = {counted(units.tokens, 'token')} in {counted(units.documents, units.document)}"
    if difference is None:
        return f"{a} and {b} are identical: the same bits in every score ({n})"
    if not math.isfinite(difference.ll):
        return f"{a} and {b} cannot be compared: a log-likelihood is not finite ({n})"
    # From here on a is the better one, or the one to be named first.
    if difference.ll < 0:
        a, b, difference = b, a, difference.swapped()
    parts = [_likelihood(a, b, difference, units, n)]
    if difference.kl is not None and units.reference not in (a, b):
        parts.append(_divergence(a, b, difference, units))
    if a == units.reference and difference.ll_p_corrected <= _ALPHA:
        a, b, difference = b, a, difference.swapped()
    parts.append(_accuracy(a, b, difference, units))
    return "; ".join(parts)


def counted(number: int, word: str) -> str:
    """A number of things, with spaces between the thousands.

    >>> counted(16352, "token"), counted(1, "window")
    ('16 352 tokens', '1 window')
    """
    return f"{number:,} {word}{'' if number == 1 else 's'}".replace(",", " ")


def _likelihood(a: str, b: str, difference: Difference, units: Units, n: str) -> str:
    """The first part, for a the better one."""
    size, interval = _sizes(difference.ll, difference.ll_interval)
    size = f"{size} nats a token"
    within = f"({interval}, {n})"
    if not difference.ll_p_corrected <= _ALPHA:
        ahead = f"{a} is {size} ahead {within}"
        if difference.ll_p <= _ALPHA:
            return (
                f"the log-likelihood does not separate {a} from {b} once corrected for {difference.tests} "
                f"pairs: {ahead}, p {_p(difference.ll_p)}, corrected {_p(difference.ll_p_corrected)}"
            )
        if difference.ll_interval[0] > 0:
            few = counted(units.documents, units.document)
            return f"{few} cannot separate {a} from {b} by the log-likelihood: {ahead}"
        return f"the log-likelihood does not separate {a} from {b}: {ahead}"
    if a == units.reference:
        return f"{b} loses {size} against {a} {within}"
    if b == units.reference:
        return f"{a} gains {size} on {b} {within}"
    if units.reference is None:
        return f"{a} gains {size} on {b} {within}"
    if a in units.above:
        return f"{a} is {size} ahead of {b} {within}"
    return f"{a} loses {size} less than {b} {within}"


def _divergence(a: str, b: str, difference: Difference, units: Units) -> str:
    assert difference.kl is not None and difference.kl_interval is not None
    nearer, kl, ends = a, -difference.kl, (-difference.kl_interval[1], -difference.kl_interval[0])
    if kl < 0:
        nearer, kl, ends = b, difference.kl, difference.kl_interval
    size, interval = _sizes(kl, ends)
    lower = f"{size} lower in {nearer} ({interval})"
    corrected = difference.kl_p_corrected
    if corrected is not None and corrected <= _ALPHA:
        return f"KL to {units.reference} is {lower}"
    once = f" once corrected for {difference.tests} pairs" if (difference.kl_p or 0) <= _ALPHA else ""
    return f"KL to {units.reference} does not separate them{once}: {lower}"


def _accuracy(a: str, b: str, difference: Difference, units: Units) -> str:
    test = difference.accuracy
    if test.only_a == test.only_b == 0:
        return f"accuracy does not separate them: every {units.answer} is right in both or in neither"
    counts = f"{test.only_a} against {counted(test.only_b, f'discordant {units.answer}')}, p {_p(test.p)}"
    if difference.accuracy_p_corrected <= _ALPHA:
        return f"accuracy is higher in {a if test.only_a > test.only_b else b}: {counts}"
    if test.p <= _ALPHA:
        return (
            f"accuracy does not separate them once corrected for {difference.tests} pairs: {counts}, "
            f"corrected {_p(difference.accuracy_p_corrected)}"
        )
    return f"accuracy does not separate them: {counts}"


def _sizes(estimate: float, ends: tuple[float, float]) -> tuple[str, str]:
    """A difference and its interval in words, with as many digits as the width of the interval bears."""
    low, high = ends
    width = high - low
    if math.isnan(width):
        return f"{estimate:.2g}", "no interval"
    digits = min(8, max(2, 1 - math.floor(math.log10(width)))) if width > 0 else 6
    # Adding 0 turns a negative zero into a plain one.
    size, start, end = (f"{round(value, digits) + 0.0:.{digits}f}" for value in (estimate, low, high))
    return size, f"{100 * CONFIDENCE:.0f} % interval {start} to {end}"


def _p(value: float) -> str:
    return "< 0.001" if value < _SMALLEST_P else f"= {value:.2g}"
