"""SIGKILL at any moment of any stage: the old artifact or the new one, and a rerun that ends well."""

import itertools
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from victims import (
    CI_KILLS,
    NEW,
    OLD,
    STAGES,
    Child,
    Stage,
    identity,
    measured,
    require_rerun,
    require_whole,
    working_folder,
)

FILE_SIZES = (0, 1, 700, 5_000, 300_000)
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "fcntl.flock"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> Stage:
    return STAGES[request.param]


def kill_before_change(number: int) -> None:
    """Have this process killed right before the file system's change of this number.

    What audit hooks hear of is counted, and every flush. A hook stays, so this belongs into a child.
    """
    counter = itertools.count(1)

    def count() -> None:
        if next(counter) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and int(arguments[2] or 0) & _WRITING):
            count()

    flush = os.fsync

    def counted_flush(descriptor: int) -> None:
        count()
        flush(descriptor)

    os.fsync = counted_flush
    sys.addaudithook(hook)


def killed_at_change(stage: Stage, folder: Path, number: int) -> int:
    """Exit code of a child that runs the stage and is killed before its change of this number."""

    def work() -> None:
        kill_before_change(number)
        stage.make(folder, NEW)

    return Child.start(work).wait()


@pytest.mark.slow
def test_killed_before_every_change_of_the_file_system(stage: Stage, tmp_path: Path, kills: int) -> None:
    """Every create, rename, removal, lock and flush is the last thing that did not happen, once."""
    for parity in range(1 if kills <= CI_KILLS else 2):
        outcomes = set()
        for number in range(1, 200):
            # Over an old artifact, or where there is none: in turns, and the other way round in a long run.
            fresh = number % 2 != parity
            folder = working_folder(stage, tmp_path / "w", fresh=fresh)
            code = killed_at_change(stage, folder, number)
            assert code in (0, -signal.SIGKILL)
            outcomes.add(require_whole(stage, folder, fresh=fresh, context=number))
            require_rerun(stage, folder, number)
            shutil.rmtree(folder)
            if code == 0:
                break
        assert code == 0, "the stage never reached its end"
        assert number > 8, "too few changes were seen"
        # The kills fell on both sides of the moment at which the new one takes its place.
        assert {None, identity(stage, OLD), identity(stage, NEW)} == outcomes


def test_killed_within_a_write(stage: Stage, tmp_path: Path) -> None:
    """The kernel ends the process at the write that would pass a size, with the bytes before it on disk."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        stage.make(folder, NEW)

    killed = 0
    for size in FILE_SIZES:
        folder = working_folder(stage, tmp_path / str(size))
        code = Child.start(work).wait()
        assert code in (0, -signal.SIGXFSZ)
        killed += code != 0
        require_whole(stage, folder, fresh=False, context=size)
        require_rerun(stage, folder, size)
    assert killed >= 3


def test_killed_at_random_moments(stage: Stage, tmp_path: Path, kills: int) -> None:
    """As many kills as asked for, spread over the time that the stage takes."""
    generator = random.Random(20_250)
    seconds = max(measured(stage, working_folder(stage, tmp_path / f"m{n}")) for n in range(2))
    killed = survived = 0
    while killed < kills:
        fresh = bool(killed % 2)
        folder = working_folder(stage, tmp_path / "w", fresh=fresh)
        delay = seconds * (killed + generator.random()) / kills
        child = Child.start(lambda folder=folder: stage.make(folder, NEW))
        time.sleep(delay)
        code = child.kill()
        assert code in (0, -signal.SIGKILL)
        require_whole(stage, folder, fresh=fresh, context=(killed, delay))
        require_rerun(stage, folder, (killed, delay))
        shutil.rmtree(folder)
        killed += code != 0
        if code == 0:
            # It was over before its killer came: the machine is faster than when it was measured.
            survived += 1
            seconds *= 0.95
            assert survived < 100 + kills, "the children are faster than their killer"


def test_a_killed_rerun_over_a_killed_run(stage: Stage, tmp_path: Path) -> None:
    """What one kill leaves is in the way of the next run, which is killed as well."""
    folder = working_folder(stage, tmp_path / "w")
    for number in (30, 12, 22, 7, 17, 3):
        killed_at_change(stage, folder, number)
        require_whole(stage, folder, fresh=False, context=number)
    require_rerun(stage, folder, "after all of them")


def test_a_reader_beside_a_writer_sees_old_or_new(tmp_path: Path) -> None:
    """While a file is replaced again and again, another process reads it whole every time."""
    stage = STAGES["export"]
    folder = working_folder(stage, tmp_path / "w")
    child = Child.start(lambda: [stage.make(folder, version) for version in (NEW, OLD) * 3])
    found = []
    while os.waitpid(child.pid, os.WNOHANG) == (0, 0):
        found.append(stage.identity(folder))
    assert set(found) <= {identity(stage, OLD), identity(stage, NEW)}
    assert len(found) > 5
