"""The export stage: one file, the same bytes each time, of the promised size and formats."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import artifacts, environment, model_folder, tree
from safetensors import safe_open
from safetensors.torch import load_file

from qmamba_cli.artifacts.quantized import read_quantized_manifest
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import ArtifactError, QmambaError
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.modes import MODES
from qmamba_cli.sites import SITES, ObserverKind
from qmamba_cli.stages.calibrate import CalibrateOptions, calibrate
from qmamba_cli.stages.export import ExportOptions, ExportReport, export
from qmamba_cli.stages.run import ModelOptions, TaskOptions, load_model, run_task


def exported(out: Path, *, dry_run: bool = False, **options: Any) -> ExportReport:
    """An export of the shared calibration; what it records goes beside ``out``."""
    recipe = Recipe(**{name: options.pop(name) for name in list(options) if name in Recipe.__slots__})
    defaults = {"workdir": out.parent / "w", "calibration": artifacts().calibration}
    return export(ExportOptions(out=out, recipe=recipe, **(defaults | options)), dry_run=dry_run)


def test_the_four_bit_demo_is_under_five_megabytes() -> None:
    assert artifacts().w4.stat().st_size < 5_000_000
    assert artifacts().w4.stat().st_size < artifacts().w8.stat().st_size


def test_the_bytes_depend_on_nothing_but_the_inputs(tmp_path: Path) -> None:
    """Another process, another hash seed, another working folder, another name of the same calibration."""
    for seed in ("4242",):
        folder = tmp_path / seed / "deeper"
        folder.mkdir(parents=True)
        command = ["export", "--out", "q.safetensors", "--calibration"]
        calibration = os.path.relpath(artifacts().calibration, folder)
        subprocess.run(
            [sys.executable, "-m", "qmamba_cli", *command, calibration],
            cwd=folder,
            env=environment(PYTHONHASHSEED=seed, OMP_NUM_THREADS="1"),
            stdout=subprocess.DEVNULL,
            check=True,
        )
        assert (folder / "q.safetensors").read_bytes() == artifacts().w4.read_bytes()
    exported(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == artifacts().w4.read_bytes()


def test_no_time_and_no_place_is_in_the_file() -> None:
    with safe_open(artifacts().w4, framework="np") as file:
        metadata = file.metadata()
    assert set(metadata) == {"qmamba"}
    assert str(artifacts().folder) not in metadata["qmamba"]
    assert (
        json.dumps(json.loads(metadata["qmamba"]), sort_keys=True, separators=(",", ":"))
        == metadata["qmamba"]
    )


def test_alpha_recomputed_is_a_calibration_at_that_alpha(tmp_path: Path) -> None:
    options = {"model": "demo", "samples": 8, "seqlen": 64, "batch_size": 4, "alpha": 0.99}
    fresh = calibrate(CalibrateOptions(workdir=tmp_path / "fresh", **options))
    exported(tmp_path / "recomputed", alpha=0.99)
    exported(tmp_path / "direct", calibration=fresh.path)
    recomputed, direct = (load_file(tmp_path / name) for name in ("recomputed", "direct"))
    assert recomputed.keys() == direct.keys()
    for name, tensor in recomputed.items():
        assert torch.equal(tensor, direct[name]), name
    manifests = [read_quantized_manifest(tmp_path / name) for name in ("recomputed", "direct")]
    assert manifests[0].sites == manifests[1].sites
    assert [manifest.quantization.alpha for manifest in manifests] == [0.99, 0.99]
    assert [manifest.calibration.alpha for manifest in manifests] == [0.9995, 0.99]
    # It does change something: the Percentile sites, and no other.
    before = load_file(artifacts().w4)
    changed = {name for name, tensor in recomputed.items() if not torch.equal(tensor, before[name])}
    percentile = {site.name for site in SITES.values() if site.observer is ObserverKind.PERCENTILE}
    assert changed == {f"scales.{name}" for name in percentile}


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"w_bits": 8},
        {"embedding_bits": 16},
        {"group_size": 64},
        {"ignore": ("embeddings", r".*out_proj")},
    ],
    ids=str,
)
def test_a_dry_run_plans_what_is_written(tmp_path: Path, recipe: dict[str, Any]) -> None:
    planned = exported(tmp_path / "q", dry_run=True, **recipe)
    assert tree(tmp_path) == {}
    real = exported(tmp_path / "q", **recipe)
    assert planned.parts == real.parts
    assert planned.bits_per_weight == real.bits_per_weight
    assert planned.digest == "" != real.digest
    assert planned.seconds > 0 == real.seconds
    fitted = exported(tmp_path / "new", dry_run=True, **recipe, method="best")
    # With 8 bits there is nothing to fit.
    assert (fitted.memory_bytes > planned.memory_bytes) == (recipe.get("w_bits") != 8)
    assert fitted.seconds > 0
    # The header comes on top of the planned data.
    assert planned.bytes == sum(part.bytes for part in real.parts)
    assert real.bytes == (tmp_path / "q").stat().st_size
    assert 0 < real.bytes - planned.bytes < 60_000


def test_sixteen_bit_embeddings(tmp_path: Path) -> None:
    report = exported(tmp_path / "q", embedding_bits=16)
    tensors = load_file(tmp_path / "q")
    assert tensors["embeddings.weight"].dtype in (torch.bfloat16, torch.float16)
    assert tensors["embeddings.weight"].shape == (8192, 256)
    part = next(part for part in report.parts if part.name.startswith("embeddings"))
    assert (part.bytes, part.bits_per_weight) == (2 * 8192 * 256, 16)
    assert read_quantized_manifest(tmp_path / "q").quantization.embedding_bits == 16


def test_ignored_modules_keep_the_finer_format(tmp_path: Path) -> None:
    exported(tmp_path / "q", ignore=(r"layers\.0\..*", "embeddings"))
    quantization = read_quantized_manifest(tmp_path / "q").quantization
    assert quantization.ignore == [r"layers\.0\..*", "embeddings"]
    assert quantization.weights["layers.0.in_proj"] == quantization.weights["layers.0.out_proj"] == "w8-row"
    assert quantization.weights["layers.1.in_proj"] == "w4-g128"
    assert quantization.weights["embeddings"] == "16-bit"
    tensors = load_file(tmp_path / "q")
    assert tensors["layers.0.in_proj.qweight"].dtype == torch.int8
    assert tensors["layers.1.in_proj.qweight"].dtype == torch.uint8


def test_the_file_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone in a folder, with the demo model out of reach, it still runs."""
    shutil.copy(artifacts().w4, tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qmamba_cli.stages.load.open_checkpoint", lambda *_, **__: pytest.fail("opened"))
    loaded = load_model(ModelOptions(mode=MODES["0"], checkpoint=Path("alone")))
    results, _ = run_task(loaded, TaskOptions(task="lastword", limit=1))
    assert results["qmamba"]["artifact"]["digest"] == read_quantized_manifest(artifacts().w4).content_digest


def test_provenance(tmp_path: Path) -> None:
    manifest = read_quantized_manifest(artifacts().w4)
    assert manifest.model.source == "demo"
    assert manifest.calibration.dataset.samples == 8
    assert set(manifest.created_by) >= {"python", "torch", "safetensors", "qmamba-cli"}
    assert Workdir(artifacts().folder / "qmamba-artifacts").last_export().digest == manifest.content_digest


def test_nothing_is_replaced_without_force(tmp_path: Path) -> None:
    first = exported(tmp_path / "q")
    before = tree(tmp_path)
    with pytest.raises(QmambaError, match="already exists"):
        exported(tmp_path / "q", w_bits=8)
    assert tree(tmp_path) == before
    second = exported(tmp_path / "q", w_bits=8, force=True)
    assert second.digest != first.digest
    assert set(tree(tmp_path)) == set(before)
    assert Workdir(tmp_path / "w").resolve_export().digest == second.digest


def test_a_calibration_replaced_behind_the_records_back_is_stale(tmp_path: Path) -> None:
    options = {"model": "demo", "samples": 2, "seqlen": 16}
    calibrate(CalibrateOptions(workdir=tmp_path / "w", **options))
    calibrate(CalibrateOptions(workdir=tmp_path / "other", seed=1, **options))
    shutil.rmtree(tmp_path / "w" / "calibration")
    shutil.move(tmp_path / "other" / "calibration", tmp_path / "w" / "calibration")
    with pytest.raises(ArtifactError, match="is not the calibration on record"):
        export(ExportOptions(out=tmp_path / "q", workdir=tmp_path / "w"))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "sizes",
    [
        {"d_model": 96, "tie_embeddings": False, "conv_bias": False, "dt_rank": 5},
        {"d_model": 32, "d_inner": 88, "d_conv": 3, "n_layer": 1, "proj_bias": True},
    ],
    ids=["ragged-untied", "odd-width-biased"],
)
@pytest.mark.parametrize("w_bits", [4, 8])
def test_models_of_awkward_shapes(tmp_path: Path, sizes: dict[str, Any], w_bits: int) -> None:
    """Calibrate, export and run in every quantized mode; KL to the float model is that of a sound file."""
    model = str(model_folder(tmp_path / "model", **sizes))
    workdir = tmp_path / "w"
    calibrate(CalibrateOptions(model=model, workdir=workdir, samples=4, seqlen=48))
    report = export(ExportOptions(out=tmp_path / "q", workdir=workdir, recipe=Recipe(w_bits=w_bits)))
    assert report.bytes == (tmp_path / "q").stat().st_size
    (tmp_path / "t.txt").write_text("It was late, and the lamp burned low; nobody had come. " * 12)
    task = TaskOptions(task="perplexity", data=tmp_path / "t.txt", seqlen=64, limit=2, baseline=model)
    for mode in MODES.values():
        if mode.name != "fp":
            results, _ = run_task(load_model(ModelOptions(mode=mode, workdir=workdir)), task)
            assert 0 < results["results"]["perplexity"]["kl,none"] < 0.05, mode.name
