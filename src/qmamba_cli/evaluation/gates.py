"""Gates: conditions on metrics that a run must meet, such as ``kl<0.02`` or ``acc>=baseline-0.01``."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from qmamba_cli.errors import UsageError

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
)
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
# A mode's name may hold a colon, so that the metric is what follows the last one.
_GATE = re.compile(
    r"(?:(?P<mode>[^<>]+):)?\s*(?P<metric>[A-Za-z]\w*)\s*(?P<comparison><=|>=|<|>)\s*(?P<bound>[^<>=\s][^<>=]*)"
)
_BOUND = re.compile(
    rf"(?P<baseline>baseline)(?:\s*(?P<sign>[+-])\s*(?P<offset>{_NUMBER}))?|(?P<number>[+-]?(?:{_NUMBER}))"
)
_HINT = (
    "a gate reads METRIC<NUMBER or METRIC>=baseline-NUMBER, with <, <=, > or >=; `compare` takes MODE:METRIC"
)
# The keys of `run` → those of `compare`; either name finds the other.
_ALIASES: Mapping[str, str] = MappingProxyType({"kl": "kl_mean", "top1_acc": "acc"})
_ALIASES_BACK: Mapping[str, str] = MappingProxyType({name: alias for alias, name in _ALIASES.items()})

Values = Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One condition.

    Attributes:
        text: as it was written.
        mode: the only mode it is about, or None for every quantized one.
        metric: name of the metric.
        comparison: one of <, <=, > and >=.
        offset: the bound, or what is added to the baseline's value.
        relative: whether the bound is the baseline's value plus ``offset``.
    """

    text: str
    mode: str | None
    metric: str
    comparison: str
    offset: float
    relative: bool

    def passes(self, value: float, bound: float) -> bool:
        """Whether a value meets the bound; NaN meets none."""
        return _COMPARISONS[self.comparison](value, bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOutcome:
    """What became of one gate.

    Attributes:
        gate: the condition as written.
        passed: whether every mode it is about met it.
        mode: the mode that came closest to failing it, or failed it most.
        value: that mode's value.
        bound: what the value was compared with.
        comparison: how.
        failed: names of all modes that failed.
    """

    gate: str
    passed: bool
    mode: str
    value: float
    bound: float
    comparison: str
    failed: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """The gate, what was measured and what was wanted, with no final stop."""
        verdict = "passed" if self.passed else "failed"
        others = f" (failed in {', '.join(self.failed)})" if len(self.failed) > 1 else ""
        return (
            f"gate `{self.gate}` {verdict}: got {self.value:.6g} in mode {self.mode}, "
            f"expected {self.comparison} {self.bound:.6g}{others}"
        )


def parse_gate(text: str) -> Gate:
    """Read ``[MODE:]METRIC COMPARISON BOUND``, the bound a number or ``baseline`` plus or minus one.

    >>> gate = parse_gate("2-4:acc >= baseline - 0.01")
    >>> gate.mode, gate.metric, gate.comparison, gate.offset, gate.relative
    ('2-4', 'acc', '>=', -0.01, True)

    Raises:
        UsageError: the text is no gate.
    """
    found = _GATE.fullmatch(text.strip())
    bound = _BOUND.fullmatch(found["bound"].strip()) if found else None
    if found is None or bound is None:
        raise UsageError(f"`--gate`: got `{text}`, expected a metric, a comparison and a number", hint=_HINT)
    offset = float(bound["number"] or f"{bound['sign'] or '+'}{bound['offset'] or '0'}")
    if not math.isfinite(offset):
        raise UsageError(f"`--gate`: got `{text}`, expected a finite number", hint=_HINT)
    return Gate(
        text=text.strip(),
        mode=None if found["mode"] is None else found["mode"].strip(),
        metric=found["metric"],
        comparison=found["comparison"],
        offset=offset,
        relative=bound["baseline"] is not None,
    )


def check_gates(
    gates: Iterable[Gate],
    metrics: Sequence[str] | None,
    *,
    modes: Sequence[str] | None = None,
    has_baseline: bool = False,
) -> None:
    """Refuse gates that could not be evaluated, before anything is computed.

    Args:
        gates: the gates.
        metrics: names of the metrics there will be, or None where they are not known yet.
        modes: names of the modes there will be, or None where there is only one and gates name none.
        has_baseline: whether there are earlier results to compare with.

    Raises:
        UsageError: a metric or mode is unknown, or a gate needs earlier results.
    """
    for gate in gates:
        if metrics is not None and resolved(gate.metric, metrics) is None:
            raise UsageError(
                f"`--gate`: unknown metric `{gate.metric}`, expected one of {', '.join(metrics)}", hint=_HINT
            )
        if gate.mode is not None and gate.mode not in (modes or ()):
            expected = f"one of {', '.join(modes)}" if modes else "no mode, as there is only one"
            raise UsageError(f"`--gate`: got mode `{gate.mode}`, expected {expected}", hint=_HINT)
        if gate.relative and not has_baseline:
            raise UsageError(
                f"`--gate`: got `{gate.text}` without earlier results, expected a file of them",
                hint="add `--baseline-results FILE`, which an earlier `--output FILE` wrote",
            )


def check_earlier(gates: Iterable[Gate], earlier: Mapping[str, Values]) -> None:
    """Refuse gates whose metric the earlier results lack, before anything is computed.

    Args:
        gates: the gates.
        earlier: mode → metric → value of the earlier results; those of a single mode stand for every one.

    Raises:
        UsageError: a metric is in none of the modes that the gate is about.
    """
    for gate in gates:
        modes = list(earlier) if gate.mode is None or len(earlier) == 1 else [gate.mode]
        if gate.relative and all(resolved(gate.metric, earlier.get(mode, {})) is None for mode in modes):
            _value(gate, earlier.get(modes[0], {}), f"the earlier results of mode {modes[0]}")


def resolved(metric: str, metrics: Iterable[str]) -> str | None:
    """The name under which a metric is stored, or None where there is none.

    >>> resolved("kl", ["acc", "kl_mean"]), resolved("kl", ["kl"]), resolved("speed", ["kl"])
    ('kl_mean', 'kl', None)
    """
    known = set(metrics)
    names = (metric, _ALIASES.get(metric), _ALIASES_BACK.get(metric))
    return next((name for name in names if name in known), None)


def evaluate_gate(
    gate: Gate, modes: Mapping[str, Values], baseline: Mapping[str, Values] | None = None
) -> GateOutcome:
    """Hold one gate against the metrics of every mode it is about.

    Args:
        gate: the gate.
        modes: mode → metric → value, for the modes that gates without a mode are about and any it names.
        baseline: the same from earlier results, or None; a mode that is not there is an error.

    Raises:
        UsageError: a metric, or the baseline's value of it, is not there.
    """
    worst: tuple[bool, float, str, float, float] | None = None
    failed = []
    for mode in modes if gate.mode is None else (gate.mode,):
        value = _value(gate, modes.get(mode, {}), f"mode {mode}")
        bound = gate.offset
        if gate.relative:
            bound += _value(gate, (baseline or {}).get(mode, {}), f"the earlier results of mode {mode}")
        passed = gate.passes(value, bound)
        if not passed:
            failed.append(mode)
        margin = bound - value if gate.comparison.startswith("<") else value - bound
        # NaN is the worst there is.
        candidate = (passed, -math.inf if math.isnan(margin) else margin, mode, value, bound)
        worst = candidate if worst is None or candidate[:2] < worst[:2] else worst
    if worst is None:
        raise UsageError(f"`--gate`: got `{gate.text}` and no quantized mode, expected at least one")
    return GateOutcome(
        gate=gate.text,
        passed=not failed,
        mode=worst[2],
        value=worst[3],
        bound=worst[4],
        comparison=gate.comparison,
        failed=tuple(failed),
    )


def _value(gate: Gate, values: Values, where: str) -> float:
    name = resolved(gate.metric, values)
    value = None if name is None else values[name]
    if value is None:
        known = ", ".join(key for key, number in values.items() if number is not None) or "none"
        raise UsageError(
            f"`--gate`: got no metric `{gate.metric}` in {where}, expected one of {known}",
            hint="kl and same_top1 need a float baseline: `--baseline MODEL`",
        )
    return value
