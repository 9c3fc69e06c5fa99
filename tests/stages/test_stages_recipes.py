"""The best recipe through calibrate and export: what it promises, records and refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrations import calibrated, small_text
from command_line import done, qmamba, refused
from test_stages_coverage import as_version_1

from qmamba_cli.artifacts.calibration import read_calibration
from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.artifacts.quantized import read_quantized, write_quantized
from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.html.artifacts import quantized_blocks
from qmamba_cli.html.page import Text
from qmamba_cli.kernels.backend import CPU
from qmamba_cli.model.block import block_forward
from qmamba_cli.model.prepare import float_model
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.modes import DEFAULT_MODE, MODES
from qmamba_cli.quant.observers import ObserverSet, Reduction
from qmamba_cli.resources import calib_data_path
from qmamba_cli.sites import ObserverKind
from qmamba_cli.stages.calibrate import CalibrateOptions, calibrate
from qmamba_cli.stages.export import ExportOptions, export
from qmamba_cli.stages.inspect import inspect
from qmamba_cli.stages.recipes import FittedBlocks, best_scales
from qmamba_cli.stages.run import ModelOptions, TaskOptions, load_model, run_task


def exported(workdir: Path, name: str, *, method: str = "best", **recipe: object) -> Path:
    out = workdir / name
    asked = Recipe(method=method, **recipe)
    export(ExportOptions(out=out, workdir=workdir, recipe=asked, device="cpu", force=True))
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
    # The formats are the same: names, dtypes, shapes, and so the size and the kernels, but for u's scales.
    forms, plain_forms = ({name: file.info(name) for name in file.names} for file in (ours, theirs))
    assert plain_forms.pop("scales.x_proj:input").shape == (2,)
    assert forms.pop("scales.x_proj:input").shape == (2, 64)
    assert forms == plain_forms


def test_the_manifest_says_how_the_scales_were_chosen(small: Path) -> None:
    artifact = read_quantized(exported(small, "recorded", w_bits=8))
    assert artifact.manifest.quantization.recipe == "best"
    for key, record in artifact.manifest.sites.items():
        of_u = key.endswith("x_proj:input")
        assert record.observer is (ObserverKind.MINMAX if of_u else ObserverKind.LEAST_ERROR), key
        assert record.alpha is None
    absmax = artifact.manifest.sites["layers.1.out_proj:input"].absmax
    assert artifact.numpy("scales.out_proj:input")[1] == pytest.approx(absmax / 127)
    plain = read_quantized(exported(small, "recorded-plain", method="plain", w_bits=8))
    assert plain.manifest.quantization.recipe == "plain"


def test_every_channel_of_u_has_the_scale_that_holds_its_largest_value(small: Path) -> None:
    artifact = read_quantized(exported(small, "channels", w_bits=8))
    coverage = read_calibration(small / "calibration").coverage
    for layer, scales in enumerate(artifact.numpy("scales.x_proj:input")):
        largest = coverage[f"layers.{layer}.x_proj:input.channel_absmax"]
        assert np.array_equal(scales, np.clip(largest / np.float32(127), 1e-6, 1e4).astype(np.float32))
        assert artifact.manifest.sites[f"layers.{layer}.x_proj:input"].absmax == largest.max()
    # x_proj's stored columns hold them: dequantized and divided by them it is the plain recipe's, nearly.
    plain = read_quantized(exported(small, "channels-plain", method="plain", w_bits=8))
    real, expected = (
        file.tensor("layers.0.x_proj.qweight").double()
        * file.tensor("layers.0.x_proj.scale").double()[:, None]
        for file in (artifact, plain)
    )
    scales = artifact.tensor("scales.x_proj:input")[0].double()
    half_a_step = artifact.tensor("layers.0.x_proj.scale").double()[:, None] / 2 / scales
    half_a_step += plain.tensor("layers.0.x_proj.scale").double()[:, None] / 2
    assert bool(((real / scales - expected).abs() <= 1.001 * half_a_step).all())


def test_what_looks_at_a_file_shows_the_recipe_and_the_channels(small: Path) -> None:
    plain, best = (
        exported(small, f"shown-{method}", method=method, w_bits=8) for method in ("plain", "best")
    )
    shown = done("inspect", best, cwd=small).out
    assert "best recipe" in shown and shown.count("minmax, each of 64") == 2
    assert "each of" not in done("inspect", plain, cwd=small).out
    changes = done("diff", plain, best, "--json", cwd=small).json()
    assert {"name": "quantization.recipe", "a": "plain", "b": "best"} in changes["options"]
    (scales,) = (row for row in changes["tensors"] if row["name"] == "scales.x_proj:input")
    assert (scales["change"], scales["a"], scales["b"]) == ("form", "F32 [2]", "F32 [2, 64]")
    (text,) = (block.text for block in quantized_blocks(inspect(best).to_dict()) if isinstance(block, Text))
    assert "W8A8, best recipe" in text and "a scale for each of 64 channels" in text


def test_another_quantile_is_refused_where_every_channel_has_a_scale(small: Path) -> None:
    best = exported(small, "swept", w_bits=8)
    asked = ("compare", "--checkpoint", best, "--workdir", small, "--task", "lastword", "--limit", 2)
    refused(qmamba(*asked, "--alpha", "0.999", cwd=small), 2, "one clip for all channels of u")
    # The weights are quantized anew with the columns that the file's scales ask for.
    model = read_quantized(best).manifest.model.source
    coarse = exported(small, "swept-4", w_bits=4, group_size=128)
    rest = (*asked[3:], "--modes", "0", "--baseline", model, "--json")
    finer = done("compare", "--checkpoint", coarse, *rest, "--w-bits", 8, cwd=small).json()["modes"]
    modes = done("compare", "--checkpoint", best, *rest, cwd=small).json()["modes"]
    assert finer["0+w_bits=8"]["kl_mean"] == modes["0"]["kl_mean"]


def test_a_calibration_of_version_1_gives_one_scale_and_says_so(tmp_path: Path) -> None:
    report = calibrated(tmp_path)
    options = ExportOptions(out=tmp_path / "new", workdir=tmp_path, recipe=Recipe(method="best", w_bits=8))
    assert export(options).notes == ()
    as_version_1(report.path)
    old = replace(options, out=tmp_path / "old", calibration=report.path)
    (note,) = export(old).notes
    assert "one scale, not one a channel" in note
    artifact = read_quantized(old.out)
    assert artifact.numpy("scales.x_proj:input").shape == (2,)
    assert artifact.manifest.sites["layers.0.x_proj:input"].observer is ObserverKind.LEAST_ERROR
    assert note in done(
        "export",
        "--recipe",
        "best",
        "--w-bits",
        8,
        "--calibration",
        report.path,
        "--workdir",
        tmp_path,
        "--out",
        tmp_path / "again",
        cwd=tmp_path,
    ).err.replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :50], r"is torch\.float32 \[2, 50\], expected torch\.float32 \[2\] or \[2, 64\]"),
        (lambda x: x.to(torch.float64), r"is torch\.float64"),
        (lambda x: x * 0, "holds a scale that is none"),
        (lambda x: x * 1e9, r"in 1e-06 \.\.\. 10000\.0"),
    ],
)
def test_scales_that_are_none_are_refused(small: Path, tmp_path: Path, change, message: str) -> None:
    artifact = read_quantized(exported(small, "to-break", w_bits=8))
    tensors = {name: artifact.tensor(name).clone() for name in artifact.names}
    tensors["scales.x_proj:input"] = change(tensors["scales.x_proj:input"])
    out = tmp_path / "broken"
    write_quantized(out, tensors=tensors, files=artifact.files, manifest=artifact.manifest)
    with pytest.raises(ArtifactError, match=message):
        load_model(ModelOptions(mode=MODES[DEFAULT_MODE], checkpoint=out, backend="cpu"))


def test_every_mode_runs_with_a_scale_a_channel_and_the_equal_ones_are_equal(small: Path) -> None:
    out = exported(small, "modes", w_bits=8)
    ids = torch.arange(40).reshape(1, 40)
    hidden = {
        name: load_model(ModelOptions(mode=mode, checkpoint=out, backend="cpu")).model.forward(ids)[0]
        for name, mode in MODES.items()
        if name != "fp"
    }
    assert torch.equal(hidden["2-0"], hidden["0"])
    assert torch.equal(hidden["2-3"], hidden["2-1"]) and torch.equal(hidden["2-2"], hidden["2-1"])
    assert not torch.equal(hidden["2-4"], hidden["2-2"])


def test_tokens_are_weighed_by_the_last_residual(small: Path) -> None:
    calibration = read_calibration(small / "calibration")
    checkpoint = open_checkpoint(calibration.manifest.model.source)
    observers = ObserverSet.from_arrays(
        calibration.statistics, checkpoint.config.n_layer, alpha=0.9995, reduction=Reduction.GLOBAL
    )
    scales, _ = best_scales(observers, calibration.coverage)
    tokens = np.arange(3 * 8, dtype=np.int32).reshape(3, 8) % checkpoint.config.vocab_size
    recipe = Recipe(method="best", group_size=16)
    fitted = FittedBlocks(checkpoint.config, checkpoint.load, recipe, scales, tokens, CPU, batch_size=2)
    weights = float_model(checkpoint.config, checkpoint.load)
    residual = weights.embedding[torch.from_numpy(tokens.astype(np.int64))]
    for block in weights.blocks:
        residual, _ = block_forward(
            block, MODES["fp"], CPU, residual, None, norm_eps=checkpoint.config.norm_eps
        )
    wanted = 1 / (residual.square().mean(dim=-1, keepdim=True) + checkpoint.config.norm_eps)
    got = torch.cat(fitted._roots).square()
    assert torch.allclose(got, wanted / wanted.mean(), rtol=1e-4)
    assert float(got.max() / got.min()) > 1.5, "the tokens must differ"


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
