"""Ctrl-C: what was measured is shown and marked, kept, and gone on with to the result of an unbroken run."""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_line import Outcome, artifacts, done, qmamba, refused, tree

from qmamba_cli import cli
from qmamba_cli.evaluation import divergence
from qmamba_cli.resources import calib_data_path
from qmamba_cli.stages import drift, score_tables

TEXT = ("--task-data", str(calib_data_path("lastword.jsonl")))
PATIENCE = 60.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command, and where it is interrupted.

    Attributes:
        arguments: the command line.
        module: of the function in whose call the signal comes.
        function: its name.
        count: which call.
        calls: how many an unbroken run makes.
        share: documents (of `drift` curves) of the partial result.
        others: options of further output files.
    """

    arguments: tuple[object, ...]
    module: ModuleType = score_tables
    function: str = "score_batch"
    count: int
    calls: int
    share: int
    others: tuple[str, ...] = ()


def cases() -> dict[str, Case]:
    made = artifacts()
    words = ("--checkpoint", made.w4, "--limit", 4, "--batch-size", 1)
    text = (*TEXT, "--seqlen", 16, "--batch-size", 1)
    running = ("run", *words, *text, "--task", "perplexity", "--baseline", "demo")
    sensitivity = ("sensitivity", *text, "--calibration", made.calibration, "--limit", 2)
    drifting = ("drift", "--checkpoint", made.w8, "--modes", "0,2-4", "--length", 6, "--streams", 2)
    return {
        "compare": Case(
            arguments=("compare", *words, "--modes", "0,2-4"), count=3, calls=4, share=2, others=("--html",)
        ),
        "run": Case(arguments=("run", *words, "--task", "lastword"), count=3, calls=4, share=2),
        "run-text": Case(arguments=running, count=2, calls=4, share=1),
        # Nineteen models are three steps of each of two batches.
        "sensitivity": Case(
            arguments=(*sensitivity, "--no-leave-one-out"),
            module=divergence,
            count=5,
            calls=6,
            share=1,
            others=("--csv", "--html"),
        ),
        # Four points are a curve, and four curves the measurement.
        "drift": Case(
            arguments=drifting,
            module=drift,
            function="point",
            count=7,
            calls=16,
            share=2,
            others=("--csv", "--html"),
        ),
    }


NAMES = ("compare", "run", "run-text", "sensitivity", "drift")


def share_of(command: str, record: dict[str, Any]) -> int:
    match command:
        case "compare":
            return int(record["qmamba"]["documents"]["effective"])
        case "run":
            return int(next(iter(record["n-samples"].values()))["effective"])
        case "sensitivity":
            return int(record["n"]["documents"])
    return len(record["curves"])


def interrupted(case: Case, folder: Path, *arguments: object) -> Outcome:
    """The command in a process of its own, which gets SIGINT in the call that the case names."""
    marker, out, err = (folder.parent / f"{folder.name}.{name}" for name in ("waits", "out", "err"))
    child = os.fork()
    if child == 0:
        # Whatever happens, the child never comes back into the test.
        code = 99
        try:
            sys.stdout, sys.stderr = (path.open("w", encoding="utf-8") for path in (out, err))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            wait_in(case, marker)
            code = qmamba_here(*case.arguments, *arguments, folder=folder)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    until = time.monotonic() + PATIENCE
    while not marker.exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    _child, status = os.waitpid(child, 0)
    outcome = Outcome(os.waitstatus_to_exitcode(status), out.read_text(), err.read_text())
    assert marker.exists(), outcome
    assert "Traceback" not in outcome.err
    return outcome


def wait_in(case: Case, marker: Path) -> None:
    """Have the case's call tell that it has come, and wait there for the signal."""
    real, calls = getattr(case.module, case.function), []

    def waiting(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == case.count:
            marker.touch()
            time.sleep(PATIENCE)
        return real(*given, **options)

    setattr(case.module, case.function, waiting)


def qmamba_here(*arguments: object, folder: Path) -> int:
    """``qmamba ARGUMENTS`` with this process's own streams."""
    os.chdir(folder)
    sys.argv = ["qmamba", *map(str, arguments)]
    return cli._exit_code()


def files(case: Case) -> tuple[object, ...]:
    named = [(option, f"r.{option.removeprefix('--')}") for option in case.others]
    return ("--output", "r.json", *(part for pair in named for part in pair))


def without_seconds(record: dict[str, Any]) -> dict[str, Any]:
    assert record["qmamba"].pop("seconds") > 0
    return record


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_leaves_a_partial_result_that_goes_on(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    folder = tmp_path / "broken"
    folder.mkdir()
    command = str(case.arguments[0])
    stopped = interrupted(case, folder, *files(case))
    assert stopped.code == 130, stopped.err
    assert "partial" in stopped.out and "--resume" in stopped.err
    record = json.loads((folder / "r.json").read_text())
    assert record["partial"] is True and share_of(command, record) == case.share
    pages = {f"r.{option.removeprefix('--')}" for option in case.others} - {"r.csv"}
    assert set(tree(folder)) == {"r.json", "r.partial.safetensors", *pages}, "a CSV cannot be marked"
    for page in pages:
        assert ", partial" in (folder / page).read_text(encoding="utf-8")

    again = (*case.arguments, *files(case))
    refused(qmamba(*again, cwd=folder), 1, "`r.partial.safetensors`", "--resume", "--force")
    other = ("--length", 7) if command == "drift" else ("--batch-size", 2)
    refused(qmamba(*again, "--resume", *other, cwd=folder), 3, f"another `qmamba {command}`")
    done(*again, "--resume", cwd=folder)
    assert set(tree(folder)) == {str(part) for part in files(case) if str(part).startswith("r.")}

    whole = tmp_path / "whole"
    whole.mkdir()
    done(*again, cwd=whole)
    resumed, unbroken = (json.loads((path / "r.json").read_text()) for path in (folder, whole))
    assert "partial" not in resumed
    assert without_seconds(resumed) == without_seconds(unbroken)
    # A whole result is not partial: it stays unless told otherwise.
    refused(qmamba(*again, "--resume", cwd=folder), 1, "exists", "--force")


@pytest.mark.parametrize("name", ["run", "sensitivity"])
def test_what_is_interrupted_goes_on_without_doing_anything_twice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases()[name]
    assert interrupted(case, tmp_path, "--output", "r.json").code == 130
    real, calls = getattr(case.module, case.function), []

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*given, **options)

    monkeypatch.setattr(case.module, case.function, counted)
    done(*case.arguments, "--output", "r.json", "--resume", cwd=tmp_path)
    assert len(calls) == case.calls - (case.count - 1)


def test_without_an_output_it_is_shown_and_not_kept_and_no_gate_is_held_against_it(tmp_path: Path) -> None:
    outcome = interrupted(cases()["run"], tmp_path, "--json", "--gate", "acc>2", "--junit", "j.xml")
    assert outcome.code == 130 and tree(tmp_path) == {}
    assert outcome.json()["partial"] is True
    assert "with `--output FILE`" in outcome.err and "gate" not in outcome.err


def test_before_the_first_measurement_there_is_nothing(tmp_path: Path) -> None:
    case = cases()["run"]
    outcome = interrupted(replace(case, count=1), tmp_path, "--output", "r.json")
    assert (outcome.code, outcome.out) == (130, "") and tree(tmp_path) == {}
    assert outcome.err.endswith("interrupted\n")


@pytest.mark.parametrize("name", ["run", "sensitivity", "drift"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_scores_are_not_gone_on_with(name: str, damage: str, tmp_path: Path) -> None:
    case = cases()[name]
    scores = tmp_path / "r.partial.safetensors"
    shutil.copy(artifacts().w4, scores)
    if damage == "cut":
        scores.write_bytes(scores.read_bytes()[:-9])
    command = (*case.arguments, "--output", "r.json", "--resume")
    refused(qmamba(*command, cwd=tmp_path), 3, "r.partial.safetensors", "hint")


@pytest.mark.parametrize("name", NAMES)
def test_going_on_needs_a_place(name: str, tmp_path: Path) -> None:
    refused(qmamba(*cases()[name].arguments, "--resume", cwd=tmp_path), 2, "`--resume` needs `--output FILE`")
