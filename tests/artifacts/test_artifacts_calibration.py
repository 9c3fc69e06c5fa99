import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from artifact_samples import SCALES, calibration_manifest, make_calibration, make_quantized, statistics
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.artifacts.calibration import (
    ENTRIES,
    MANIFEST,
    STATISTICS,
    read_calibration,
    read_calibration_manifest,
    write_calibration,
)
from qmamba_cli.artifacts.files import canonical_json
from qmamba_cli.artifacts.safetensors_io import write_safetensors
from qmamba_cli.errors import ArtifactError, QmambaError

SCALES_NAME = "scales.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_calibration(tmp_path / "calibration")
    return tmp_path / "calibration"


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest, and keep its spelling canonical so that only the change speaks."""
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(canonical_json(document))


def test_round_trip(tmp_path: Path) -> None:
    written = make_calibration(tmp_path / "c")
    artifact = read_calibration(tmp_path / "c")
    assert artifact.manifest == written == read_calibration_manifest(tmp_path / "c")
    assert artifact.scales == SCALES
    assert artifact.digest == written.content_digest
    assert artifact.statistics.keys() == statistics().keys()
    for name, value in statistics().items():
        assert artifact.statistics[name].dtype == value.dtype
        assert np.array_equal(artifact.statistics[name], value)
        artifact.statistics[name][...] = 0
    assert sorted(entry.name for entry in (tmp_path / "c").iterdir()) == sorted(ENTRIES)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    make_calibration(tmp_path / "a")
    make_calibration(tmp_path / "deep" / "b")
    for name in ENTRIES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "deep" / "b" / name).read_bytes()


def test_the_digest_covers_the_statistics(tmp_path: Path) -> None:
    first = make_calibration(tmp_path / "a")
    second = write_calibration(
        tmp_path / "b",
        manifest=calibration_manifest(),
        scales=SCALES,
        statistics={**statistics(), "lm_head:input.absmax": np.array([12.25], dtype=np.float32)},
    )
    assert first.content_digest != second.content_digest


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    make_calibration(tmp_path / "c")
    with pytest.raises(QmambaError, match="already exists"):
        make_calibration(tmp_path / "c")
    second = make_calibration(tmp_path / "c", force=True, alpha=0.99)
    assert read_calibration(tmp_path / "c").manifest == second


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-60, 1e60])
def test_a_scale_that_is_none_is_not_written(tmp_path: Path, value: float) -> None:
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="must be finite and > 0"):
        write_calibration(
            tmp_path / "c",
            manifest=calibration_manifest(),
            scales={**SCALES, "lm_head:input": value},
            statistics={},
        )
    assert not (tmp_path / "c").exists()


def test_scales_must_be_those_of_the_sites(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm_head:input"):
        write_calibration(
            tmp_path / "c",
            manifest=calibration_manifest(),
            scales={"layers.0.x_proj:input": 1.0},
            statistics={},
        )


def test_missing_folder_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(QmambaError, match="does not exist") as caught:
        read_calibration(tmp_path / "c")
    assert caught.value.exit_code == 1
    assert "qmamba calibrate" in caught.value.hint


def test_other_things_are_no_calibration(tmp_path: Path) -> None:
    make_quantized(tmp_path / "q")
    with pytest.raises(ArtifactError, match="is a file, expected a calibration folder"):
        read_calibration(tmp_path / "q")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"got no `manifest\.json`"):
        read_calibration(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="qmamba-quantized"), "has format `qmamba-quantized`"),
        (lambda d: d.pop("format"), "has format `NoneType`"),
        (lambda d: d.update(format_version=3), r"version 3, but qmamba-cli 0\.1\.0 reads up to 2"),
        (lambda d: d.update(format_version=0), "version 0, expected 1 or 2"),
        (lambda d: d.update(format_version="1"), "no whole number as `format_version`"),
        (lambda d: d.update(format_version=True), "no whole number as `format_version`"),
        (lambda d: d.update(surprise=1), "breaks the schema at `surprise`"),
        (lambda d: d.pop("alpha"), "lacks the key `alpha`"),
        (lambda d: d.pop("content_digest"), "lacks the key `content_digest`"),
        (lambda d: d["dataset"].pop("seed"), r"breaks the schema at `dataset\.seed`"),
        (lambda d: d["dataset"].update(seed="0"), r"breaks the schema at `dataset\.seed`"),
        (lambda d: d.update(alpha=0.5), "breaks the schema at `alpha`"),
        (lambda d: d.update(reduction="median"), "breaks the schema at `reduction`"),
        (lambda d: d["model"].update(digest="xyz"), r"breaks the schema at `model\.digest`"),
        (lambda d: d["sites"]["lm_head:input"].update(observations=0), "observations"),
        (lambda d: d["tensors"].update({"../../etc/passwd": {}}), "breaks the schema at `tensors"),
        (lambda d: d["tensors"].pop(STATISTICS), "no entry `statistics.safetensors`"),
        (lambda d: d["tensors"][SCALES_NAME].pop("lm_head:input"), "is not in the manifest"),
        (
            lambda d: d["tensors"][SCALES_NAME].update(x=d["tensors"][SCALES_NAME]["lm_head:input"]),
            "tensor `x` is missing",
        ),
        (lambda d: d["tensors"][SCALES_NAME]["lm_head:input"].update(shape=[2]), r"is F32 \[1\], expected"),
        (lambda d: d["tensors"][SCALES_NAME]["lm_head:input"].update(dtype="F64"), "expected F64"),
        (lambda d: d["tensors"][SCALES_NAME]["lm_head:input"].update(sha256="0" * 64), "is damaged"),
        (lambda d: d.update(seed=1), "breaks the schema at `seed`"),
        (lambda d: d.update(device="cuda"), "got content digest"),
        (lambda d: d.update(content_digest="0" * 64), "got content digest"),
    ],
)
def test_a_changed_manifest_is_refused(folder: Path, change: Callable[[dict], None], message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_calibration(folder)
    assert caught.value.exit_code == 3
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"manifest", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff", "not UTF-8"),
        (b"{" * 5000, "not valid JSON"),
        (b"[" * 30_000, "nested too deeply"),
        (b"[" * 50_000, "not valid JSON"),
        (b" " * (1 << 24) + b"{}", "too large"),
    ],
)
def test_a_manifest_that_is_none(folder: Path, text: bytes, message: str) -> None:
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(ArtifactError, match=message):
        read_calibration(folder)


def test_a_manifest_spelled_differently_was_edited(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(document, indent=2))
    with pytest.raises(ArtifactError, match="not in canonical form"):
        read_calibration(folder)


@pytest.mark.parametrize("name", [SCALES_NAME, STATISTICS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"file `{name}` is missing"):
        read_calibration(folder)


def test_scales_of_another_calibration_are_refused(folder: Path) -> None:
    write_safetensors(folder / SCALES_NAME, {name: np.array([9.0], dtype=np.float32) for name in SCALES})
    with pytest.raises(ArtifactError, match="the data of tensor"):
        read_calibration(folder)
    write_safetensors(folder / SCALES_NAME, {"x": np.zeros(1, dtype=np.float32)})
    with pytest.raises(ArtifactError, match="is missing"):
        read_calibration(folder)


def test_metadata_in_a_tensor_file_is_refused(folder: Path) -> None:
    write_safetensors(
        folder / SCALES_NAME,
        {name: np.array([scale], dtype=np.float32) for name, scale in SCALES.items()},
        {"format": "pt"},
    )
    with pytest.raises(ArtifactError, match="has metadata"):
        read_calibration(folder)


def test_without_verification_the_data_is_not_hashed(folder: Path) -> None:
    data = bytearray((folder / STATISTICS).read_bytes())
    data[-1] ^= 1
    (folder / STATISTICS).write_bytes(data)
    read_calibration(folder, verify=False)
    with pytest.raises(ArtifactError, match="the data of tensor"):
        read_calibration(folder)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("flips") / "calibration"
    make_calibration(folder)
    return folder, {name: (folder / name).read_bytes() for name in ENTRIES}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ENTRIES), st.integers(min_value=0), st.integers(0, 7))
def test_any_flipped_bit_is_detected(originals, name: str, place: int, bit: int) -> None:
    folder, contents = originals
    data = bytearray(contents[name])
    data[place % len(data)] ^= 1 << bit
    (folder / name).write_bytes(data)
    try:
        with pytest.raises(ArtifactError):
            read_calibration(folder)
    finally:
        (folder / name).write_bytes(contents[name])


@pytest.mark.parametrize("name", ENTRIES)
def test_any_truncation_is_detected(originals, name: str) -> None:
    folder, contents = originals
    for length in range(0, len(contents[name]), 17):
        (folder / name).write_bytes(contents[name][:length])
        with pytest.raises(ArtifactError):
            read_calibration(folder)
    (folder / name).write_bytes(contents[name])
    read_calibration(folder)
