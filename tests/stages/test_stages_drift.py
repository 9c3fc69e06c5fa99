"""`drift`: the laws between modes along a sequence, and the files of the command."""

import csv
import json

import pytest
from command_line import artifacts, done, model_folder, refused_in
from html_checks import checked_page

LENGTH = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the 8-bit demo, and the drift of four modes over two streams."""
    path = tmp_path_factory.mktemp("drift")
    made = artifacts()
    outcome = done(
        *("drift", "--checkpoint", made.w8, "--modes", "0,2-1,2-2,2-4", "--length", LENGTH, "--streams", 2),
        *("--output", "d.json", "--csv", "d.csv", "--html", "d.html"),
        cwd=path,
    )
    assert "W8A8, 2 streams of 40 tokens" in outcome.out
    return path


@pytest.fixture(scope="module")
def record(folder):
    return json.loads((folder / "d.json").read_text())


def points(record, mode, path):
    (one,) = [one for one in record["curves"] if (one["mode"], one["path"]) == (mode, path)]
    return one["points"]


def test_every_mode_has_both_curves(record):
    assert [(one["path"], one["mode"]) for one in record["curves"]] == [
        (path, mode) for path in ("prefill", "decode") for mode in ("0", "2-1", "2-2", "2-4")
    ]
    for one in record["curves"]:
        assert [point["t"] for point in one["points"]] == [1, 2, 4, 8, 16, 32, 40]
        assert all(len(point["state_error_layers"]) == 6 for point in one["points"])
    assert record["n"] == {"streams": 2, "length": LENGTH, "tokens": 2 * LENGTH}


def test_2_2_is_2_1_in_prefill_but_for_the_grid_of_the_state(record):
    for a, b in zip(points(record, "2-1", "prefill"), points(record, "2-2", "prefill"), strict=True):
        assert a["kl"] == b["kl"] and a["logits_error"] == b["logits_error"]
        assert a["state_error"] > b["state_error"]


@pytest.mark.parametrize("mode", ["2-2", "2-4"])
def test_an_fp32_state_costs_decode_nothing(record, mode):
    for prefill, decode in zip(points(record, mode, "prefill"), points(record, mode, "decode"), strict=True):
        assert decode["kl"] == pytest.approx(prefill["kl"], rel=1e-2)
        assert decode["state_error"] == pytest.approx(prefill["state_error"], rel=1e-2)


@pytest.mark.parametrize("mode", ["0", "2-1"])
def test_an_int8_state_costs_decode(record, mode):
    # One step has no seam before it.
    assert points(record, mode, "decode")[0]["kl"] == points(record, mode, "prefill")[0]["kl"]
    prefill, decode = (points(record, mode, path)[-1] for path in ("prefill", "decode"))
    assert decode["kl"] > prefill["kl"]
    assert decode["state_error"] > prefill["state_error"]


def test_the_files_say_the_same(folder, record):
    with (folder / "d.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    flat = [(one["mode"], one["path"], point) for one in record["curves"] for point in one["points"]]
    assert len(rows) == len(flat)
    for row, (mode, path, point) in zip(rows, flat, strict=True):
        assert (row["mode"], row["path"], int(row["t"])) == (mode, path, point["t"])
        assert float(row["kl"]) == point["kl"]
    page = checked_page((folder / "d.html").read_text(encoding="utf-8"))
    assert len(page.find("polyline", "line")) == 2 * 3 * 4


def test_one_path_and_one_json(tmp_path):
    made = artifacts()
    small = ("drift", "--checkpoint", made.w8, "--length", 4, "--streams", 1, "--modes", "all", "--json")
    record = done(*small, "--decode", cwd=tmp_path).json()
    modes = ["0", "2-0", "2-1", "2-2", "2-3", "2-4", "3"]
    assert [(one["mode"], one["path"]) for one in record["curves"]] == [(mode, "decode") for mode in modes]
    # The laws of equality hold along the way, too.
    assert points(record, "0", "decode") == points(record, "2-0", "decode")
    assert points(record, "2-1", "decode") == points(record, "2-3", "decode")
    (one,) = done(*small[:-2], "0", "--prefill", "--json", cwd=tmp_path).json()["curves"]
    assert one["path"] == "prefill" and one["points"][0]["kl_ci"] is None


def test_refusals(tmp_path):
    made = artifacts()
    model_folder(tmp_path / "other")
    base = ("drift", "--checkpoint", made.w8, "--length", 4, "--streams", 1)
    refused_in(tmp_path, 2, *base, "--modes", "fp", parts=("the float model that every mode",))
    refused_in(tmp_path, 2, *base, "--modes", "9", parts=("unknown mode", "2-4"))
    refused_in(tmp_path, 2, *base, "--length", 1, parts=("`--length` must be at least 2, got 1",))
    refused_in(tmp_path, 2, *base, "--streams", 0, parts=("`--streams` must be at least 1, got 0",))
    refused_in(tmp_path, 3, *base, "--model", "other", parts=("was made from another checkpoint",))
    refused_in(tmp_path, 1, *base, "--length", 10**6, parts=("tokens",))
