"""The best recipe through calibrate and export: what it promises, records and refuses."""

import json
from pathlib import Path

import pytest
from calibrations import calibrated, small_text

from qmamba_cli.artifacts.quantized import read_quantized
from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.modes import DEFAULT_MODE, MODES
from qmamba_cli.resources import calib_data_path
from qmamba_cli.sites import ObserverKind
from qmamba_cli.stages.calibrate import CalibrateOptions, calibrate
from qmamba_cli.stages.export import ExportOptions, export
from qmamba_cli.stages.run import ModelOptions, TaskOptions, load_model, run_task


def exported(workdir: Path, name: str, *, method: str = "best", **recipe: object) -> Path:
    out = workdir / name
    export(ExportOptions(out=out, workdir=workdir, recipe=Recipe(method=method, **recipe), device="cpu"))
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("recipes")
    calibrated(workdir)
    return workdir


@pytest.mark.parametrize("bits", [4, 8])
def test_identical_inputs_give_identical_files(small: Path, bits: int) -> None:
    first, second = (exported(small, f"{name}-{bits}", w_bits=bits, group_size=16) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    plain = exported(small, f"plain-{bits}", method="plain", w_bits=bits, group_size=16)
    ours, theirs = (read_quantized(path) for path in (first, plain))
    # The formats are the same: names, dtypes, shapes, and so the size and the kernels.
    assert {name: ours.info(name) for name in ours.names} == {
        name: theirs.info(name) for name in theirs.names
    }


def test_the_manifest_says_how_the_scales_were_chosen(small: Path) -> None:
    artifact = read_quantized(exported(small, "recorded", w_bits=8))
    for key, record in artifact.manifest.sites.items():
        assert record.observer is ObserverKind.LEAST_ERROR and record.alpha is None, key
    scales = artifact.numpy("scales.x_proj:input")
    absmax = artifact.manifest.sites["layers.0.x_proj:input"].absmax
    assert scales[0] == pytest.approx(absmax / 127)


def test_an_ignored_projection_keeps_eight_bits(small: Path) -> None:
    artifact = read_quantized(
        exported(small, "ignored", w_bits=4, group_size=16, ignore=(r"layers\.0\.in_proj",))
    )
    schemes = artifact.manifest.quantization.weights
    assert schemes["layers.0.in_proj"] == "w8-row" and schemes["layers.0.out_proj"] == "w4-g16-gptq"
    assert "layers.0.in_proj.multiplier" not in artifact.names
    assert "layers.0.out_proj.multiplier" in artifact.names


def test_alpha_and_unknown_recipes_are_refused(small: Path) -> None:
    with pytest.raises(UsageError, match="--alpha"):
        export(ExportOptions(out=small / "x", workdir=small, recipe=Recipe(method="best"), alpha=0.999))
    with pytest.raises(UsageError, match="expected one of plain, best"):
        Recipe(method="finest")
    assert not (small / "x").exists()


def test_another_text_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    rows = Path(small_text()).read_text().splitlines()
    text.write_text("\n".join(rows) + "\n")
    calibrated(tmp_path, dataset=str(text))
    first = json.loads(rows[0])["text"]
    text.write_text("\n".join([json.dumps({"text": f"{first} more"}), *rows[1:]]) + "\n")
    with pytest.raises(ArtifactError, match="not the one that was observed"):
        exported(tmp_path, "out", w_bits=4)
    assert not (tmp_path / "out").exists()
    # Eight bits need the histograms alone.
    text.unlink()
    assert exported(tmp_path, "out", w_bits=8).is_file()


def test_it_pays_on_the_bundled_model(tmp_path: Path) -> None:
    calibrate(CalibrateOptions(model="demo", workdir=tmp_path, samples=16, seqlen=128))
    task = TaskOptions(
        task="perplexity", data=calib_data_path("lastword.jsonl"), limit=4, seqlen=128, baseline="demo"
    )
    kl = {}
    for method, bits in (("plain", 8), ("best", 8), ("plain", 4), ("best", 4)):
        out = exported(tmp_path, f"{method}-{bits}", method=method, w_bits=bits)
        results, _ = run_task(load_model(ModelOptions(mode=MODES[DEFAULT_MODE], checkpoint=out)), task)
        kl[method, bits] = results["results"]["perplexity"]["kl,none"]
    assert kl["best", 8] < 0.85 * kl["plain", 8]
    assert kl["best", 4] < 0.85 * kl["plain", 4]
