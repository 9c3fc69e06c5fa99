import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qmamba_cli.artifacts.files import (
    MAX_JSON_COMMAS,
    MAX_JSON_NODES,
    atomic_directory,
    atomic_file,
    canonical_json,
    check_output,
    recover_directory,
    sha256_bytes,
    shown,
    strict_json,
)
from qmamba_cli.errors import QmambaError

# Each writer says when it has written half, then waits to be killed.
FILE_WRITER = """
import sys, time
from pathlib import Path
from qmamba_cli.artifacts.files import atomic_file
with atomic_file(Path(sys.argv[1]), force=True) as temporary:
    temporary.write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""
FOLDER_WRITER = """
import sys, time
from pathlib import Path
from qmamba_cli.artifacts.files import atomic_directory
with atomic_directory(Path(sys.argv[1]), force=True) as folder:
    (folder / "a").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""
# Stops between the two renames that replace a folder.
SWAPPER = """
import sys, time
from pathlib import Path
from qmamba_cli.artifacts.files import atomic_directory
rename = Path.rename
def slow(self, target):
    if "qmamba-tmp" in self.name:
        print("ready", flush=True)
        time.sleep(60)
    return rename(self, target)
Path.rename = slow
with atomic_directory(Path(sys.argv[1]), force=True) as folder:
    (folder / "a").write_bytes(b"new")
"""


def start(script: str, path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert process.stdout is not None
    process.stdout.close()


def fill(path: Path, *, force: bool = False, content: str = "new") -> None:
    with atomic_file(path, force=force) as temporary:
        temporary.write_text(content)


def fill_folder(path: Path, *, force: bool = False, content: str = "new") -> None:
    with atomic_directory(path, force=force, known=("a",)) as folder:
        (folder / "a").write_text(content)


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_file_is_made_with_its_folders_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / "deep" / "out.bin")
    assert (tmp_path / "deep" / "out.bin").read_text() == "new"
    assert entries(tmp_path / "deep") == ["out.bin"]


@pytest.mark.parametrize("write", [fill, fill_folder])
def test_existing_output_needs_force(tmp_path: Path, write) -> None:
    path = tmp_path / "out"
    write(path, content="old")
    with pytest.raises(QmambaError, match="already exists") as caught:
        write(path)
    assert "--force" in caught.value.hint
    written = path if path.is_file() else path / "a"
    assert written.read_text() == "old"
    write(path, force=True)
    assert written.read_text() == "new"
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out"
    fill(path, content="old")
    with pytest.raises(error), atomic_file(path, force=True) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out"
    fill_folder(path, content="old")
    with pytest.raises(error), atomic_directory(path, force=True) as folder:
        (folder / "a").write_text("half")
        raise error
    assert (path / "a").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_a_killed_writer_of_a_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    kill(start(FILE_WRITER, path))
    assert path.read_text() == "old"
    assert len(entries(tmp_path)) > 1, "the killed writer was expected to leave its temporary file"
    fill(path, force=True)
    assert path.read_text() == "new"
    assert entries(tmp_path) == ["out"]


def test_a_killed_writer_of_a_folder_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    fill_folder(path, content="old")
    kill(start(FOLDER_WRITER, path))
    assert (path / "a").read_text() == "old"
    fill_folder(path, force=True)
    assert (path / "a").read_text() == "new"
    assert entries(tmp_path) == ["out"]


def test_a_folder_killed_between_its_renames_is_recovered_by_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "out"
    fill_folder(path, content="old")
    kill(start(SWAPPER, path))
    assert not path.exists()
    recover_directory(path)
    assert (path / "a").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_a_folder_killed_between_its_renames_is_recovered_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "out"
    fill_folder(path, content="old")
    kill(start(SWAPPER, path))
    with pytest.raises(QmambaError, match="already exists"):
        fill_folder(path)
    assert (path / "a").read_text() == "old"
    fill_folder(path, force=True)
    assert (path / "a").read_text() == "new"


def test_a_second_writer_is_told_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "out"
    process = start(FILE_WRITER, path)
    try:
        with pytest.raises(QmambaError, match="another process is writing"):
            fill(path, force=True)
    finally:
        kill(process)
    fill(path)
    assert path.read_text() == "new"


def test_a_failed_second_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    fill_folder(path, content="old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if "qmamba-tmp" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(QmambaError, match="cannot write"):
        fill_folder(path, force=True)
    assert (path / "a").read_text() == "old"
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "out"
    fill(path, content="old")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(QmambaError) as caught:
        fill(path, force=True)
    assert caught.value.message == f"cannot write `{path}`, got `{os.strerror(code)}`"
    assert caught.value.hint
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_a_full_disk_within_the_block_is_reported(tmp_path: Path) -> None:
    with pytest.raises(QmambaError, match="No space left"), atomic_file(tmp_path / "x", force=False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_about_another_file_passes_through(tmp_path: Path) -> None:
    other = str(tmp_path / "elsewhere" / "model.bin")
    path = tmp_path / "here" / "out"
    with pytest.raises(PermissionError), atomic_file(path, force=False):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), other)
    with pytest.raises(ConnectionResetError), atomic_file(path, force=False):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize("below", ["out", "deep/out"])
@pytest.mark.parametrize("write", [fill, fill_folder, check_output])
def test_a_path_below_a_file_is_refused(tmp_path: Path, below: str, write) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(QmambaError, match="cannot write") as caught:
        write(tmp_path / "file" / below, force=False)
    assert "a parent of this path is a file" in caught.value.hint


@pytest.mark.parametrize("force", [False, True])
def test_the_wrong_kind_of_target_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(QmambaError, match="is not a folder"):
        fill_folder(tmp_path / "file", force=force)
    with pytest.raises(QmambaError, match="is not a regular file"):
        fill(tmp_path / "folder", force=force)
    with pytest.raises(QmambaError, match="is not a regular file"):
        fill(Path("/dev/null"), force=force)
    assert not Path("/dev/null").is_file()


def test_a_folder_with_strange_entries_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(QmambaError, match=r"holds `thesis\.txt`"):
        fill_folder(folder, force=True)
    assert entries(folder) == ["thesis.txt"]


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill_folder(tmp_path / "out")
    assert entries(tmp_path) == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "real")
    fill(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "real").read_text() == "new"


def test_check_output_changes_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "deep" / "out", force=False)
    assert entries(tmp_path) == []
    (tmp_path / "out").write_text("x")
    with pytest.raises(QmambaError, match="already exists"):
        check_output(tmp_path / "out", force=False)
    check_output(tmp_path / "out", force=True)
    assert entries(tmp_path) == ["out"]


def test_check_output_names_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(QmambaError, match="Permission denied"):
        check_output(tmp_path / "out", force=False)


def test_a_long_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QmambaError, match="too long"):
        fill(tmp_path / ("x" * 300))


def test_digest() -> None:
    assert sha256_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff{}", "not UTF-8"),
        (b"{", "character 1"),
        (b'{"a":1,"a":2}', "given twice"),
        (b'{"a":{"b":1,"b":1}}', "given twice"),
        (b"NaN", "not a JSON number"),
        (b"[-Infinity]", "not a JSON number"),
        (b"[" * 30_000, "nested too deeply"),
        (b'{"a":' * 15_000, "nested too deeply"),
        (b"9" * 10_000, "limit"),
        (b'"\\ud800"', "surrogate"),
        (b"", "character 0"),
        (b'{"a":' * 100_000, "200000 keys, lists and objects"),
        (b"[" + b"0," * 300_000 + b"0]", "300000 commas"),
    ],
)
def test_strict_json_refuses(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strict_json(data)


@pytest.mark.parametrize(
    "data",
    [
        b"[" + b",".join([b"{}"] * (MAX_JSON_NODES + 1)) + b"]",
        b"[" + b",".join([b"1.5"] * (MAX_JSON_COMMAS + 2)) + b"]",
        b"{" + b",".join(b'"%d":0' % key for key in range(MAX_JSON_NODES)) + b"}",
    ],
    ids=["objects", "numbers", "keys"],
)
def test_what_would_take_long_to_parse_is_not_parsed(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="expected at most"):
        strict_json(data)


def test_what_is_within_the_bounds_is_parsed() -> None:
    assert len(strict_json(b"[" + b",".join([b"0"] * MAX_JSON_COMMAS) + b"]")) == MAX_JSON_COMMAS
    assert len(strict_json(b"[" + b",".join([b"[]"] * (MAX_JSON_NODES - 1)) + b"]")) == MAX_JSON_NODES - 1


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": 1, "a": [True, None]}) == '{"a":[true,null],"b":1}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))


def test_shown_is_short_printable_ascii() -> None:
    assert shown("a\x1b[31m\n") == "a\\x1b[31m\\n"
    assert len(shown("x" * 1000)) == 80
