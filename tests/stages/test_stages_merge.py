"""Shards and their merge: the bytes of a calibration that was made in one go, or a refusal that names why."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from calibrations import calibrated, command_line, options, small_model, whole
from command_line import done, qmamba, refused, tree

from qmamba_cli.artifacts.calibration import read_calibration, read_calibration_manifest
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import ArtifactError, QmambaError, UsageError
from qmamba_cli.quant.observers import Reduction
from qmamba_cli.stages.calibrate import calibrate
from qmamba_cli.stages.export import ExportOptions, export
from qmamba_cli.stages.merge import MergeOptions, merge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def shard(folder: Path) -> Any:
    """Makes a shard once: number, count, and what is asked otherwise."""

    @cache
    def make(number: int, count: int, **changes: Any) -> Path:
        name = "-".join(f"{key}={value}" for key, value in changes.items()) or "same"
        return calibrated(folder / name, shard=(number, count), **changes).path

    return make


def merged(folder: Path, *shards: Path, **changes: Any) -> dict[str, str]:
    report = merge(MergeOptions(shards=shards, workdir=folder, **changes))
    assert report.digest == read_calibration(report.path).digest
    return dict(tree(report.path))


@pytest.mark.parametrize("reduction", Reduction)
@pytest.mark.parametrize("count", [2, 3])
def test_the_merge_has_the_bytes_of_the_whole(
    tmp_path: Path, shard: Any, count: int, reduction: Reduction
) -> None:
    shards = [shard(number, count, reduction=reduction) for number in range(count, 0, -1)]
    assert merged(tmp_path, *shards) == whole(reduction)
    assert Workdir(tmp_path).resolve_calibration().path == tmp_path / "calibration"


def test_shards_of_different_splits_that_fit(tmp_path: Path, shard: Any) -> None:
    """Of eleven batches the first half are five, and so are the first two quarters."""
    assert merged(tmp_path, shard(1, 2), shard(3, 4), shard(4, 4)) == whole()


def test_as_many_shards_as_batches(tmp_path: Path, shard: Any) -> None:
    shards = [shard(number, 11) for number in range(1, 12)]
    records = [read_calibration_manifest(path).shard for path in shards]
    assert [(row.first, row.samples) for row in records if row] == [
        *((first, 3) for first in range(0, 30, 3)),
        (30, 2),
    ]
    assert merged(tmp_path, *shards) == whole()


def test_what_a_shard_says_of_itself(shard: Any) -> None:
    path = shard(2, 3)
    assert path.name == "calibration-2-of-3"
    manifest = read_calibration_manifest(path)
    assert manifest.shard is not None and manifest.format_version == 2
    assert (manifest.shard.number, manifest.shard.count) == (2, 3)
    assert (manifest.shard.first, manifest.shard.samples) == (9, 12)
    assert len(manifest.dataset.sample_ids) == manifest.dataset.samples == 32
    key = "layers.0.in_proj:input"
    artifact = read_calibration(path, shards=True)
    assert artifact.coverage[f"{key}.sample_absmax"].shape == (12,)


def test_a_shard_is_no_calibration(tmp_path: Path, shard: Any) -> None:
    for act in (
        lambda: read_calibration(shard(1, 2)),
        lambda: export(ExportOptions(out=tmp_path / "x", workdir=tmp_path, calibration=shard(1, 2))),
    ):
        with pytest.raises(ArtifactError, match=r"is shard 1/2 of a calibration") as caught:
            act()
        assert caught.value.exit_code == 3
        assert "qmamba merge" in caught.value.hint
    assert tree(tmp_path) == {}


def test_a_shard_is_not_recorded_as_the_calibration(tmp_path: Path) -> None:
    calibrated(tmp_path, shard=(1, 2))
    assert Workdir(tmp_path).last_calibration() is None


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([(1, 3), (3, 3)], "samples 9 to 20 of 32 are missing"),
        ([(2, 3), (3, 3)], "samples 0 to 8 of 32 are missing"),
        ([(1, 3), (2, 3)], "samples 21 to 31 of 32 are missing"),
        ([(1, 2)], "samples 15 to 31 of 32 are missing"),
        ([(1, 2), (2, 2), (2, 2)], "overlap, got 2/2 and 2/2"),
        ([(1, 2), (2, 3), (3, 3)], "overlap, got 1/2 and 2/3"),
    ],
)
def test_gaps_and_overlaps(tmp_path: Path, shard: Any, numbers: list[Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        merged(tmp_path, *(shard(*pair) for pair in numbers))
    assert caught.value.exit_code == 3 and caught.value.hint
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.99}, "`--alpha` is 0.99, expected 0.9995"),
        ({"reduction": Reduction.MEAN}, "`--reduction` is mean, expected global"),
        ({"batch_size": 5}, "`--batch-size` is 5, expected 3"),
        ({"seqlen": 17}, "`--seqlen` is 17, expected 16"),
        ({"seed": 3}, "`--seed` is 3, expected 0"),
        ({"samples": 33}, "`--samples` is 33, expected 32"),
        ({"dataset": "bundled"}, "the text's digest is"),
        ({"model": "demo"}, "the checkpoint's digest is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_shards_of_another_calibration(
    tmp_path: Path, shard: Any, changes: dict[str, Any], message: str
) -> None:
    other = shard(2, 2, **changes)
    with pytest.raises(ArtifactError) as caught:
        merged(tmp_path, shard(1, 2), other)
    assert message in caught.value.message and str(other) in caught.value.message
    assert caught.value.exit_code == 3


def test_shards_of_another_installation(tmp_path: Path, shard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmamba_cli.stages.calibrate.tool_version", lambda: "9.9")
    other = calibrated(tmp_path / "other", shard=(2, 2)).path
    with pytest.raises(ArtifactError, match=r"the version of this program is 9\.9"):
        merged(tmp_path / "w", shard(1, 2), other)


def test_a_checkpoint_under_another_path_is_the_same(tmp_path: Path, shard: Any) -> None:
    shutil.copytree(small_model(), tmp_path / "moved")
    other = calibrated(tmp_path / "w", shard=(2, 2), model=str(tmp_path / "moved")).path
    assert merged(tmp_path / "w", shard(1, 2), other) == whole()


def test_a_whole_calibration_is_no_shard(tmp_path: Path, shard: Any) -> None:
    report = calibrated(tmp_path)
    with pytest.raises(ArtifactError, match="is a whole calibration, expected a shard"):
        merged(tmp_path / "w", shard(1, 2), report.path)


def test_a_damaged_shard(tmp_path: Path, shard: Any) -> None:
    shutil.copytree(shard(2, 2), tmp_path / "damaged")
    for name in ("statistics.safetensors", "coverage.safetensors", "scales.safetensors", "manifest.json"):
        path = tmp_path / "damaged" / name
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        with pytest.raises(ArtifactError):
            merged(tmp_path / "w", shard(1, 2), tmp_path / "damaged")
        data[-2] ^= 1
        path.write_bytes(data)
    assert not (tmp_path / "w").exists()


def test_more_shards_than_batches(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`--shard 1/12` has nothing to do, got 11 batches of 3"):
        calibrated(tmp_path, shard=(1, 12))


def test_shards_are_resumed_one_by_one(tmp_path: Path, shard: Any) -> None:
    asked = options(tmp_path, shard=(2, 2))
    assert calibrate(asked, stop=lambda: True).stopped_at == 18
    with pytest.raises(QmambaError, match=r"calibration-2-of-2\.partial"):
        calibrate(asked)
    calibrated(tmp_path, shard=(1, 2))
    report = calibrated(tmp_path, shard=(2, 2), resume=True)
    assert report.resumed_at == 18
    assert tree(report.path) == tree(shard(2, 2))


def test_an_old_artifact_is_replaced_only_with_force(tmp_path: Path, shard: Any) -> None:
    shards = (shard(1, 2), shard(2, 2))
    merged(tmp_path, *shards)
    with pytest.raises(QmambaError, match="already exists"):
        merged(tmp_path, *shards)
    assert merged(tmp_path, *shards, force=True) == whole()


def test_the_command_line(tmp_path: Path) -> None:
    for number in (1, 2):
        done(*command_line(tmp_path / "w"), f"--shard={number}/2", "--json", cwd=tmp_path)
    shards = (tmp_path / "w" / "calibration-1-of-2", tmp_path / "w" / "calibration-2-of-2")
    values = done("merge", *shards, "--out", "out", "--workdir", "w", "--json", cwd=tmp_path).json()
    assert dict(tree(tmp_path / "out")) == whole()
    assert (values["samples"], values["tokens"], values["path"]) == (32, 512, "out")
    assert Workdir(tmp_path / "w").resolve_calibration().digest == values["digest"]
    refused(qmamba("merge", shards[0], "--out", "x", cwd=tmp_path), 3, "are missing", "2 shards")
    refused(qmamba("merge", tmp_path, "--out", "x", cwd=tmp_path), 3, "is not a calibration")
    refused(qmamba("merge", cwd=tmp_path), 2, "DIR")
    for text in ("2", "0/2", "3/2", "a/b", "1/2/3", "-1/2", "1/"):
        refused(qmamba(*command_line(tmp_path / "v"), f"--shard={text}", cwd=tmp_path), 2, "--shard")
    assert not (tmp_path / "x").exists()
