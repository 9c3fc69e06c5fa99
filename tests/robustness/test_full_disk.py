"""Full and read-only disks, and several processes that write the same thing at once."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import tree
from victims import (
    NEW,
    OLD,
    STAGES,
    Child,
    Stage,
    entries,
    identity,
    make_read_only,
    on_small_disk,
    require_rerun,
    require_whole,
    working_folder,
)

from qmamba_cli.artifacts.files import atomic_file
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import ArtifactError, QmambaError

DISK = 16 << 20
# Bytes that are left on the disk, from nothing to nearly enough.
FREE = (0, 4096, 20_000, 100_000, 400_000, 850_000)
BUSY = 71


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> Stage:
    return STAGES[request.param]


def leave_free(disk: Path, free: int) -> Path:
    """Fill a disk up to ``free`` bytes, with a file that the caller removes."""
    filler = disk / "filler"
    status = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(max(status.f_bavail * status.f_frsize - free, 0)))
    return filler


def test_a_disk_that_is_full(stage: Stage, tmp_path: Path) -> None:
    """However much is left, what was there stays, nothing half is added, and with room it works."""
    # Made here, since the disk is seen by the child alone.
    identity(stage, NEW)

    def work(disk: Path) -> None:
        refused = 0
        for free in FREE:
            folder = working_folder(stage, disk / "w")
            before = tree(folder)
            filler = leave_free(disk, free)
            try:
                stage.make(folder, NEW)
            except QmambaError as error:
                refused += 1
                assert error.exit_code == 1
                assert "No space left on device" in error.message, (free, error)
                assert "free some space" in error.hint
                # A calibration keeps its progress, which is what the next one continues from.
                left = {name for name in tree(folder) if not name.startswith("calibration.partial")}
                assert left == before.keys(), free
            filler.unlink()
            require_whole(stage, folder, fresh=False, context=free)
            require_rerun(stage, folder, free)
            shutil.rmtree(folder)
        assert refused

    with on_small_disk(tmp_path, DISK) as call:
        call(work)


def test_a_read_only_disk(stage: Stage, tmp_path: Path) -> None:
    """Nothing is written, which is said; everything can still be read and verified."""
    identity(stage, NEW)

    def work(disk: Path) -> None:
        folder = working_folder(stage, disk / "w")
        make_read_only(disk)
        with pytest.raises(QmambaError, match="Read-only file system") as caught:
            stage.make(folder, NEW)
        assert caught.value.exit_code == 1
        assert "can be written" in caught.value.hint
        assert stage.identity(folder) == identity(stage, OLD)
        if stage.resolve is not None:
            assert stage.resolve(folder) == identity(stage, OLD)

    with on_small_disk(tmp_path, DISK) as call:
        call(work)


def holding(folder: Path, make: Callable[[], object]) -> Callable[[], None]:
    """A function for a child: ``make``, which waits before its first flush until ``folder/go`` is there."""
    flush = os.fsync

    def work() -> None:
        def wait(descriptor: int) -> None:
            os.fsync = flush
            (folder / "ready").touch()
            deadline = time.monotonic() + 60
            while not (folder / "go").exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            flush(descriptor)

        os.fsync = wait
        make()

    return work


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, "the child never got there"
        time.sleep(0.005)


def test_the_second_of_two_writers_is_told(stage: Stage, tmp_path: Path) -> None:
    """While one process writes, the other ends with exit code 1 and says why; the first ends well."""
    folder, signals = working_folder(stage, tmp_path / "w"), tmp_path / "signals"
    signals.mkdir()
    child = Child.start(holding(signals, lambda: stage.make(folder, NEW)))
    await_file(signals / "ready")
    with pytest.raises(QmambaError, match="another process is") as caught:
        stage.make(folder, OLD)
    assert caught.value.exit_code == 1
    assert "wait for it to end" in caught.value.hint
    (signals / "go").touch()
    assert child.wait() == 0
    assert stage.identity(folder) == identity(stage, NEW)
    assert stage.resolve is None or stage.resolve(folder) == identity(stage, NEW)
    assert frozenset(tree(folder)) == entries(stage)


def test_many_writers_at_once(stage: Stage, tmp_path: Path) -> None:
    """Each of six processes wins or says that another one writes; what is left is whole and on record."""
    folder = working_folder(stage, tmp_path / "w")

    def work(version: str) -> None:
        try:
            stage.make(folder, version)
        except ArtifactError:
            raise
        except QmambaError as error:
            if "another process" not in error.message:
                raise
            raise SystemExit(BUSY) from None

    children = [Child.start(lambda version=version: work(version)) for version in (OLD, NEW) * 3]
    codes = [child.wait() for child in children]
    assert set(codes) <= {0, BUSY}, codes
    assert 0 in codes
    found = stage.identity(folder)
    assert found in {identity(stage, OLD), identity(stage, NEW)}
    if stage.resolve is not None:
        assert stage.resolve(folder) == found
    require_rerun(stage, folder, codes)


def test_an_artifact_that_was_replaced_before_it_was_recorded_is_not_recorded(tmp_path: Path) -> None:
    """Else the work folder would vouch for an artifact that is no longer there, and both would have won."""
    stage = STAGES["export"]
    folder = working_folder(stage, tmp_path / "w")
    with pytest.raises(QmambaError, match="was replaced") as caught:
        Workdir(folder).record_export(folder / stage.target, identity(stage, NEW))
    assert caught.value.exit_code == 1
    assert Workdir(folder).resolve_export().digest == identity(stage, OLD)


def test_exports_that_end_together_wait_for_each_others_record(tmp_path: Path) -> None:
    """A record takes milliseconds: two exports to different files of one work folder both succeed."""
    stage = STAGES["export"]
    folder = working_folder(stage, tmp_path / "w")
    shutil.copy(folder / stage.target, folder / "other.safetensors")
    signals = tmp_path / "signals"
    signals.mkdir()

    def hold() -> None:
        with atomic_file(folder / "workdir.json", force=True) as temporary:
            shutil.copy(folder / "workdir.json", temporary)
            (signals / "ready").touch()
            time.sleep(0.3)

    child = Child.start(hold)
    await_file(signals / "ready")
    Workdir(folder).record_export(folder / "other.safetensors", identity(stage, OLD))
    assert child.wait() == 0
    assert Workdir(folder).resolve_export().path == folder / "other.safetensors"
