"""Gates against results and earlier results, and their report as JUnit XML."""

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmamba_cli.artifacts.files import atomic_file, check_output, reading, strict_json
from qmamba_cli.errors import ArtifactError, QmambaError, UsageError
from qmamba_cli.evaluation.gates import (
    Gate,
    GateOutcome,
    Values,
    check_earlier,
    check_gates,
    evaluate_gate,
    parse_gate,
)
from qmamba_cli.evaluation.tasks import TASKS
from qmamba_cli.modes import MODES, Precision

# Every metric of `compare` that gates may name, and those that need the float model.
COMPARE_METRICS = ("acc", "acc_stderr", "perplexity", "bits_per_token", "ll_per_token")
COMPARE_FLOAT_METRICS = ("kl_mean", "kl_median", "kl_p99", "kl_max", "same_top1", "delta_ll")
_HINT = "name a file that `qmamba run --output FILE` or `qmamba compare --output FILE` wrote"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOptions:
    """What is demanded of results.

    Attributes:
        expressions: the gates as written.
        baseline_results: a results file of an earlier run, or None.
        junit: JUnit file to write, or None.
        force: replace an existing JUnit file.
    """

    expressions: Sequence[str] = ()
    baseline_results: Path | None = None
    junit: Path | None = None
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenGates:
    """Gates that were read and found to be possible.

    Attributes:
        gates: the conditions.
        baseline: mode → metric → value of the earlier results, or None.
        junit: JUnit file to write, or None.
        force: replace an existing JUnit file.
    """

    gates: tuple[Gate, ...]
    baseline: Mapping[str, Values] | None
    junit: Path | None
    force: bool


def open_gates(options: GateOptions, *, task: str, modes: Sequence[str] | None = None) -> OpenGates:
    """Read the gates and the earlier results before anything is computed.

    Args:
        options: what is demanded.
        task: name of the task that runs.
        modes: names of the modes of a comparison, or None for a run in one mode.

    Raises:
        UsageError: a gate cannot be read, or names a metric or mode there will not be or that the earlier
            results lack, or those are partial or of another task.
        QmambaError: the earlier results cannot be read, or the JUnit file cannot be written.
        ArtifactError: the file holds no results.
    """
    gates = tuple(parse_gate(text) for text in options.expressions)
    if options.baseline_results is not None and not gates:
        raise UsageError("`--baseline-results` is what gates compare with, got no `--gate`")
    check_gates(
        gates,
        _metrics(task) if modes is None else (*COMPARE_METRICS, *COMPARE_FLOAT_METRICS),
        modes=modes,
        has_baseline=options.baseline_results is not None,
    )
    if options.junit is not None:
        check_output(options.junit, force=options.force)
    baseline = None
    if options.baseline_results is not None:
        baseline = _read_results(options.baseline_results, task)
        check_earlier(gates, baseline)
    return OpenGates(gates=gates, baseline=baseline, junit=options.junit, force=options.force)


def hold_gates(
    opened: OpenGates, results: Mapping[str, Any], *, seconds: float, name: str
) -> list[GateOutcome]:
    """Hold every gate against results and write the JUnit file.

    Args:
        opened: the gates.
        results: of `run` or of `compare`.
        seconds: how long the results took.
        name: of the command, for the JUnit file.

    Raises:
        UsageError: a metric is not in the results.
        QmambaError: the JUnit file cannot be written.
    """
    modes = mode_values(results)
    floats = {mode for mode in modes if mode in MODES and MODES[mode].precision is Precision.FP32}
    outcomes = []
    for gate in opened.gates:
        # A gate is about quantized modes unless the float model is all there is, or is named.
        kept = {mode: v for mode, v in modes.items() if mode == gate.mode or mode not in floats} or modes
        outcomes.append(evaluate_gate(gate, kept, _for_modes(opened.baseline, kept)))
    if opened.junit is not None:
        with atomic_file(opened.junit, force=opened.force) as temporary:
            temporary.write_bytes(junit_xml(outcomes, seconds=seconds, name=name))
    return outcomes


def require_passed(outcomes: Sequence[GateOutcome]) -> None:
    """Raise where a gate failed.

    Raises:
        QmambaError: one did; the message names each with what was measured and what was wanted.
    """
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if failed:
        raise QmambaError(
            "; ".join(outcome.message for outcome in failed),
            hint="the results are as written; change the model, or the gate if the change was meant",
        )


def mode_values(results: Mapping[str, Any]) -> dict[str, Values]:
    """Mode → metric → value of results of `run` or `compare`; None where a metric has no value.

    Raises:
        KeyError, TypeError, ValueError: these are no results.
    """
    if "modes" in results:
        return {name: _numbers(metrics) for name, metrics in results["modes"].items()}
    (metrics,) = results["results"].values()
    return {str(results["qmamba"]["mode"]["name"]): _numbers(metrics)}


def junit_xml(outcomes: Sequence[GateOutcome], *, seconds: float, name: str) -> bytes:
    """A JUnit report: one test case for the command and one a gate.

    Args:
        outcomes: what became of the gates.
        seconds: how long the command took.
        name: of the command.
    """
    failures = sum(not outcome.passed for outcome in outcomes)
    counts = {
        "tests": str(len(outcomes) + 1),
        "failures": str(failures),
        "errors": "0",
        "time": f"{seconds:.3f}",
    }
    suites = ET.Element("testsuites", counts)
    suite = ET.SubElement(suites, "testsuite", {"name": f"qmamba {name}", **counts, "skipped": "0"})
    kind = {"classname": f"qmamba.{name}"}
    ET.SubElement(suite, "testcase", {**kind, "name": name, "time": f"{seconds:.3f}"})
    for outcome in outcomes:
        case = ET.SubElement(suite, "testcase", {**kind, "name": f"gate {outcome.gate}", "time": "0.000"})
        if outcome.passed:
            ET.SubElement(case, "system-out").text = outcome.message
        else:
            failure = ET.SubElement(case, "failure", {"message": outcome.message, "type": "gate"})
            failure.text = outcome.message
    ET.indent(suites)
    document: bytes = ET.tostring(suites, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _metrics(task: str) -> tuple[str, ...] | None:
    """Names of the metrics that `run` reports for a built-in task; None for any other."""
    if task not in TASKS:
        return None
    names = tuple(TASKS[task].higher_is_better)
    return (*names, *(f"{name}_stderr" for name in names)) if TASKS[task].is_last_word else names


def _read_results(path: Path, task: str) -> dict[str, Values]:
    with reading(path):
        data = path.read_bytes()
    try:
        results = strict_json(data)
        found = results["qmamba"]["task"]["task"] if "modes" in results else next(iter(results["results"]))
        modes = mode_values(results)
    except (KeyError, TypeError, ValueError, StopIteration, AttributeError):
        raise ArtifactError(f"`{path}` holds no results of this program", hint=_HINT) from None
    if found != task:
        raise UsageError(
            f"`--baseline-results`: got results of task `{found}`, expected `{task}`", hint=_HINT
        )
    if results.get("partial"):
        raise UsageError(
            f"`--baseline-results`: got partial results in `{path}`, expected whole ones",
            hint="go on with the command that was interrupted and `--resume`",
        )
    return modes


def _for_modes(baseline: Mapping[str, Values] | None, modes: Mapping[str, Values]) -> Mapping[str, Values]:
    """The earlier results a mode; those of a run in a single mode stand for every mode."""
    if baseline is None:
        return {}
    if len(baseline) == 1:
        (only,) = baseline.values()
        return dict.fromkeys(modes, only)
    return baseline


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics as numbers: without lm-eval's filter, and with strings such as ``inf`` and ``N/A`` read."""
    numbers: dict[str, float | None] = {}
    for key, value in metrics.items():
        if isinstance(value, str):
            numbers[key.removesuffix(",none")] = float(value) if value in {"inf", "-inf", "nan"} else None
        elif isinstance(value, int | float):
            numbers[key.removesuffix(",none")] = float(value)
    return numbers
