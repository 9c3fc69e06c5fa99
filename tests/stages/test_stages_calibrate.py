"""The calibrate stage: what is observed, in what pieces, and what is on disk when it is killed."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from command_line import environment, model_folder, tree

from qmamba_cli.artifacts.calibration import CalibrationArtifact, read_calibration
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import QmambaError
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.quant.observers import Reduction
from qmamba_cli.sites import SITES, ObserverKind
from qmamba_cli.stages.calibrate import CalibrateOptions, CalibrateReport, calibrate

# Goes with the process.
_FOLDER = tempfile.TemporaryDirectory(prefix="qmamba-tests-")


@cache
def small_model() -> str:
    """Folder of a random model of two layers: what is tested here does not depend on its size."""
    folder = Path(_FOLDER.name) / "model"
    return str(model_folder(folder))


def calibrated(workdir: Path, **changes: Any) -> tuple[CalibrateReport, CalibrationArtifact]:
    options = {"model": small_model(), "samples": 6, "seqlen": 32, "batch_size": 4, **changes}
    report = calibrate(CalibrateOptions(workdir=workdir, **options))
    return report, read_calibration(report.path)


def kind_of(site: str) -> ObserverKind:
    return SITES[site.rpartition(".")[2]].observer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three rows of text, long enough for windows of 32 tokens."""
    path = tmp_path / "text.jsonl"
    rows = ("It was late, and the lamp burned low. ", "She had not written for weeks. ", "The sea was calm. ")
    lines = [json.dumps({"text": "no", "body": row * 8}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_report_is_what_was_written(tmp_path: Path) -> None:
    report, artifact = calibrated(tmp_path)
    assert report.path == tmp_path / "calibration"
    assert report.digest == artifact.digest == artifact.manifest.content_digest
    assert report.sites == len(artifact.scales) == 2 * 7 + 1
    assert (report.samples, report.tokens) == (6, 6 * 32)
    dataset = artifact.manifest.dataset
    assert (dataset.samples, dataset.tokens, len(dataset.sample_ids)) == (6, 192, 6)
    assert artifact.manifest.model.source == small_model()
    assert report.widest_clip is not None
    site, absmax, observed = report.widest_clip
    assert kind_of(site) is ObserverKind.PERCENTILE
    assert absmax == artifact.manifest.sites[site].absmax < observed


def test_the_work_folder_records_it(tmp_path: Path) -> None:
    report, _ = calibrated(tmp_path)
    record = Workdir(tmp_path).resolve_calibration()
    assert (record.path.resolve(), record.digest) == (report.path.resolve(), report.digest)
    assert Workdir(tmp_path).last_export() is None


def test_reductions_touch_the_percentile_sites_only(tmp_path: Path) -> None:
    found = {
        reduction: calibrated(tmp_path / reduction, reduction=reduction)[1].manifest
        for reduction in Reduction
    }
    assert {str(reduction): manifest.reduction for reduction, manifest in found.items()} == {
        "global": "global",
        "mean": "mean",
        "ema": "ema",
    }
    for site, record in found[Reduction.GLOBAL].sites.items():
        absmaxes = {manifest.sites[site].absmax for manifest in found.values()}
        assert len(absmaxes) == (3 if kind_of(site) is ObserverKind.PERCENTILE else 1), site
        assert record.observations == found[Reduction.EMA].sites[site].observations


def test_alpha_one_clips_nothing(tmp_path: Path) -> None:
    assert calibrated(tmp_path, alpha=1.0)[0].widest_clip is None


def test_memory_holds_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward pass sees more rows than one batch, and together they see each sample once."""
    shapes: list[tuple[int, ...]] = []
    forward = Mamba.forward

    def spy(self: Mamba, ids: Any, *rest: Any, **options: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return forward(self, ids, *rest, **options)

    monkeypatch.setattr(Mamba, "forward", spy)
    calibrated(tmp_path, samples=7, batch_size=3)
    assert shapes == [(3, 32), (3, 32), (1, 32)]


def test_statistics_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    one, four = (calibrated(tmp_path / str(size), batch_size=size)[1].manifest for size in (1, 4))
    assert one.dataset.sample_ids == four.dataset.sample_ids
    for site, record in one.sites.items():
        assert record.observations == four.sites[site].observations, site
        # Float sums differ in order by the batch; a quantile also by the neighbour it falls on.
        assert record.absmax == pytest.approx(four.sites[site].absmax, rel=1e-4), site


def test_equal_options_give_equal_bytes_and_the_seed_changes_the_choice(tmp_path: Path) -> None:
    first, again, other = (
        calibrated(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert tree(first[0].path) == tree(again[0].path)
    assert first[1].manifest.dataset.sample_ids != other[1].manifest.dataset.sample_ids
    _, in_order = calibrated(tmp_path / "d", shuffle=False)
    assert in_order.manifest.dataset.sample_ids == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_text_of_ones_own(tmp_path: Path, text: Path, suffix: str) -> None:
    if suffix == ".txt":
        text = text.rename(text.with_suffix(".txt"))
    samples = 3 if suffix == ".jsonl" else 1
    _, artifact = calibrated(
        tmp_path / "w", dataset=str(text), samples=samples, text_column="body", shuffle=False
    )
    dataset = artifact.manifest.dataset
    assert dataset.dataset == str(text)
    assert dataset.digest == sha256(text.read_bytes()).hexdigest()
    assert dataset.tokens == 32 * samples


def test_text_of_the_model_itself(tmp_path: Path) -> None:
    options = {"dataset": "self", "samples": 3, "seqlen": 12}
    first, again, other = (
        calibrated(tmp_path / name, seed=seed, **options) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first[1].manifest.dataset.dataset == "self"
    assert first[1].manifest.dataset.text_column is None
    assert first[0].digest == again[0].digest != other[0].digest
    assert first[1].manifest.dataset.digest != other[1].manifest.dataset.digest


def test_progress_counts_every_sample(tmp_path: Path) -> None:
    opened: list[tuple[str, int, list[int]]] = []

    @contextlib.contextmanager
    def progress(description: str, total: int) -> Iterator[Any]:
        steps: list[int] = []
        opened.append((description, total, steps))
        yield steps.append

    options = CalibrateOptions(model=small_model(), workdir=tmp_path, samples=5, seqlen=16, batch_size=2)
    calibrate(options, progress=progress)
    assert opened == [("calibrating", 5, [2, 2, 1])]


@pytest.mark.parametrize("dataset", ["bundled", "self"])
def test_a_dry_run_checks_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    monkeypatch.setattr(Mamba, "forward", lambda *_: pytest.fail("a dry run computes nothing"))
    options = CalibrateOptions(
        model=small_model(), workdir=tmp_path / "w", samples=5, seqlen=16, dataset=dataset
    )
    report = calibrate(options, dry_run=True)
    assert (report.digest, report.sites, report.tokens) == ("", 15, 80)
    assert tree(tmp_path) == {}


def test_nothing_is_replaced_without_force(tmp_path: Path) -> None:
    first, _ = calibrated(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(QmambaError, match="already exists"):
        calibrated(tmp_path, seed=1)
    assert tree(tmp_path) == before
    second, _ = calibrated(tmp_path, seed=1, force=True)
    assert second.digest != first.digest
    assert Workdir(tmp_path).resolve_calibration().digest == second.digest
    assert set(tree(tmp_path)) == set(before)


def test_another_model_than_the_demo(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", d_model=96, conv_bias=False, tie_embeddings=False)
    report, artifact = calibrated(tmp_path / "w", model=str(folder))
    assert report.sites == 2 * 7 + 1
    assert artifact.manifest.model.source == str(folder)


# Runs a calibration in which the process ends itself, as by the out-of-memory killer, at a chosen call.
KILLED = """
import os, signal, sys
from pathlib import Path
from qmamba_cli.artifacts import files
from qmamba_cli.stages.calibrate import CalibrateOptions, calibrate

where, model, workdir = sys.argv[1:]
owner, name, fatal_call = {
    "write": (files, "_sync", 2),
    "swap": (Path, "rename", 2),
}[where]
original, calls = getattr(owner, name), 0

def counted(*arguments, **options):
    global calls
    calls += 1
    if calls == fatal_call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

setattr(owner, name, counted)
calibrate(CalibrateOptions(
    model=model, workdir=Path(workdir), samples=4, seqlen=16, batch_size=2, seed=9, force=True))
"""


@pytest.mark.parametrize("where", ["write", "swap"])
def test_a_killed_process_leaves_the_old_artifact(tmp_path: Path, where: str) -> None:
    old, _ = calibrated(tmp_path, samples=2, seqlen=16)
    before = tree(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, where, small_model(), str(tmp_path)],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    # Between the two renames the old folder has another name for an instant; who reads next puts it back.
    assert Workdir(tmp_path).resolve_calibration().digest == old.digest
    assert read_calibration(tmp_path / "calibration").digest == old.digest
    new, _ = calibrated(tmp_path, samples=2, seqlen=16, seed=1, force=True)
    assert Workdir(tmp_path).resolve_calibration().digest == new.digest
    # The next writer has cleared what the killed one left.
    assert set(tree(tmp_path)) == set(before)
