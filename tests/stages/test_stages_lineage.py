"""Results as the last link of the chain, and what differs between two artifacts or two results."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CALIBRATE, SCORE, WORKDIR, copied, done, qmamba

from qmamba_cli.commands.diff import diff as diff_command
from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.quant import bins, histogram
from qmamba_cli.stages.diff import Difference, diff
from qmamba_cli.stages.kinds import Kind, kind_of
from qmamba_cli.views.inspect import bars


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shared artifacts with results of modes 0 and 2-4, and of the float model."""
    home = tmp_path_factory.mktemp("lineage")
    copied(home)
    for mode, name in (("0", "r0.json"), ("2-4", "r24.json")):
        done("run", "--mode", mode, *SCORE, "--output", name, cwd=home)
    done("run", "--mode", "fp", "--model", "demo", *SCORE, "--output", "fp.json", cwd=home)
    done("export", "--out", "f", "--format", "folder", "--workdir", WORKDIR, cwd=home)
    done(*CALIBRATE, "--alpha", 0.99, "--workdir", "other", cwd=home)
    return home


def test_kinds(home: Path) -> None:
    kinds = {name: kind_of(home / name) for name in ("w4.safetensors", "f", WORKDIR, "r0.json")}
    assert kinds == {
        "w4.safetensors": Kind.QUANTIZED,
        "f": Kind.QUANTIZED,
        WORKDIR: Kind.WORKDIR,
        "r0.json": Kind.RESULTS,
    }
    assert kind_of(home / WORKDIR / "calibration") is Kind.CALIBRATION
    # The length of a header may begin with the byte of a brace.
    (home / "brace").write_bytes(ord("{").to_bytes(8, "little") + b"{}")
    assert kind_of(home / "brace") is Kind.QUANTIZED


def test_the_chain_from_the_source_to_results(home: Path) -> None:
    found = done("verify", "r0.json", "--json", cwd=home).json()
    assert found["ok"] and {row["verdict"] for row in found["checks"]} == {"ok"}
    assert [row["stage"] for row in found["lineage"]] == ["source", "calibration", "export", "results"]
    own = json.loads((home / "r0.json").read_text())["qmamba"]
    digests = [row["digest"] for row in found["lineage"]]
    assert digests[:3] == [own[link]["digest"] for link in ("model", "calibration", "artifact")]
    text = done("verify", "r0.json", cwd=home).out
    assert f"lineage: source {digests[0][:12]} -> calibration {digests[1][:12]}" in text
    # The folder is the same artifact in another form.
    assert done("verify", "r0.json", "--checkpoint", "f", "--json", cwd=home).json()["ok"]


def failed(outcome: Any) -> set[str]:
    assert outcome.code == 3
    return {row["what"] for row in outcome.json()["checks"] if row["verdict"] == "failed"}


def test_results_of_another_artifact(home: Path, tmp_path: Path) -> None:
    assert failed(qmamba("verify", "r0.json", "--checkpoint", "w8.safetensors", "--json", cwd=home)) == {
        "its quantized model"
    }
    # The artifact was made again at the same place since.
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "w8.safetensors", tmp_path / "w4.safetensors")
    assert "its quantized model" in failed(qmamba("verify", "r0.json", "--json", cwd=tmp_path))


@pytest.mark.parametrize("link", ["calibration", "model"])
def test_results_that_name_another_origin(home: Path, tmp_path: Path, link: str) -> None:
    document = json.loads((home / "r0.json").read_text())
    document["qmamba"][link]["digest"] = "0" * 64
    (home / f"{link}.json").write_text(json.dumps(document))
    assert failed(qmamba("verify", f"{link}.json", "--json", cwd=home)) == {f"the {link} they name"}


def test_results_alone(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "r0.json", tmp_path)
    found = done("verify", "r0.json", "--json", cwd=tmp_path).json()
    verdicts = {row["what"]: row["verdict"] for row in found["checks"]}
    assert verdicts == {
        "results r0.json": "ok",
        "its quantized model": "absent",
        "source checkpoint demo": "ok",
    }


def test_results_of_the_float_model(home: Path) -> None:
    found = done("verify", "fp.json", "--json", cwd=home).json()
    assert [row["stage"] for row in found["lineage"]] == ["source", "results"]


def test_what_is_no_results(home: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"results": {}}')
    outcome = qmamba("verify", "x.json", cwd=tmp_path)
    assert outcome.code == 3 and "has no `results` and `qmamba`" in outcome.err
    assert qmamba("inspect", home / "r0.json", cwd=tmp_path).code == 2


def difference(a: Path, b: Path) -> Difference:
    found = diff(a, b)
    backwards = diff(b, a)
    assert found.same == backwards.same
    assert {row.name for row in found.options} == {row.name for row in backwards.options}
    assert {row.name for row in found.tensors} == {row.name for row in backwards.tensors}
    ratios = {row.site: row.ratio for row in found.scales}
    for row in backwards.scales:
        assert row.ratio == pytest.approx(1 / (ratios[row.site] or 0.0))
    return found


def test_two_calibrations(home: Path) -> None:
    found = difference(home / WORKDIR / "calibration", home / "other" / "calibration")
    assert [(row.name, row.a, row.b) for row in found.options] == [("alpha", 0.9995, 0.99)]
    # Alpha belongs to the Percentile sites, six layers of two.
    assert len(found.scales) == 12 and found.sites == 6 * 7 + 1
    assert all(row.ratio is not None and row.ratio < 1 for row in found.scales)
    ratios = [row.ratio for row in found.scales if row.ratio is not None]
    assert ratios == sorted(ratios)
    assert {row.name.partition(": ")[0] for row in found.tensors} == {"scales.safetensors"}
    assert {row.change for row in found.tensors} == {"values"}
    assert found.words[0] == "1 option differs: alpha 0.9995 -> 0.99"
    assert found.words[1].startswith(
        f"12 of 43 scales differ; `{found.scales[0].site}` changed most, by a factor"
    )
    # A work folder stands for what it has on record.
    assert difference(home / "other", home / WORKDIR / "calibration").scales


def test_two_exports(home: Path) -> None:
    found = difference(home / "w4.safetensors", home / "w8.safetensors")
    assert not found.scales
    assert {row.name for row in found.options} >= {"quantization.w_bits", "quantization.group_size"}
    changes = {row.name: row.change for row in found.tensors}
    assert changes["layers.0.in_proj.qweight"] == "form"
    assert changes["layers.0.in_proj.multiplier"] == "only in a"
    assert changes["layers.0.in_proj.scale"] == "values"
    assert "embeddings.qweight" not in changes
    assert "all 43 scales are the same" in found.words
    same = difference(home / "w4.safetensors", home / "f")
    assert same.same and not (same.options or same.scales or same.tensors)
    assert same.words[0].startswith("the two quantized models are the same")


def test_two_results(home: Path) -> None:
    found = difference(home / "r0.json", home / "r24.json")
    assert {"qmamba.mode.name", "qmamba.mode.scan_u"} <= {row.name for row in found.options}
    assert not [row.name for row in found.options if "seconds" in row.name]
    perplexity = next(row for row in found.metrics if row.metric == "perplexity")
    assert perplexity.a is not None and perplexity.b is not None
    assert perplexity.difference == perplexity.b - perplexity.a
    assert difference(home / "r0.json", home / "r0.json").same


def test_kinds_do_not_mix(home: Path) -> None:
    with pytest.raises(UsageError, match="got quantized model and results"):
        diff(home / "w4.safetensors", home / "r0.json")
    (home / "damaged").write_bytes((home / "w4.safetensors").read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        diff(home / "w4.safetensors", home / "damaged")


def test_the_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    a, b = home / WORKDIR / "calibration", home / "other" / "calibration"
    diff_command(a, b, exit_code=False, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["same"] is False and document["kind"] == "calibration"
    assert document["words"] == list(diff(a, b).words)
    assert document["scales"][0]["ratio"] == diff(a, b).scales[0].ratio
    with pytest.raises(typer.Exit) as caught:
        diff_command(a, b, exit_code=True, as_json=False)
    assert caught.value.exit_code == 1
    text = capsys.readouterr().out
    assert "alpha" in text and diff(a, b).scales[0].site in text
    diff_command(a, a, exit_code=True, as_json=False)


def test_inspect_shows_histograms_and_tensors(home: Path) -> None:
    document = done("inspect", f"{WORKDIR}/calibration", "--json", cwd=home).json()
    sites = document["manifest"]["sites"]
    assert document["histograms"].keys() == sites.keys()
    for key, found in document["histograms"].items():
        assert found["below"] + sum(found["counts"]) == sites[key]["observations"]
        assert found["observed"] >= found["absmax"] == sites[key]["absmax"]
        top = found["exponent"] + len(found["counts"])
        assert 2.0 ** (top - 1) <= found["observed"] < 2.0**top
        assert (found["clipped"] > 0) == (sites[key]["observer"] == "percentile")
        assert found["clipped"] <= 0.0005
    text = done("inspect", f"{WORKDIR}/calibration", cwd=home).out
    assert "by powers of two" in text
    # Off a terminal the bars are ASCII.
    assert "#" in text and "\u2588" not in text
    assert f"{WORKDIR}/calibration" in text
    listed = done("inspect", "w4.safetensors", "--tensors", cwd=home).out
    assert "layers.0.in_proj.qweight" in listed and "w4-g128" in listed
    listed = done("inspect", f"{WORKDIR}/calibration", "--tensors", cwd=home).out
    assert "statistics.safetensors: lm_head:input.counts" in listed


def test_bars() -> None:
    assert bars([0, 1, 10, 100, 1000], "123456789") == " 1369"
    assert bars([], "12") == "" and bars([1, 1], "12") == "11"


def test_the_grid_is_that_of_the_histograms() -> None:
    assert bins.N_BINS == histogram.N_BINS
    for value in (0.0, 2.0**-33, 2.0**-32, 0.7, 1.0, 1.999, 2.0**31, 2.0**32, 3e38):
        counted = histogram.Histogram()
        counted.update(torch.tensor([value]))
        assert counted.span()[0] == bins.bin_of(value)
