"""`sensitivity`: fake quantization is mode 0's arithmetic, costs are ranked, files are whole."""

import csv
import json

import jsonschema
import pytest
import torch
from command_line import artifacts, done, model_folder, qmamba, refused, refused_in
from html_checks import checked_page
from random_models import random_checkpoint, random_ids, small_config

from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.artifacts.quantized import read_quantized
from qmamba_cli.evaluation.batches import window_batches
from qmamba_cli.evaluation.divergence import compare_with_float
from qmamba_cli.evaluation.sensitivity import Target, alone
from qmamba_cli.kernels.backend import CPU
from qmamba_cli.kernels.selective_scan.reference import CHUNK
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.modes import MODES
from qmamba_cli.quant.observers import ObserverSet
from qmamba_cli.resources import calib_data_path
from qmamba_cli.sites import SSM_STATE, site_key
from qmamba_cli.stages.export import ExportOptions, export
from qmamba_cli.stages.fake_quantized import (
    ACTIVATIONS,
    BLOCK_WEIGHTS,
    PARTS,
    TABLES,
    activation_targets,
    fake_quantizer,
    part_targets,
    per_token,
    per_token_targets,
    weight_targets,
)
from qmamba_cli.stages.load import stored_scales
from qmamba_cli.stages.run import ModelOptions, load_model

LOUDER = {"x_proj.weight": 12.0, "dt_proj.weight": 4.0, "A_log": 0.2}
LENGTH = 2 * CHUNK + 5
TEXT = str(calib_data_path("lastword.jsonl"))
EVERYTHING = [*activation_targets(), *weight_targets()]

VIEWS = ("sites", "parts", "leave_one_out", "per_token")
NUMBER = {"type": ["number", "string"]}
ROW = {
    "type": "object",
    "required": ["site", "layer", "kl", "kl_ci", "delta_ll", "share", "sqnr_db", "clip_rate"],
    "properties": {
        "site": {"enum": [*ACTIVATIONS, *BLOCK_WEIGHTS, TABLES, "every activation"]},
        "part": {"enum": [part for parts in PARTS.values() for part in parts]},
        "layer": {"type": ["integer", "null"]},
        # The terms of a divergence near 0 cancel in float32.
        "kl": {"type": "number", "minimum": -1e-6},
        "kl_ci": {"type": ["array", "null"], "items": NUMBER, "minItems": 2, "maxItems": 2},
        "delta_ll": {"type": "number"},
        "share": {"type": "number"},
        "sqnr_db": {"type": ["number", "null"]},
        "clip_rate": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "gain": {"type": "number"},
        "gain_ci": {"type": ["array", "null"], "items": NUMBER, "minItems": 2, "maxItems": 2},
    },
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "required": [
        "sites",
        "parts",
        "leave_one_out",
        "per_token",
        "everything",
        "histograms",
        "n",
        "interval",
        "qmamba",
    ],
    "properties": {
        "sites": {"type": "array", "items": ROW, "minItems": 1},
        "parts": {"type": "array", "items": ROW},
        "leave_one_out": {"type": "array", "items": ROW},
        "per_token": {"type": "array", "items": ROW},
        "everything": {"type": "object", "required": ["kl", "kl_ci", "delta_ll"]},
        "n": {"type": "object", "required": ["documents", "original", "tokens"]},
    },
}


class Subject:
    """A random model of two layers with the scales of the very tokens it is judged on."""

    def __init__(self):
        config = small_config(d_model=64)
        # At its start a model hardly uses its scan; larger B, C, dt and slower decay make every site matter.
        tensors = {
            name: tensor * LOUDER.get(name.rpartition("mixer.")[2], 1.0)
            for name, tensor in random_checkpoint(config).items()
        }
        self.ids = random_ids(config.vocab_size, 3, LENGTH, seed=1)
        observers = ObserverSet(config.n_layer)
        Mamba(float_model(config, tensors.__getitem__), MODES["fp"], CPU).forward(
            self.ids, hook=observers.observe
        )
        self.scales = observers.scales()
        self.config, self.load = config, tensors.__getitem__
        self.batches = window_batches(self.ids, batch_size=3)

    def quantizer(self, **changed):
        scales = {**self.scales, **changed}
        return fake_quantizer(self.config, self.load, Recipe(w_bits=8), scales, CPU)

    def hidden(self, *targets):
        return self.quantizer().model(targets).hidden(self.ids)


@pytest.fixture(scope="module")
def subject():
    return Subject()


def test_without_a_target_it_is_the_float_model(subject):
    quantizer = subject.quantizer()
    model, baseline = quantizer.model([]), quantizer.float_model()
    assert torch.equal(model.hidden(subject.ids), baseline.hidden(subject.ids))
    (outcome,) = compare_with_float(baseline, [model], subject.batches)
    assert outcome.kl_mean == 0 and outcome.delta_ll_mean == 0


@pytest.mark.parametrize("target", EVERYTHING, ids=lambda target: target.label)
def test_every_target_changes_the_model(subject, target):
    assert not torch.equal(subject.hidden(target), subject.hidden())


@pytest.mark.parametrize("site", ACTIVATIONS)
def test_a_terrible_scale_ranks_first(subject, site):
    key = site_key(site, 1)
    quantizer = subject.quantizer(**{key: 50 * subject.scales[key]})
    targets = [*activation_targets(0), *activation_targets(1), *weight_targets(1)]
    models = [quantizer.model([target]) for target in targets]
    outcomes = compare_with_float(quantizer.float_model(), models, subject.batches)
    rows = alone(dict(zip(targets, outcomes, strict=True)), {}, 2)
    assert rows[0].target == Target(site=site, layer=1)


def test_all_layers_at_once_are_each_layer(subject):
    layered = [
        target for layer in range(2) for target in (*activation_targets(layer), *weight_targets(layer))
    ]
    assert torch.equal(subject.hidden(*EVERYTHING), subject.hidden(*layered, Target(site=TABLES)))


def test_the_parts_of_a_tensor_are_the_tensor(subject):
    for site in PARTS:
        parts = [target for target in part_targets() if target.site == site]
        assert len(parts) > 1
        assert torch.equal(subject.hidden(*parts), subject.hidden(Target(site=site)))
        for part in parts:
            others = [other for other in parts if other != part]
            assert not torch.equal(subject.hidden(*others), subject.hidden(*parts))


def test_one_scale_a_token_is_that_of_the_largest_channel(subject):
    """By hand: the largest magnitude of a token is an end of its grid, and no value is clipped."""
    x = torch.tensor([[[0.5, -2.0, 0.1], [0.0, 0.0, 0.0]]])
    step = 2.0 / 127
    expected = [[[round(0.5 / step) * step, -2.0, round(0.1 / step) * step], [0.0, 0.0, 0.0]]]
    torch.testing.assert_close(per_token(x), torch.tensor(expected))
    wide = torch.cat([x, 100 * x], dim=1)
    assert torch.equal(per_token(wide)[:, :2], per_token(x)), "no token changes another"


def test_scales_a_token_belong_to_the_tensors_that_are_named(subject):
    quantizer, static = subject.quantizer(), subject.hidden(*EVERYTHING)
    seen = []
    for target in per_token_targets():
        assert target.site != SSM_STATE
        hidden = quantizer.model(EVERYTHING, [target]).hidden(subject.ids)
        assert not torch.equal(hidden, static), target
        assert not any(torch.equal(hidden, other) for other in seen), target
        seen.append(hidden)
    # One terrible scale changes nothing where the tensor has scales of its own.
    key = site_key("in_proj:input", 1)
    terrible = subject.quantizer(**{key: 50 * subject.scales[key]})
    own = [Target(site="in_proj:input")]
    models = [one.model(EVERYTHING, own) for one in (quantizer, terrible)]
    assert torch.equal(*(model.hidden(subject.ids) for model in models))


def test_the_state_has_a_grid_only_between_pieces(subject):
    state = Target(site=SSM_STATE)
    quantized, exact = subject.hidden(state), subject.hidden()
    assert torch.allclose(quantized[:, :CHUNK], exact[:, :CHUNK], atol=1e-6)
    assert not torch.allclose(quantized[:, CHUNK:], exact[:, CHUNK:], atol=1e-6)


def test_only_the_chosen_weight_is_replaced(subject):
    quantizer = subject.quantizer()
    weights = quantizer.model([Target(site="x_proj.weight", layer=1)])._model.weights
    base = quantizer.weights
    for layer, (block, other) in enumerate(zip(weights.blocks, base.blocks, strict=True)):
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            replaced = (layer, name) == (1, "x_proj")
            assert torch.equal(getattr(block, name).matrix, getattr(other, name).matrix) != replaced
        assert torch.equal(block.conv_weight, other.conv_weight)
    assert torch.equal(weights.embedding, base.embedding)
    assert torch.equal(weights.lm_head.matrix, base.lm_head.matrix)


def test_own_errors_match_what_replacing_does(subject):
    quantizer = subject.quantizer()
    errors, observe = quantizer.observe_errors()
    quantizer.float_model().forward(subject.ids, hook=observe)
    for site, parts in PARTS.items():
        whole = errors[Target(site=site, layer=0)]
        split = [errors[Target(site=site, layer=0, part=part)] for part in parts]
        assert whole.count == sum(error.count for error in split)
        assert whole.noise == pytest.approx(sum(error.noise for error in split))
    # MinMax on the very same tokens clips nothing; a percentile does.
    assert errors[Target(site="in_proj:input", layer=0)].clip_rate == 0
    assert 0 < errors[Target(site="x_proj:input", layer=0)].clip_rate < 0.001
    assert all(5 < error.sqnr_db < 80 for error in errors.values() if error.sqnr_db is not None)


@pytest.mark.parametrize("method", ["plain", "best"])
def test_everything_but_the_state_is_the_arithmetic_of_mode_0(tmp_path, method):
    made = artifacts()
    checkpoint = open_checkpoint("demo")
    recipe = Recipe(w_bits=8, method=method)
    out = tmp_path / "w8"
    export(ExportOptions(out=out, workdir=tmp_path, calibration=made.calibration, recipe=recipe))
    scales = stored_scales(read_quantized(out), checkpoint.config)
    assert isinstance(scales["layers.0.x_proj:input"], torch.Tensor) == (method == "best")
    quantizer = fake_quantizer(checkpoint.config, checkpoint.load, recipe, scales, CPU)
    targets = [target for target in EVERYTHING if target.site != SSM_STATE]
    ids = random_ids(checkpoint.config.vocab_size, 2, 128, seed=3)
    mode_0 = load_model(ModelOptions(mode=MODES["0"], checkpoint=out)).model
    seen = {}
    mode_0.forward(ids, hook=lambda key, tensor: seen.setdefault(key, tensor))

    def check(key, tensor):
        if key in seen and seen[key].dtype == torch.int8 and key.startswith("layers.0."):
            scale = torch.as_tensor(quantizer.scales[key])
            steps = (tensor / scale.view(-1, *(1 for _ in scale.shape))).round() - seen[key]
            assert steps.abs().max() <= 1, key
            assert (steps != 0).float().mean() < 0.001, key
            checked.add(key)

    checked = set()
    model = quantizer.model(targets)
    replace = model._replace
    model._replace = lambda key, tensor: (replace(key, tensor), check(key, tensor))
    model.hidden(ids)
    assert len(checked) == len(ACTIVATIONS) - 1
    # One flip spreads through the layers; whole models are compared by KL.
    simulated, real = compare_with_float(
        quantizer.float_model(), [model, mode_0], window_batches(ids, batch_size=2)
    )
    assert simulated.kl_mean == pytest.approx(real.kl_mean, rel=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A calibrated random model."""
    path = tmp_path_factory.mktemp("sensitivity")
    model_folder(path / "model")
    done("calibrate", "model", "--samples", 2, "--seqlen", 64, "--batch-size", 2, cwd=path)
    return path


SCORE = ("sensitivity", "--task-data", TEXT, "--limit", 2, "--seqlen", 40, "--w-bits", 8)


def test_the_json_and_the_files_say_the_same(folder):
    files = ("--output", "s.json", "--csv", "s.csv", "--html", "s.html")
    record = done(*SCORE, "--per", "both", "--per-token", "--json", *files, cwd=folder).json()
    jsonschema.validate(record, SCHEMA)
    assert json.loads((folder / "s.json").read_text()) == record
    kls = [row["kl"] for row in record["sites"]]
    assert kls == sorted(kls, reverse=True)
    keys = {(row["site"], row["layer"]) for row in record["sites"]}
    layered = {(name, layer) for name in (*ACTIVATIONS, *BLOCK_WEIGHTS) for layer in (None, 0, 1)}
    assert keys == layered | {(TABLES, None)}
    assert len(record["leave_one_out"]) == len(EVERYTHING)
    assert [row["site"] for row in record["per_token"]].count("every activation") == 1
    assert len(record["per_token"]) == len(per_token_targets()) + 1
    for row in (*record["leave_one_out"], *record["per_token"]):
        assert row["gain"] == pytest.approx(record["everything"]["kl"] - row["kl"], abs=1e-9)
    assert record["n"]["documents"] == 2 and record["n"]["tokens"] == 2 * 39
    with (folder / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(record[view]) for view in VIEWS)
    assert [float(row["kl"]) for row in rows if row["view"] == "alone"] == kls
    page = checked_page((folder / "s.html").read_text(encoding="utf-8"))
    assert len(page.find("line", "clip")) == len(record["histograms"]) == 6


def test_tables_for_people(folder):
    outcome = done(*SCORE, "--no-leave-one-out", cwd=folder)
    assert "one tensor quantized in all layers: W8A8, 2 of" in outcome.out
    assert "everything quantized but one" not in outcome.out
    assert "x_proj:input" in outcome.out and "embeddings.weight" in outcome.out


def test_last_words_are_scored_too(folder):
    record = done(
        "sensitivity", "--task", "lastword", "--limit", 3, "--no-leave-one-out", "--json", cwd=folder
    ).json()
    assert record["n"]["documents"] == 3 and record["n"]["tokens"] >= 3
    assert record["qmamba"]["seqlen"] is None


def test_another_quantile_needs_no_calibration(folder):
    options = (*SCORE, "--no-leave-one-out", "--json")

    def clipped(*alpha):
        rows = done(*options, *alpha, cwd=folder).json()["sites"]
        return next(row["clip_rate"] for row in rows if row["site"] == "x_proj:input")

    assert clipped("--alpha", 0.99) > 0.003 > clipped()


def test_refusals(folder, tmp_path):
    refused_in(folder, 2, "sensitivity", parts=("`--task perplexity` needs a text",))
    refused_in(folder, 2, *SCORE, "--per", "row", parts=("unknown `--per row`, expected one of site,",))
    refused_in(folder, 2, *SCORE, "--limit", 0, parts=("`--limit` must be at least 1, got 0",))
    refused_in(folder, 2, *SCORE, "--w-bits", 5, parts=("`--w-bits` must be 4 or 8, got 5",))
    refused_in(folder, 2, *SCORE, "--csv", "x", "--html", "x", parts=("two outputs go to one file",))
    refused_in(folder, 3, *SCORE, "--model", "demo", parts=("was made for another checkpoint",))
    refused(qmamba(*SCORE, cwd=tmp_path), 1, "calibrat")
    (folder / "kept.json").write_text("mine")
    refused_in(folder, 1, *SCORE, "--output", "kept.json", parts=("kept.json",))
