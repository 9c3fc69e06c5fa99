"""`compare`: the numbers of `run`, laws as equalities, variants, gates and their reports."""

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from command_line import artifacts, copied, done, edit_json, model_folder, qmamba, refused

from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.html.compare import groups as twins_of
from qmamba_cli.modes import MODES
from qmamba_cli.resources import calib_data_path
from qmamba_cli.stages.compare import CompareOptions, Comparison, compare
from qmamba_cli.stages.gates import junit_xml
from qmamba_cli.stages.lineup import plan_entries
from qmamba_cli.stages.run import ModelOptions, TaskOptions, load_model, run_task

LASTWORD = calib_data_path("lastword.jsonl")
TEXT = {"task": "perplexity", "data": LASTWORD, "seqlen": 32}


def comparison(**options: Any) -> Comparison:
    return compare(CompareOptions(**{"checkpoint": artifacts().w4, **options}))


@pytest.fixture(scope="module")
def words() -> Comparison:
    return comparison(limit=6, batch_size=4)


@pytest.fixture(scope="module")
def text() -> Comparison:
    return comparison(**TEXT, limit=3, batch_size=2)


def run_metrics(mode: str, **options: Any) -> dict[str, Any]:
    floating = mode == "fp"
    loaded = load_model(
        ModelOptions(
            mode=MODES[mode],
            model="demo" if floating else None,
            checkpoint=None if floating else artifacts().w4,
        )
    )
    results, _ = run_task(loaded, TaskOptions(**options))
    return dict(results["results"][options["task"]])


@pytest.mark.parametrize("mode", ["fp", "2-4"])
def test_last_words_are_those_of_run_to_the_last_digit(words: Comparison, mode: str) -> None:
    alone = run_metrics(mode, task="lastword", limit=6, batch_size=4)
    metrics = words.results["modes"][mode]
    for name in ("acc", "acc_stderr", "perplexity"):
        assert metrics[name] == alone[f"{name},none"]


@pytest.mark.parametrize("mode", ["fp", "0"])
def test_running_text_is_that_of_run_to_the_last_digit(text: Comparison, mode: str) -> None:
    alone = run_metrics(mode, **TEXT, limit=3, batch_size=2, baseline="demo")
    metrics = text.results["modes"][mode]
    names = ("acc", "top1_acc"), ("kl_mean", "kl"), ("same_top1",) * 2, ("perplexity",) * 2
    for name, of_run in (*names, ("bits_per_token",) * 2):
        assert metrics[name] == alone[f"{of_run},none"]


def test_the_laws_appear_as_equalities(words: Comparison) -> None:
    groups = twins_of(words.results)
    assert sorted(name for group in groups for name in group) == sorted(MODES)
    assert any({"0", "2-0"} <= set(group) for group in groups)
    assert any({"2-1", "2-2", "2-3"} <= set(group) for group in groups)
    assert ["fp"] in groups and len(groups) >= 4
    for pair in words.results["pairs"]:
        if pair["identical"]:
            assert pair["mcnemar_p"] is None and "identical" in pair["verdict"]


def test_keys_of_the_results(words: Comparison) -> None:
    results = words.results
    assert set(results) == {"modes", "pairs", "qmamba"}
    assert len(results["pairs"]) == 28
    assert list(results["modes"]) == ["fp", *(name for name in MODES if name != "fp")]
    for metrics in results["modes"].values():
        assert {
            *("acc", "acc_stderr", "perplexity", "bits_per_token", "tokens"),
            *("kl_mean", "kl_median", "kl_p99", "kl_max", "same_top1"),
        } <= set(metrics)
    for pair in results["pairs"]:
        assert {"a", "b", "identical", "mcnemar_p", "delta_ll", "delta_ll_ci", "verdict"} <= set(pair)
    block = results["qmamba"]
    assert block["documents"] == {"original": 224, "effective": 6}
    assert block["batch_size"] == 4 and block["task"]["task"] == "lastword"
    assert block["statistics"]["correction"].startswith("Holm")
    assert len(block["artifact"]["digest"]) == len(block["baseline"]["digest"]) == 64
    assert block["rows"]["3"]["conv_input"] == "dynamic"
    assert results["modes"]["fp"]["kl_max"] == 0 and results["modes"]["fp"]["same_top1"] == 1
    assert any("few" in note for note in words.notes)


def test_variants_are_the_models_they_are_named_after() -> None:
    """Variants equal to the file itself are left out; new weights are those of an export at those bits."""
    found = comparison(
        modes=("0",),
        changes=("conv_input=dynamic", "conv_output=fp32,scan_u=true,scan_reads=fp32"),
        alphas=(0.9995, 1.0),
        w_bits=(4, 8),
        limit=2,
        calibration=artifacts().calibration,
    )
    rows = [name for name in found.results["modes"] if name != "fp"]
    changed = ["", "+conv_input=dynamic", "+conv_output=fp32,scan_u=true,scan_reads=fp32"]
    assert rows[:6] == [f"0{change}" for change in changed] + [
        "0+alpha=1",
        "0+conv_input=dynamic,alpha=1",
    ] + ["0+conv_output=fp32,scan_u=true,scan_reads=fp32,alpha=1"]
    assert rows[6] == "0+w_bits=8" and rows[9] == "0+w_bits=8,alpha=1" and len(rows) == 12
    other = comparison(checkpoint=artifacts().w8, modes=("0",), limit=2)
    assert found.results["modes"]["0+w_bits=8"] == other.results["modes"]["0"]
    assert found.results["modes"]["0+alpha=1"] != found.results["modes"]["0"]


def test_another_alpha_is_that_of_an_export(tmp_path: Path) -> None:
    made = tmp_path / "one.safetensors"
    given = ("--calibration", artifacts().calibration, "--workdir", tmp_path / "work")
    done("export", "--out", made, "--alpha", "1", *given, cwd=tmp_path)
    whole = comparison(checkpoint=made, modes=("2-4",), limit=2)
    swept = comparison(modes=("2-4",), alphas=(1.0,), limit=2, calibration=artifacts().calibration)
    assert swept.results["modes"]["2-4+alpha=1"] == whole.results["modes"]["2-4"]


def test_what_cannot_be_computed_is_left_out_with_the_reason() -> None:
    plan = plan_entries(("0", "2-4"), ("conv_output=int8",), (), ())
    assert [entry.name for entry in plan.entries] == ["0", "2-4"]
    assert len(plan.skipped) == 1 and "int8 convolution keeps no true v" in plan.skipped[0]
    with pytest.raises(UsageError, match="int8 convolution keeps no true v"):
        plan_entries(("2-4",), ("conv_output=int8",), (), ())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"modes": ("9",)}, "unknown mode `9`"),
        ({"modes": ("fp",)}, "got no quantized mode"),
        ({"changes": ("conv_input",)}, "takes COLUMN=VALUE, got `conv_input`"),
        ({"alphas": (0.2,)}, "alpha out of range"),
        ({"w_bits": (5,)}, "must be 4 or 8, got 5"),
        ({"limit": 0}, "`--limit`: got 0"),
        ({"batch_size": 0}, "`--batch-size`: got 0"),
        ({"task": "perplexity"}, "needs a text"),
    ],
)
def test_impossible_options(options: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        comparison(**options)


def test_without_its_float_model_a_file_is_compared_all_the_same(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", n_layer=1)
    given = ("--samples", 2, "--seqlen", 16)
    done("calibrate", model, *given, cwd=tmp_path)
    done("export", "--out", "q.safetensors", cwd=tmp_path)
    options = {"checkpoint": tmp_path / "q.safetensors", "modes": ("0", "3"), "limit": 2}
    assert "kl_mean" in comparison(**options).results["modes"]["0"]
    shutil.rmtree(model)
    found = comparison(**options)
    assert list(found.results["modes"]) == ["0", "3"] and "kl_mean" not in found.results["modes"]["0"]
    assert any("no float model" in note and "--baseline MODEL" in note for note in found.notes)
    assert found.results["qmamba"]["baseline"] is None
    with pytest.raises(ArtifactError, match="another checkpoint"):
        comparison(**options, w_bits=(8,), baseline="demo")
    with pytest.raises(ArtifactError, match="needs the calibration behind"):
        comparison(**options, alphas=(1.0,), calibration=artifacts().calibration)


def test_gates_of_a_comparison(tmp_path: Path) -> None:
    command = ("compare", "--checkpoint", artifacts().w4, "--modes", "0,2-4", "--limit", 3)
    done(*command, "--output", "earlier.json", cwd=tmp_path)
    given = ("--gate", "kl<9", "--gate", "2-4:acc>=baseline", "--baseline-results", "earlier.json")
    passed = done(*command, *given, "--junit", "pass.xml", cwd=tmp_path)
    assert passed.err.count(" passed: got ") == 2
    failing = ("--gate", "kl<9", "--gate", "0:perplexity<=baseline-0.5", "--baseline", "earlier.json")
    outcome = qmamba(*command, *failing, "--junit", "j.xml", "--output", "r.json", "--json", cwd=tmp_path)
    assert outcome.code == 1
    found = outcome.json()
    assert found == json.loads((tmp_path / "r.json").read_text()), "written before the gate failed"
    perplexity = found["modes"]["0"]["perplexity"]
    expected = f"failed: got {perplexity:.6g} in mode 0, expected <= {perplexity - 0.5:.6g}"
    assert f"error: gate `0:perplexity<=baseline-0.5` {expected}" in outcome.err
    suite = ET.parse(tmp_path / "j.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "0")
    assert [case.get("name") for case in suite] == ["compare", "gate kl<9", f"gate {failing[3]}"]
    (failure,) = suite.iter("failure")
    assert expected in (failure.get("message") or "")
    passing = ET.parse(tmp_path / "pass.xml").getroot()[0]
    assert passing.get("failures") == "0" and not list(passing.iter("failure"))


def test_gates_of_a_run(tmp_path: Path) -> None:
    command = ("run", "--checkpoint", artifacts().w4, "--task", "lastword", "--limit", 2)
    done(*command, "--output", "earlier.json", cwd=tmp_path)
    done(*command, "--mode", "3", "--gate", "acc>=baseline", "--baseline", "earlier.json", cwd=tmp_path)
    outcome = qmamba(*command, "--gate", "perplexity<1", "--output", "r.json", cwd=tmp_path)
    assert outcome.code == 1 and "gate `perplexity<1` failed: got " in outcome.err
    assert (tmp_path / "r.json").exists()
    other = ("--task", "perplexity", "--task-data", LASTWORD, "--seqlen", 16, "--limit", 1)
    given = ("--gate", "perplexity<baseline", "--baseline-results", "earlier.json")
    for arguments, code, parts in (
        (("--gate", "kl<1"), 2, ("unknown metric `kl`", "acc")),
        (("--gate", "acc>"), 2, ("`--gate`", "`acc>`")),
        (("--gate", "acc>baseline"), 2, ("--baseline-results FILE",)),
        (("--baseline-results", "earlier.json"), 2, ("got no `--gate`",)),
        (("--gate", "acc>baseline", "--baseline-results", "none.json"), 1, ("cannot read `none.json`",)),
        (("--gate", "acc>0", "--junit", "earlier.json"), 1, ("earlier.json", "--force")),
        ((*other, *given), 2, ("task `lastword`, expected `perplexity`",)),
    ):
        refused(qmamba(*command, *arguments, cwd=tmp_path), code, *parts)
    compared = ("compare", "--checkpoint", artifacts().w4, "--modes", "0", "--gate", "0:kl<baseline")
    earlier = ("--baseline-results", "earlier.json")
    refused(qmamba(*compared, *earlier, cwd=tmp_path), 2, "no metric `kl` in the earlier results of mode 0")
    edit_json(tmp_path / "earlier.json", partial=True)
    refused(qmamba(*command, "--gate", "acc>baseline", *earlier, cwd=tmp_path), 2, "got partial results")
    edit_json(tmp_path / "earlier.json", results=[])
    refused(qmamba(*command, *given, cwd=tmp_path), 3, "holds no results of this program")
    refused(qmamba("run", "--prompt", "a", "--gate", "acc>0", cwd=tmp_path), 2, "belong to `--task`")


def test_an_empty_report_is_a_report() -> None:
    (suite,) = ET.fromstring(junit_xml([], seconds=1.5, name="run"))
    assert suite.get("tests") == "1" and [case.get("name") for case in suite] == ["run"]


def test_the_table_says_what_is_the_same_and_what_differs(tmp_path: Path) -> None:
    files = copied(tmp_path)
    outcome = done("compare", "--modes", "2-1,2-3,3", "--limit", 2, cwd=files.folder)
    assert "2-1 = 2-3, bit for bit" in outcome.out
    assert outcome.out.count("accuracy does not separate them") == 3
    assert "Holm" in outcome.out and "± is one standard error" in outcome.out
    for mode in ("fp", "2-1", "2-3", "3"):
        assert f"\n {mode} " in outcome.out
