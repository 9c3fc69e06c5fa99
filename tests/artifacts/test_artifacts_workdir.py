import shutil
from pathlib import Path

import pytest
from artifact_samples import make_calibration, make_quantized

from qmamba_cli.artifacts.files import atomic_file
from qmamba_cli.artifacts.workdir import RECORD, Record, Workdir
from qmamba_cli.errors import ArtifactError, QmambaError


@pytest.fixture
def filled(tmp_path: Path) -> Workdir:
    """A work folder with a calibration inside and an export beside it."""
    workdir = Workdir(tmp_path / "job" / "work")
    calibration = make_calibration(workdir.calibration_path)
    workdir.record_calibration(workdir.calibration_path, calibration.content_digest)
    export = make_quantized(tmp_path / "job" / "ckpt.safetensors")
    workdir.record_export(tmp_path / "job" / "ckpt.safetensors", export.content_digest)
    return workdir


def test_nothing_is_recorded_at_first(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "work")
    assert workdir.last_calibration() is None
    assert workdir.last_export() is None
    for resolve, stage in ((workdir.resolve_calibration, "calibrate"), (workdir.resolve_export, "export")):
        with pytest.raises(QmambaError, match="on record") as caught:
            resolve()
        assert caught.value.exit_code == 1
        assert f"qmamba {stage}" in caught.value.hint
    assert not (tmp_path / "work").exists()


def test_what_was_recorded_is_resolved(filled: Workdir) -> None:
    assert filled.resolve_calibration() == filled.last_calibration()
    assert filled.resolve_export() == filled.last_export()
    assert filled.resolve_calibration().path == filled.calibration_path
    assert filled.resolve_export().path == filled.path.parent / "ckpt.safetensors"


def test_the_folder_can_be_moved(filled: Workdir, tmp_path: Path) -> None:
    shutil.move(tmp_path / "job", tmp_path / "elsewhere")
    moved = Workdir(tmp_path / "elsewhere" / "work")
    assert moved.resolve_calibration().path == tmp_path / "elsewhere" / "work" / "calibration"
    assert moved.resolve_export().path == tmp_path / "elsewhere" / "ckpt.safetensors"
    assert str(tmp_path) not in (moved.path / RECORD).read_text()


def test_paths_below_the_current_folder_are_short(
    filled: Workdir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "job")
    assert Workdir(Path("work")).resolve_export().path == Path("ckpt.safetensors")
    assert Workdir(Path("work")).resolve_calibration().path == Path("work/calibration")


def test_a_work_folder_behind_a_link_finds_what_lies_beside_it(filled: Workdir, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(filled.path)
    assert Workdir(tmp_path / "link").resolve_export() == filled.resolve_export()


def test_the_last_record_of_each_kind_is_kept(filled: Workdir, tmp_path: Path) -> None:
    export = filled.last_export()
    filled.record_calibration(tmp_path / "other", "e" * 64)
    assert filled.last_calibration() == Record(tmp_path / "other", "e" * 64)
    assert filled.last_export() == export


def test_a_vanished_artifact_is_stale(filled: Workdir) -> None:
    shutil.rmtree(filled.calibration_path)
    (filled.path.parent / "ckpt.safetensors").unlink()
    for resolve in (filled.resolve_calibration, filled.resolve_export):
        with pytest.raises(ArtifactError, match="is gone") as caught:
            resolve()
        assert caught.value.exit_code == 3
        assert "again" in caught.value.hint


def test_a_replaced_artifact_is_stale(filled: Workdir) -> None:
    make_calibration(filled.calibration_path, force=True, alpha=0.99)
    make_quantized(filled.path.parent / "ckpt.safetensors", force=True, tool_version="0.0.9")
    with pytest.raises(ArtifactError, match="is not the calibration on record"):
        filled.resolve_calibration()
    with pytest.raises(ArtifactError, match="is not the export on record"):
        filled.resolve_export()


def test_a_replacement_killed_midway_is_recovered(filled: Workdir) -> None:
    filled.calibration_path.rename(filled.path / ".calibration.qmamba-old-0123abcd")
    assert filled.resolve_calibration().path == filled.calibration_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"[]", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[" * 60_000, "is damaged"),
        (b'{"format":"qmamba-workdir","format_version":1,"more":1}', "is damaged"),
        (b'{"format":"other","format_version":1}', "is damaged"),
        (b'{"calibration":{"path":"x","digest":"y"}}', "is damaged"),
        (b'{"format":"qmamba-workdir","format_version":2}', "version 2, expected 1"),
    ],
)
def test_a_damaged_record_is_refused(filled: Workdir, content: bytes, message: str) -> None:
    (filled.path / RECORD).write_bytes(content)
    for read in (filled.last_calibration, filled.last_export, filled.resolve_export):
        with pytest.raises(ArtifactError, match=message) as caught:
            read()
        assert caught.value.hint
    with pytest.raises(ArtifactError, match=message):
        filled.record_calibration(filled.calibration_path, "e" * 64)
    assert (filled.path / RECORD).read_bytes() == content


def test_two_writers_of_the_record(filled: Workdir) -> None:
    before = (filled.path / RECORD).read_bytes()
    with atomic_file(filled.path / RECORD, force=True) as temporary:
        temporary.write_bytes(before)
        with pytest.raises(QmambaError, match="another process"):
            filled.record_export(filled.path / "x", "e" * 64)
    assert (filled.path / RECORD).read_bytes() == before
