"""What a calibration says of itself: coverage, overlap with a test text, sizes beforehand, equal bytes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrations import calibrated, command_line, options, small_text
from command_line import done, qmamba, refused, tree
from random_models import small_config

from qmamba_cli.artifacts.calibration import COVERAGE, MANIFEST, read_calibration, read_calibration_manifest
from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.evaluation.overlap import shared_passages
from qmamba_cli.model import streaming
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.streaming import preparing_bytes, weight_bytes
from qmamba_cli.quant.coverage import CHANNEL_AXES, Coverage, coverage_report
from qmamba_cli.quant.observers import ObserverSet
from qmamba_cli.sites import SITES, ObserverKind, site_keys
from qmamba_cli.stages.calibrate import calibrate
from qmamba_cli.stages.coverage import coverage_of
from qmamba_cli.stages.estimate import Trials
from qmamba_cli.stages.export import ExportOptions, export
from qmamba_cli.stages.spooled import spooled_bytes

SELF = {"dataset": "self"}
U, LAST = "layers.0.x_proj:input", "lm_head:input"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration that no test changes."""
    return calibrated(tmp_path_factory.mktemp("finished")).path


def observed(maxima: list[float], key: str = LAST) -> tuple[ObserverSet, Coverage]:
    """One sample a maximum at one site."""
    observers, coverage = ObserverSet(1), Coverage(1)
    for maximum in maxima:
        x = torch.full((1, 4, 5), maximum / 2)
        x[0, 1, 2] = -maximum
        observers.observe(key, x)
        coverage.observe(key, x)
    return observers, coverage


def row_of(maxima: list[float], absmax: float = 1.0) -> Any:
    observers, coverage = observed(maxima)
    absmaxes = dict.fromkeys(observers, absmax)
    return {row.site: row for row in coverage_report(observers, coverage, absmaxes).sites}[LAST]


@pytest.mark.parametrize(
    ("maxima", "last_growth", "growth"),
    [
        ([1.0] * 20, 0, 0.0),
        ([1.0] * 19 + [1.5], 19, 0.5),
        ([1.0] * 18 + [1.25, 1.25], 18, 0.25),
        ([1.0] * 17 + [2.0, 1.5, 1.5], 17, 0.0),
        ([0.0] * 20, 0, 0.0),
        ([0.0] * 19 + [1.0], 19, 1.0),
        # Too few to have a last tenth.
        ([1.0] * 8 + [2.0], 8, None),
    ],
)
def test_growth_of_a_maximum(maxima: list[float], last_growth: int, growth: float | None) -> None:
    row = row_of(maxima)
    assert (row.last_growth, row.growth, row.observed) == (last_growth, growth, max(maxima))
    assert row.observations == 20 * len(maxima)


def test_the_report_asks_for_more_samples_when_more_than_chance_still_grows() -> None:
    observers, coverage = ObserverSet(1), Coverage(1)
    keys = site_keys(1)
    for growing in range(len(keys) + 1):
        observers, coverage = ObserverSet(1), Coverage(1)
        for number, key in enumerate(keys):
            for sample in range(20):
                grows = number < growing and sample == 19
                x = torch.full((1, 3, 4), 1.0 + (0.1 * (number + 1) if grows else 0.0))
                observers.observe(key, x)
                coverage.observe(key, x)
        report = coverage_report(observers, coverage, observers.absmaxes())
        assert report.samples == 20
        assert [row.site for row in report.growing] == list(reversed(keys[:growing]))
        assert report.wants_more_samples == (growing > 0.2 * len(keys))


def test_channels_that_stand_out() -> None:
    generator = torch.Generator().manual_seed(3)
    channels, planted = 16, {3: 40.0, 11: 90.0}
    for key, axis in CHANNEL_AXES.items():
        x = torch.rand(2, 6, channels, generator=generator) - 0.5
        for channel, factor in planted.items():
            x[1, 2, channel] = factor
        observers, coverage = ObserverSet(1), Coverage(1)
        site = f"layers.0.{key}"
        seen = x.transpose(1, 2) if axis == 1 else x
        observers.observe(site, seen)
        coverage.observe(site, seen[:1])
        coverage.observe(site, seen[1:])
        report = coverage_report(observers, coverage, dict.fromkeys(observers, 1.0))
        row = {row.site: row for row in report.sites}[site]
        assert row.outliers == (11, 3)
        assert np.array_equal(coverage.channels[site], x.abs().amax(dim=(0, 1)).numpy())
        assert coverage.samples[site] == x.abs().amax(dim=(1, 2)).tolist()


def test_the_axis_of_the_channels_is_the_models(finished: Path) -> None:
    """The channels' maxima are as many as the site's channels: the axis is the right one."""
    artifact = read_calibration(finished)
    config = artifact.manifest.model.config
    widths = {"in_proj:input": config["d_model"], "x_proj:input": config["d_inner"]}
    widths["out_proj:input"] = config["d_inner"]
    for name, width in widths.items():
        assert artifact.coverage[f"layers.1.{name}.channel_absmax"].shape == (width,)


def test_the_share_that_is_clipped() -> None:
    observers, coverage = ObserverSet(1), Coverage(1)
    x = torch.arange(1, 1001, dtype=torch.float32).reshape(1, 10, 100)
    observers.observe(U, x)
    coverage.observe(U, x)
    for absmax, clipped in ((1000.0, 0.0), (900.0, 0.1), (500.0, 0.5)):
        report = coverage_report(observers, coverage, dict.fromkeys(observers, absmax))
        assert {row.site: row for row in report.sites}[U].clipped == pytest.approx(clipped, abs=0.003)


def test_what_is_stored_is_read_back() -> None:
    _, coverage = observed([1.0, 3.0, 2.0])
    restored = Coverage.from_arrays(coverage.arrays(), 1)
    assert restored.samples == coverage.samples
    arrays = coverage.arrays()
    for change, message in (
        ({f"{LAST}.sample_absmax": None}, "got no array"),
        ({"layers.7.x.sample_absmax": np.zeros(1, np.float32)}, "an unknown array"),
        ({f"{LAST}.sample_absmax": np.zeros(1, np.float64)}, "wrong"),
        ({f"{LAST}.sample_absmax": np.array([np.nan], np.float32)}, "wrong"),
        ({f"{LAST}.sample_absmax": np.array([-1.0], np.float32)}, "wrong"),
        ({f"{LAST}.sample_absmax": np.zeros((1, 1), np.float32)}, "wrong"),
    ):
        damaged = {name: array for name, array in (arrays | change).items() if array is not None}
        with pytest.raises(ArtifactError, match=message):
            Coverage.from_arrays(damaged, 1)
    with pytest.raises(UsageError, match="do not merge"):
        coverage.merge(Coverage(2))


def test_the_artifact_and_the_report_say_the_same(tmp_path: Path) -> None:
    report = calibrated(tmp_path)
    artifact = read_calibration(report.path)
    assert coverage_of(artifact) == report.coverage
    assert report.coverage is not None and report.coverage.samples == 32
    for row in report.coverage.sites:
        record = artifact.manifest.sites[row.site]
        assert (row.observations, row.absmax) == (record.observations, record.absmax)
        kind = SITES[row.site.rpartition(".")[2]].observer
        assert (row.clipped == 0.0) == (kind is ObserverKind.MINMAX), row
        assert max(artifact.coverage[f"{row.site}.sample_absmax"]) == row.observed


def as_version_1(path: Path) -> None:
    """What the first version of the format held of the same calibration."""
    manifest = read_calibration_manifest(path)
    tensors = {name: rows for name, rows in manifest.tensors.items() if name != COVERAGE}
    (path / COVERAGE).unlink()
    old = manifest.sealed(format_version=1, tensors=tensors)
    (path / MANIFEST).write_text(old.to_json())
    assert "shard" not in json.loads(old.to_json())


def test_an_artifact_of_version_1_is_read(tmp_path: Path) -> None:
    report = calibrated(tmp_path)
    export(ExportOptions(out=tmp_path / "new", workdir=tmp_path))
    as_version_1(report.path)
    artifact = read_calibration(report.path)
    assert artifact.manifest.format_version == 1 and artifact.coverage == {}
    assert {row.growth for row in coverage_of(artifact).sites} == {None}
    done("inspect", report.path, cwd=tmp_path)
    exported = export(ExportOptions(out=tmp_path / "old", workdir=tmp_path, calibration=report.path))
    assert exported.bits_per_weight > 0


def test_version_1_with_what_version_2_brought_is_refused(tmp_path: Path) -> None:
    report = calibrated(tmp_path)
    manifest = read_calibration_manifest(report.path)
    (report.path / MANIFEST).write_text(manifest.sealed(format_version=1).to_json())
    assert manifest.format_version == 2
    with pytest.raises(ArtifactError, match=r"an entry `coverage\.safetensors`"):
        read_calibration(report.path)
    (report.path / MANIFEST).write_text(manifest.to_json())
    as_version_1(report.path)
    text = (report.path / MANIFEST).read_text()
    (report.path / MANIFEST).write_text(text.replace('"sites"', '"shard":null,"sites"', 1))
    with pytest.raises(ArtifactError, match="not in canonical form"):
        read_calibration(report.path)


def test_passages_in_common() -> None:
    line = "the lamp burned low and she had not written for weeks while a calm sea lay behind her"
    texts = [f"Once, {line.upper()}!"]
    found = shared_passages(texts, [line, "too short", "another " * 20, f'"{line}," he said'])
    assert (found.documents, found.too_short, found.shared) == (4, 1, (0, 3))
    assert len(found.example.split()) == 13 and found.example in line
    # Twelve words in a row are not a passage.
    assert shared_passages(texts, [" ".join(line.split()[:12]) + " and so it went on"]).shared == ()


def test_overlap_with_a_test_text_is_a_warning(tmp_path: Path) -> None:
    rows = [json.loads(line)["text"] for line in Path(small_text()).read_text().splitlines()]
    evaluation = tmp_path / "test.jsonl"
    lines = [rows[4], "nothing of this is in the other text " * 3]
    evaluation.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = (*command_line(tmp_path / "w"), "--samples=40", f"--check-overlap={evaluation}")
    before = done(*arguments, "--dry-run", "--json", cwd=tmp_path)
    outcome = done(*arguments, cwd=tmp_path)
    assert before.json()["overlap"]["shared"] == [0]
    assert "1 of 2 evaluation documents" in outcome.out
    assert "warning: the calibration text holds passages of 1 evaluation documents" in outcome.err
    missing = (*command_line(tmp_path / "v"), "--check-overlap=none.jsonl")
    refused(qmamba(*missing, cwd=tmp_path), 1, "none.jsonl")


def test_json_has_the_coverage(tmp_path: Path) -> None:
    values = done(*command_line(tmp_path / "w"), "--json", cwd=tmp_path).json()
    coverage = values["coverage"]
    assert [row["site"] for row in coverage["sites"]] == list(site_keys(2))
    assert set(coverage) == {"sites", "samples", "growing", "wants_more_samples"}
    assert coverage["samples"] == 32


def test_a_dry_run_tells_what_it_will_need(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mamba, "forward", lambda *_, **__: pytest.fail("a dry run computes nothing"))
    report = calibrate(options(tmp_path), dry_run=True)
    estimate = report.estimate
    assert estimate is not None
    artifact = read_calibration_manifest(finished)
    assert estimate.parameters > 0 and estimate.batch == (3, 16)
    config = artifact.model.config
    head = int(config["vocab_size"] or 0) * int(config["d_model"] or 0)
    assert estimate.weight_bytes == 4 * (estimate.parameters + head * bool(config["tie_embeddings"]))
    assert estimate.memory_bytes > estimate.weight_bytes + estimate.statistics_bytes
    # Of a large vocabulary the table being rotated is the peak, not the batch.
    wide = replace(estimate, config=small_config(vocab_size=1 << 20))
    assert wide.memory_bytes == wide.weight_bytes + preparing_bytes(wide.config)
    assert estimate.seconds > 0
    assert estimate.stored_bytes == 4 * estimate.parameters and estimate.bits_per_weight == 32
    assert (estimate.config.n_layer, estimate.disk_bytes) == (2, 0)
    half = calibrate(options(tmp_path, shard=(1, 2)), dry_run=True)
    assert half.samples == 15 and half.path.name == "calibration-1-of-2"
    assert tree(tmp_path) == {}
    outcome = done(*command_line(tmp_path / "w"), "--dry-run", cwd=tmp_path)
    for part in ("parameters", "memory", "estimate", "3 x 16 tokens", "2 layers", "32.00 bits per weight"):
        assert part in outcome.out
    assert tree(tmp_path) == {}


def test_a_dry_run_counts_the_text_that_a_large_model_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose blocks wait on the disk; every one of several processes writes all of it."""
    monkeypatch.setattr(streaming, "STREAM_ABOVE_BYTES", 0)
    for kind in ("product", "exponential", "rotated", "hashed", "copied"):
        monkeypatch.setattr(Trials, kind, 1e-9)
    monkeypatch.setattr(Trials, "read", lambda *_: 1e-9)
    read, own = (calibrate(options(tmp_path, **asked), dry_run=True).estimate for asked in ({}, SELF))
    assert read is not None and own is not None
    assert own.disk_bytes == weight_bytes(own.config) and read.disk_bytes == 0
    assert own.writing_bytes == spooled_bytes(own.config, 32) > read.writing_bytes == 0
    assert own.memory_bytes == max(read.memory_bytes, own.writing_bytes)
    assert own.seconds > read.seconds
    shard = calibrate(options(tmp_path, shard=(1, 2), **SELF), dry_run=True).estimate
    assert shard is not None and own.seconds / 2 < shard.seconds < own.seconds
    outcome = done(*command_line(tmp_path / "w"), "--dataset=self", "--dry-run", cwd=tmp_path)
    assert "disk" in outcome.out
