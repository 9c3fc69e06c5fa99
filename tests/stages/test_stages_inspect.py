"""`inspect` and `verify`: what an artifact says, and whether bytes and lineage agree with it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import CALIBRATE, WORKDIR, artifacts, copied, done, model_folder, qmamba, tree

from qmamba_cli.artifacts.quantized import read_quantized_manifest


def verdicts(*arguments: object, cwd: Path, code: int = 0) -> dict[str, str]:
    """Check → verdict, of ``qmamba verify``."""
    outcome = qmamba("verify", *arguments, "--json", cwd=cwd)
    assert outcome.code == code, outcome.err
    document = outcome.json()
    assert document["ok"] == (code == 0)
    if code:
        assert outcome.err.startswith("error: ") and "\n\nhint: " in outcome.err
        failed = next(row for row in document["checks"] if row["verdict"] == "failed")
        assert outcome.err.startswith(f"error: {failed['what']} failed: {failed['detail']}\n")
    return {row["what"]: row["verdict"] for row in document["checks"]}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_everything_in_order() -> None:
    folder = artifacts().folder
    expected = {
        "quantized file w4.safetensors": "ok",
        f"calibration {WORKDIR}/calibration": "ok",
        "its calibration": "ok",
        "source checkpoint demo": "ok",
    }
    assert verdicts("w4.safetensors", cwd=folder) == expected
    assert verdicts(WORKDIR, cwd=folder) == expected
    assert set(verdicts("w8.safetensors", cwd=folder).values()) == {"ok"}
    assert verdicts(f"{WORKDIR}/calibration", cwd=folder) == {
        f"calibration {WORKDIR}/calibration": "ok",
        "source checkpoint demo": "ok",
    }


def test_verify_writes_nothing() -> None:
    before = tree(artifacts().folder)
    verdicts(WORKDIR, cwd=artifacts().folder)
    done("inspect", "w4.safetensors", cwd=artifacts().folder)
    assert tree(artifacts().folder) == before


def test_a_swapped_calibration(tmp_path: Path) -> None:
    copied(tmp_path)
    done(*CALIBRATE, "--seed", 1, "--force", cwd=tmp_path)
    found = verdicts("w4.safetensors", cwd=tmp_path, code=3)
    assert found["its calibration"] == "failed"
    assert found["quantized file w4.safetensors"] == found["source checkpoint demo"] == "ok"
    assert verdicts(WORKDIR, cwd=tmp_path, code=3)["its calibration"] == "failed"
    # The calibration by itself is sound, and so is the file with its own one.
    verdicts(f"{WORKDIR}/calibration", cwd=tmp_path)
    verdicts("w4.safetensors", "--calibration", artifacts().calibration, cwd=tmp_path)


@pytest.mark.parametrize("name", ["w4.safetensors", f"{WORKDIR}/calibration/statistics.safetensors"])
def test_a_damaged_artifact(tmp_path: Path, name: str) -> None:
    copied(tmp_path)
    damage(tmp_path / name)
    found = verdicts("w4.safetensors", cwd=tmp_path, code=3)
    assert list(found.values()).count("failed") == 1
    people = qmamba("verify", "w4.safetensors", cwd=tmp_path)
    assert people.code == 3 and " failed " in people.out


def test_another_source_checkpoint(tmp_path: Path) -> None:
    copied(tmp_path)
    model_folder(tmp_path / "model")
    found = verdicts("w4.safetensors", "--model", "./model", cwd=tmp_path, code=3)
    assert found["source checkpoint ./model"] == "failed"


def test_a_source_that_changed_since(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    small = ("--samples", 2, "--seqlen", 16)
    done("calibrate", "./model", *small, cwd=tmp_path)
    done("export", "--out", "q", cwd=tmp_path)
    assert set(verdicts(WORKDIR, cwd=tmp_path).values()) == {"ok"}
    damage(model / "model.safetensors")
    assert verdicts("q", cwd=tmp_path, code=3)["source checkpoint ./model"] == "failed"


def test_a_link_whose_other_end_is_not_here_is_absent(tmp_path: Path) -> None:
    shutil.copy(artifacts().w4, tmp_path)
    found = verdicts("w4.safetensors", cwd=tmp_path)
    assert found == {
        "quantized file w4.safetensors": "ok",
        "its calibration": "absent",
        "source checkpoint demo": "ok",
    }
    model = model_folder(tmp_path / "model")
    done("calibrate", "./model", "--samples", 2, "--seqlen", 16, cwd=tmp_path)
    shutil.rmtree(model)
    found = verdicts(f"{WORKDIR}/calibration", cwd=tmp_path)
    assert found["source checkpoint ./model"] == "absent"


def test_inspect_shows_the_manifest() -> None:
    folder = artifacts().folder
    manifest = read_quantized_manifest(artifacts().w4)
    document = done("inspect", "w4.safetensors", "--json", cwd=folder).json()
    assert document["manifest"]["content_digest"] == manifest.content_digest
    assert document["manifest"]["sites"].keys() == manifest.sites.keys()
    data = sum(part["bytes"] for part in document["parts"])
    assert 0 < artifacts().w4.stat().st_size - data < 60_000
    text = done("inspect", "w4.safetensors", cwd=folder).out
    assert manifest.content_digest in text
    assert all(site in text for site in manifest.sites)
    assert "W4A8, groups of 128, embedding 8 bits" in text


def test_inspect_agrees_with_export(tmp_path: Path) -> None:
    given = ("export", "--out", tmp_path / "q", "--calibration", artifacts().calibration, "--json")
    report: dict[str, Any] = done(*given, cwd=tmp_path).json()
    document = done("inspect", "q", "--json", cwd=tmp_path).json()
    assert document["parts"] == report["parts"]
    assert document["bits_per_weight"] == report["bits_per_weight"]
    assert document["manifest"]["content_digest"] == report["digest"]


def test_inspect_of_a_calibration() -> None:
    text = done("inspect", artifacts().calibration, cwd=artifacts().folder).out
    assert "alpha 0.9995, reduction global" in text
    assert "bundled, 8 x 64 tokens, seed 0" in text
