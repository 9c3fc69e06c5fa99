"""Calibrations that end early and go on: the bytes of an uninterrupted one, and nothing else accepted."""

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from calibrations import calibrated, command_line, options, small_model, start, whole
from command_line import process, qmamba, refused, tree

from qmamba_cli.artifacts import partial
from qmamba_cli.artifacts.partial import PartialManifest, read_progress, sole_run
from qmamba_cli.artifacts.safetensors_io import open_safetensors
from qmamba_cli.errors import ArtifactError, QmambaError
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.quant.observers import Reduction
from qmamba_cli.stages.calibrate import calibrate

PARTIAL = "calibration.partial"


def stop_after(batches: int) -> Any:
    """A `stop` that says so after this many batches."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) == batches


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A work folder whose calibration was stopped after four of eleven batches."""
    report = calibrate(options(tmp_path / "w"), stop=stop_after(4))
    assert (report.stopped_at, report.digest, report.coverage) == (12, "", None)
    assert set(tree(tmp_path / "w")) == {PARTIAL}
    return tmp_path / "w"


@pytest.mark.parametrize("reduction", Reduction)
def test_a_stopped_calibration_goes_on_to_the_same_bytes(tmp_path: Path, reduction: Reduction) -> None:
    assert calibrate(options(tmp_path, reduction=reduction), stop=stop_after(1)).stopped_at == 3
    resumed = options(tmp_path, reduction=reduction, resume=True)
    assert calibrate(resumed, stop=stop_after(5)).stopped_at == 18
    assert dict(tree(calibrate(resumed).path)) == whole(reduction)
    assert not (tmp_path / PARTIAL).exists()


def test_only_the_rest_is_observed(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = Mamba.forward

    def spy(self: Mamba, ids: Any, *rest: Any, **named: Any) -> Any:
        rows.append(len(ids))
        return forward(self, ids, *rest, **named)

    monkeypatch.setattr(Mamba, "forward", spy)
    report = calibrate(options(stopped, resume=True))
    assert rows == [3, 3, 3, 3, 3, 3, 2]
    assert report.resumed_at == 12
    assert set(tree(stopped)) >= {"calibration", "workdir.json"}
    assert not (stopped / PARTIAL).exists()


def test_the_command_that_began_it(stopped: Path) -> None:
    done = process(*command_line(stopped), "--resume", "--json", cwd=stopped)
    assert done.json()["resumed_at"] == 12
    assert dict(tree(stopped / "calibration")) == whole()


def test_a_leftover_is_named_and_force_starts_anew(stopped: Path) -> None:
    before = tree(stopped)
    with pytest.raises(QmambaError, match=rf"{PARTIAL}` is the progress of a calibration") as caught:
        calibrated(stopped)
    assert caught.value.exit_code == 1
    assert "--resume" in caught.value.hint and "--force" in caught.value.hint
    assert tree(stopped) == before
    report = calibrated(stopped, force=True)
    assert report.resumed_at is None
    assert dict(tree(report.path)) == whole()


def test_resume_without_a_leftover_starts_at_the_beginning(tmp_path: Path) -> None:
    report = calibrated(tmp_path, resume=True)
    assert report.resumed_at is None
    assert dict(tree(report.path)) == whole()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"alpha": 0.99}, "`--alpha` is 0.9995, expected 0.99"),
        ({"reduction": Reduction.MEAN}, "`--reduction` is global, expected mean"),
        ({"batch_size": 4}, "`--batch-size` is 3, expected 4"),
        ({"seed": 1}, "`--seed` is 0, expected 1"),
        ({"shuffle": False}, "`--shuffle` is True, expected False"),
        ({"samples": 31}, "`--samples` is 32, expected 31"),
        ({"seqlen": 17}, "`--seqlen` is 16, expected 17"),
        ({"model": "demo"}, "the checkpoint's digest is"),
    ],
)
def test_another_calibration_is_not_continued(stopped: Path, changes: dict[str, Any], what: str) -> None:
    before = tree(stopped)
    with pytest.raises(ArtifactError) as caught:
        calibrated(stopped, resume=True, **changes)
    assert what in caught.value.message
    assert caught.value.exit_code == 3
    assert tree(stopped) == before


def test_another_text_is_not_continued(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was late, and the lamp burned low. " * 200)
    asked = {"dataset": str(text), "samples": 8}
    calibrate(options(tmp_path / "w", **asked), stop=stop_after(1))
    text.write_text("It was late, and the lamp burned high. " * 200)
    with pytest.raises(ArtifactError, match="the text's digest is"):
        calibrated(tmp_path / "w", resume=True, **asked)


def test_another_library_is_not_continued(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qmamba_cli.stages.calibrate.library_versions",
        lambda: {"python": "3.11.0", "torch": "0.1"},
    )
    with pytest.raises(ArtifactError, match=r"the version of \w+ is"):
        calibrated(stopped, resume=True)


def test_a_moved_checkpoint_is_the_same(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(small_model(), tmp_path / "moved")
    report = calibrated(stopped, resume=True, model=str(tmp_path / "moved"))
    assert report.resumed_at == 12


def test_any_damage_of_the_progress_is_found(stopped: Path) -> None:
    path = stopped / PARTIAL
    data = bytearray(path.read_bytes())
    plan = PartialManifest.model_validate_json(open_safetensors(path).metadata["qmamba"])
    assert read_progress(path, plan, first=0, end=32).next == 12
    generator = random.Random(0)
    for place in [3, 50, len(data) - 1, *(generator.randrange(len(data)) for _ in range(60))]:
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(ArtifactError):
            read_progress(path, plan, first=0, end=32)
        data[place] ^= 1
    for length in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            read_progress(path, plan, first=0, end=32)
    with pytest.raises(ArtifactError) as caught:
        calibrated(stopped, resume=True)
    assert caught.value.hint


def test_a_failure_of_the_first_batch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise QmambaError("values are not finite")

    monkeypatch.setattr(Mamba, "forward", fail)
    with pytest.raises(QmambaError, match="not finite"):
        calibrated(tmp_path)
    assert tree(tmp_path) == {}


def test_the_progress_is_kept_until_the_artifact_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise QmambaError("cannot write")

    with monkeypatch.context() as patch:
        patch.setattr("qmamba_cli.stages.calibrate.write_calibration", full)
        with pytest.raises(QmambaError, match="cannot write"):
            calibrated(tmp_path)
    assert (tmp_path / PARTIAL).exists()
    monkeypatch.setattr(Mamba, "forward", lambda *_, **__: pytest.fail("everything was observed"))
    assert dict(tree(calibrated(tmp_path, resume=True).path)) == whole()


def test_two_calibrations_at_once(tmp_path: Path) -> None:
    with sole_run(tmp_path / PARTIAL), pytest.raises(QmambaError, match="another process is calibrating"):
        calibrated(tmp_path)
    assert tree(tmp_path) == {}
    assert dict(tree(calibrated(tmp_path).path)) == whole()


def test_a_lock_that_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(partial.fcntl, "flock", refuse)
    with pytest.raises(QmambaError, match="No locks available"):
        calibrated(tmp_path)


# Imports take a while, and how long depends on the machine: the signal comes after the first save.
SIGNALLED = """
import os, signal, sys, threading
from qmamba_cli import cli
from qmamba_cli.stages import observe

number, delay = getattr(signal, sys.argv[1]), float(sys.argv[2])
write = observe.write_progress

def write_first(*arguments):
    write(*arguments)
    observe.write_progress = write
    if delay:
        threading.Timer(delay, os.kill, (os.getpid(), number)).start()
    else:
        os.kill(os.getpid(), number)

observe.write_progress = write_first
sys.argv = ["qmamba", *sys.argv[3:]]
cli.main()
"""


def test_killed_at_random_moments_it_still_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """Whatever moment a process is killed at, ``--resume`` goes on from a whole progress file."""
    generator = random.Random(7)
    whole()
    command = (*command_line(tmp_path), "--save-every=0", "--resume")
    kills = 0
    for _ in range(3):
        delay = generator.uniform(0.0, 0.05)
        child = start("-c", SIGNALLED, "SIGKILL", delay, *command, cwd=tmp_path)
        _, errors = child.communicate(timeout=60)
        kills += child.returncode == -signal.SIGKILL
        assert child.returncode in (0, -signal.SIGKILL), errors
        if (tmp_path / "calibration").exists():
            break
    assert kills
    done = process(*command_line(tmp_path), "--resume", "--force", cwd=tmp_path)
    assert done.code == 0, done.err
    assert dict(tree(tmp_path / "calibration")) == whole()
    assert set(entry.name for entry in tmp_path.iterdir()) == {"calibration", "workdir.json"}


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    child = start("-c", SIGNALLED, "SIGINT", 0, *command_line(tmp_path), cwd=tmp_path)
    out, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert out == ""
    assert "--resume" in errors and "interrupted" in errors and "Traceback" not in errors
    assert set(entry.name for entry in tmp_path.iterdir()) == {PARTIAL}


def test_the_command_line_refuses_as_everything_else(stopped: Path) -> None:
    command = command_line(stopped)
    refused(qmamba(*command, cwd=stopped), 1, PARTIAL, "--resume", "--force")
    refused(qmamba(*command, "--resume", "--alpha", 0.9, cwd=stopped), 3, "`--alpha` is 0.9995")
    refused(qmamba(*command, "--save-every", -1, cwd=stopped), 2, "`--save-every`")
