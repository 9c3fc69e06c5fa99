"""The stages on a small model, as functions that can be run in a child process and killed there."""

import ctypes
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from calibrations import calibrated
from command_line import tree

from qmamba_cli.artifacts.calibration import read_calibration
from qmamba_cli.artifacts.quantized import read_quantized
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import ArtifactError, QmambaError
from qmamba_cli.evaluation.results import to_json
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.modes import mode_by_name
from qmamba_cli.stages.export import ExportOptions, export
from qmamba_cli.stages.folder import FolderOptions
from qmamba_cli.stages.partial import Keeper
from qmamba_cli.stages.run import ModelOptions, TaskOptions, load_model, run_task, samples_path

# What CI runs; `--kills` and `--fuzz-examples` ask for more. So many examples of each target take about a
# minute of one core in all.
CI_KILLS = 3
CI_EXAMPLES = 2000
OLD, NEW = "old", "new"
SIZES = {"samples": 2, "seqlen": 16, "batch_size": 2}
CALIBRATION, FILE, FOLDER, RESULTS = "calibration", "ckpt.safetensors", "ckpt", "results.json"
_KEPT = tempfile.TemporaryDirectory(prefix="qmamba-tests-")
FAILED = 70


@dataclass(frozen=True)
class Stage:
    """One stage, in the two versions that a test tells apart.

    Attributes:
        name: of the stage.
        target: what it writes, in the working folder.
        make: run it in a folder, in the old or the new version, over whatever is there.
        identity: read what is there whole and say what it is; raises where it is damaged or absent.
        resolve: the identity that the work folder vouches for, or None where it keeps no record.
    """

    name: str
    target: str
    make: Callable[[Path, str], object]
    identity: Callable[[Path], str]
    resolve: Callable[[Path], str] | None


def _calibrate(folder: Path, version: str) -> object:
    # The progress is saved after every batch, so that saving it is killed as well.
    alpha = 0.99 if version == OLD else 0.9995
    return calibrated(folder, force=True, alpha=alpha, save_every=0, **SIZES)


def _export(where: Path, version: str, name: str, folder: FolderOptions | None = None) -> object:
    recipe = Recipe(w_bits=8 if version == OLD else 4)
    return export(ExportOptions(workdir=where, out=where / name, folder=folder, recipe=recipe, force=True))


def _run(folder: Path, version: str) -> None:
    mode = mode_by_name("0" if version == OLD else "2-4")
    loaded = load_model(ModelOptions(mode=mode, checkpoint=folder / FILE))
    results, lines = run_task(loaded, TaskOptions(task="lastword", limit=1))
    output = folder / RESULTS
    keeper = Keeper(command="run", output=output, force=True)
    keeper.write(to_json(results), {samples_path(output): "".join(lines)}, partial=False)


def _mode(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["qmamba"]["mode"]["name"])
    except FileNotFoundError as error:
        raise QmambaError("does not exist") from error


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "calibrate",
            CALIBRATION,
            _calibrate,
            lambda folder: read_calibration(folder / CALIBRATION).digest,
            lambda folder: Workdir(folder).resolve_calibration().digest,
        ),
        Stage(
            "export",
            FILE,
            lambda folder, version: _export(folder, version, FILE),
            lambda folder: read_quantized(folder / FILE).digest,
            lambda folder: Workdir(folder).resolve_export().digest,
        ),
        Stage(
            "export-folder",
            FOLDER,
            lambda folder, version: _export(folder, version, FOLDER, FolderOptions()),
            lambda folder: read_quantized(folder / FOLDER).digest,
            lambda folder: Workdir(folder).resolve_export().digest,
        ),
        Stage("run", RESULTS, _run, lambda folder: _mode(folder / RESULTS), None),
    )
}


@cache
def _template(name: str, version: str) -> Path:
    """A working folder in which the stage has run in one version; never to be written to."""
    folder = Path(_KEPT.name) / f"{name}-{version}"
    if version == NEW:
        shutil.copytree(_template(name, OLD), folder)
    elif name == "calibrate":
        folder.mkdir()
    else:
        before = {"export": "calibrate", "export-folder": "calibrate", "run": "export"}[name]
        shutil.copytree(_template(before, OLD), folder)
    STAGES[name].make(folder, version)
    return folder


@cache
def identity(stage: Stage, version: str) -> str:
    """What the stage's output is in one version."""
    return stage.identity(_template(stage.name, version))


@cache
def entries(stage: Stage) -> frozenset[str]:
    """Everything in the working folder once the stage has ended well, hidden names too."""
    return frozenset(tree(_template(stage.name, NEW)))


def working_folder(stage: Stage, path: Path, *, fresh: bool = False) -> Path:
    """A folder in which the stage ran in the old version, or (``fresh``) has not run yet."""
    shutil.copytree(_template(stage.name, OLD), path)
    if fresh:
        target = path / stage.target
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        if stage.name == "run":
            (path / "results.samples.jsonl").unlink()
        elif stage.name == "calibrate":
            (path / "workdir.json").unlink()
        else:
            record = json.loads((path / "workdir.json").read_text()) | {"export": None}
            (path / "workdir.json").write_text(json.dumps(record))
    return path


def require_whole(stage: Stage, folder: Path, *, fresh: bool, context: object) -> str | None:
    """After an accident the output is the old one or the new one, nothing else; None where it is absent."""
    try:
        found = stage.identity(folder)
    except QmambaError as error:
        # Damage has exit code 3; what is merely absent was never there.
        assert fresh and not isinstance(error, ArtifactError), (context, error)
        assert "does not exist" in error.message, (context, error)
        return None
    expected = {identity(stage, NEW)} if fresh else {identity(stage, OLD), identity(stage, NEW)}
    assert found in expected, context
    if stage.resolve is not None:
        try:
            assert stage.resolve(folder) == found, context
        except QmambaError as error:
            # Ended between writing and recording: said, not guessed.
            assert found == identity(stage, NEW), (context, error)
            assert "on record" in error.message, (context, error)
    return found


def require_rerun(stage: Stage, folder: Path, context: object) -> None:
    """The same command again ends well, and clears everything away that the accident left."""
    stage.make(folder, NEW)
    assert stage.identity(folder) == identity(stage, NEW), context
    if stage.resolve is not None:
        assert stage.resolve(folder) == identity(stage, NEW), context
    assert frozenset(tree(folder)) == entries(stage), context


@dataclass
class Child:
    """A forked process that runs one function: exit code 0, or a traceback and 70."""

    pid: int

    @classmethod
    def start(cls, work: Callable[[], object]) -> "Child":
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return cls(pid)
        code = FAILED
        try:
            work()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stderr.flush()
            # Neither pytest's own clean-up nor that of its fixtures belongs to the child.
            os._exit(code)

    def kill(self) -> int:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """Exit code, or the negative number of the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def measured(stage: Stage, folder: Path) -> float:
    """Seconds that the new version takes in a child."""
    began = time.monotonic()
    assert Child.start(lambda: stage.make(folder, NEW)).wait() == 0
    return time.monotonic() - began


_NEW_NAMESPACE, _NEW_USER = 0x00020000, 0x10000000
_PRIVATE, _RECURSIVE, _READ_ONLY, _REMOUNT = 1 << 18, 1 << 14, 1, 32


def _system(name: str, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)


def enter_small_disk(folder: Path, size: int) -> None:
    """Put a disk of ``size`` bytes in the place of ``folder``, for this process alone; it goes with it.

    Raises:
        OSError: the machine does not permit it.
    """
    _system("unshare", _NEW_NAMESPACE if os.geteuid() == 0 else _NEW_NAMESPACE | _NEW_USER)
    with suppress(OSError):
        _system("mount", None, b"/", None, _PRIVATE | _RECURSIVE, None)
    _system("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())


def make_read_only(folder: Path) -> None:
    """Mount the small disk read-only."""
    _system("mount", None, os.fsencode(folder), None, _REMOUNT | _READ_ONLY, None)


@cache
def mounting_refused() -> str:
    """Why this machine does not let a test mount a disk; empty where it does."""
    folder = Path(tempfile.mkdtemp(dir=_KEPT.name))
    readable, writable = os.pipe()

    def attempt() -> None:
        try:
            enter_small_disk(folder, 1 << 16)
        except OSError as error:
            os.write(writable, str(error).encode())

    Child.start(attempt).wait()
    os.close(writable)
    with os.fdopen(readable, "rb") as file:
        return file.read().decode()


@contextmanager
def on_small_disk(tmp_path: Path, size: int) -> Iterator[Callable[[Callable[[Path], object]], None]]:
    """Call what is yielded with a function of the disk's folder; it runs in a child and must end well."""
    if mounting_refused():
        pytest.skip(f"no right to mount a small disk: {mounting_refused()}")
    folder = tmp_path / "disk"
    folder.mkdir()

    def call(work: Callable[[Path], object]) -> None:
        def within() -> None:
            enter_small_disk(folder, size)
            work(folder)

        assert Child.start(within).wait() == 0, "the traceback is above"

    yield call
