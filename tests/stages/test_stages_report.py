"""`report`: what it recognizes, how it joins files by their digests, and `compare --html`."""

import copy
import json

import pytest
from command_line import artifacts, done, edit_json, qmamba, refused, refused_in, tree
from html_checks import checked_drawings, checked_page

from qmamba_cli.html.compare import compare_page, groups, headline
from qmamba_cli.html.lineage import Column, Edge, Node, lineage_chart
from qmamba_cli.html.report import Kind, kind_of_record

OTHER = "ab" * 32
SPREAD = {"median": 2.0, "low": 1.0, "high": 3.0}
BENCH = {
    "model": "w8.safetensors",
    "machine": {"device": "some <cpu>", "qmamba-cli": "1.0"},
    "settings": {"repeat": 3, "new_tokens": 4, "warmup": 1},
    "rows": [
        {"mode": "fp", "weights": "fp32", "batch_size": 1, "prompt_length": 8, "tokens_per_s": 500.0,
         "measured": {"first_token_ms": SPREAD, "token_ms": SPREAD}, "first_token_speedup": 1.0,
         "token_speedup": 1.0, "error": None},
        {"mode": "2-4", "weights": "W8A8", "batch_size": 1, "prompt_length": 8, "tokens_per_s": 500.0,
         "measured": {"first_token_ms": SPREAD, "token_ms": SPREAD}, "first_token_speedup": 1.5,
         "token_speedup": 1.25, "error": None},
        {"mode": "3", "weights": "W8A8", "batch_size": 1, "prompt_length": 8, "tokens_per_s": None,
         "measured": None, "first_token_speedup": None, "token_speedup": None, "error": "out of memory"},
    ],
    "notes": ["a note"],
}  # fmt: skip
# What a quick run leaves behind: small on purpose, since relations are tested.
SCORED = ("--task", "lastword", "--limit", 3, "--batch-size", 2)
MADE = ("run.json", "compare.json", "sensitivity.json", "drift.json", "bench.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an outcome of every command on the 8-bit demo, and the artifacts' paths."""
    folder, made = tmp_path_factory.mktemp("report"), artifacts()
    file = ("--checkpoint", made.w8)
    done("run", *file, "--mode", "2-4", *SCORED, "--output", "run.json", cwd=folder)
    outcome = done(
        *("compare", *file, "--modes", "0,2-0,2-4", *SCORED),
        *("--output", "compare.json", "--html", "compare.html"),
        cwd=folder,
    )
    assert "page written to compare.html" in outcome.err
    done(
        *("sensitivity", "--calibration", made.calibration, "--task", "lastword", "--limit", 1),
        *("--no-leave-one-out", "--output", "sensitivity.json"),
        cwd=folder,
    )
    done("drift", *file, "--modes", "0", "--length", 8, "--streams", 2, "--output", "drift.json", cwd=folder)
    # As `bench` writes it: provenance of the file that was timed.
    own = json.loads((folder / "run.json").read_text())["qmamba"]
    named = {name: own[name] for name in ("artifact", "calibration", "model", "weights")}
    (folder / "bench.json").write_text(json.dumps({**BENCH, "qmamba": named}))
    return folder


@pytest.fixture(scope="module")
def page(made):
    """The page of everything."""
    shared = artifacts()
    outcome = done("report", shared.calibration, shared.w8, *MADE, "--out", "all.html", cwd=made)
    assert "report of 7 files written to all.html" in outcome.err
    return checked_page((made / "all.html").read_text())


def test_every_file_has_a_section(page):
    assert [heading.text for heading in page.find("h2")] == [
        "Summary",
        "Lineage",
        "Calibration: calibration",
        "Quantized model: w8.safetensors",
        "Results",
        "Comparison: compare.json",
        "Sensitivity: sensitivity.json",
        "Drift: drift.json",
        "Times: bench.json",
    ]
    assert len(page.find("a")) == len(page.find("h2"))


def test_the_summary_quotes_what_each_file_says(made, page):
    summary, lineage = page.find("section")[:2]
    lines = [item.text for item in summary.find("li")]
    assert [line.partition(":")[0] for line in lines] == [
        "compare.json", "sensitivity.json", "drift.json", "bench.json",
    ]  # fmt: skip
    record = json.loads((made / "compare.json").read_text())
    assert lines[0].removeprefix("compare.json: ") == headline(record)
    assert "mode 2-4, W8A8, makes a token in 2 ms" in lines[3]
    assert "1.25 times" in lines[3]
    assert "Every digest that a file names belongs to a file on this page." in lineage.all_text()


def test_the_picture_joins_each_file_to_what_it_was_made_from(made, page):
    lineage = page.find("section")[1]
    boxes = lineage.find("rect", "box-node")
    # The float model, both artifacts and five outcomes: a line to each but the first.
    assert len(boxes) == 8
    assert lineage.find("rect", "absent") == []
    assert len(lineage.find("polyline", "edge")) == 7
    digest = json.loads((made / "run.json").read_text())["qmamba"]["artifact"]["digest"]
    assert any(digest[:12] in text.text for text in lineage.find("text"))


def test_what_an_interrupt_left_is_marked(made, tmp_path):
    for name in MADE:
        record = json.loads((made / name).read_text())
        (tmp_path / name).write_text(json.dumps({**record, "partial": True}))
    outcome = done("report", *MADE, "--out", "partial.html", cwd=tmp_path)
    assert outcome.out.count(", partial") == len(MADE)
    page = checked_page((tmp_path / "partial.html").read_text())
    rows = [row.find("td")[1].text for row in page.find("section")[0].find("tr") if row.find("td")]
    assert rows == [f"{what}, partial" for what in ("results", "comparison", "sensitivity", "drift", "times")]
    assert "3, partial" in [cell.text for cell in page.find("td")], "how many documents of the run"


def test_times_of_random_weights_stand_alone(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    done("report", "bench.json", "--out", "times.html", cwd=tmp_path)
    lineage = checked_page((tmp_path / "times.html").read_text()).find("section")[1]
    assert len(lineage.find("rect", "box-node")) == 1 and lineage.find("polyline", "edge") == []


def test_a_line_past_a_column_goes_below_its_boxes():
    """An outcome of a calibration, beside two quantized models of it that stand in its way."""
    chart = lineage_chart(
        [
            Node(key="c", column=Column.CALIBRATION, name="calibration", digest="c", given=True),
            *(Node(key=q, column=Column.QUANTIZED, name=q, digest=q, given=False) for q in ("q", "r")),
            Node(key="s", column=Column.OUTCOME, name="s", digest="s", given=True),
            Node(key="d", column=Column.OUTCOME, name="d", digest="d", given=True),
        ],
        [Edge(parent=parent, child=child) for parent, child in ("cq", "cr", "cs", "rd", "x?")],
    )
    (drawing,) = checked_drawings(chart)
    boxes = {box.find("title")[0].text[0]: box for box in drawing.find("rect")}
    bottom = max(float(box.attributes["y"]) + float(box.attributes["height"]) for box in boxes.values())
    lines = [line.attributes["points"].split() for line in drawing.find("polyline")]
    (far,) = [line for line in lines if len(line) == 6]
    assert len(lines) == 4
    assert all(float(point.split(",")[1]) > bottom for point in far[2:4])
    # What was made from a quantized model stands above what was made from afar.
    assert float(boxes["d"].attributes["y"]) < float(boxes["s"].attributes["y"])


def test_a_table_of_the_sites_names_what_calibration_saw(page):
    section = page.find("section")[2]
    rows = [row.find("td")[0].text for row in section.find("tr") if row.find("td")]
    assert "x_proj:input" in rows and "lm_head:input" in rows
    assert "8 samples of 64 tokens" in section.all_text()


def test_a_model_that_did_not_run_says_why(page):
    assert "out of memory" in page.find("section")[-1].all_text()


def test_files_that_are_not_there_are_dashed(made, tmp_path):
    done("report", made / "run.json", "--out", "one.html", cwd=tmp_path)
    lineage = checked_page((tmp_path / "one.html").read_text()).find("section")[1]
    assert len(lineage.find("rect", "absent")) == 3
    assert "Not on this page: calibration" in lineage.all_text()


def test_two_files_that_contradict_each_other_are_named(made, tmp_path):
    record = json.loads((made / "run.json").read_text())
    record["qmamba"]["calibration"]["digest"] = OTHER
    (tmp_path / "stale.json").write_text(json.dumps(record))
    done("report", artifacts().w8, "stale.json", "--out", "r.html", cwd=tmp_path)
    lineage = checked_page((tmp_path / "r.html").read_text()).find("section")[1]
    (problem,) = [item.text for item in lineage.find("li")]
    assert "stale.json says" in problem and OTHER[:12] in problem and "w8.safetensors says" in problem
    assert len(lineage.find("polyline", "wrong")) == 1


def test_a_work_folder_stands_for_what_it_last_made(tmp_path):
    shared = artifacts()
    outcome = done("report", shared.calibration.parent, shared.calibration, cwd=tmp_path)
    assert outcome.err.endswith("report of 2 files written to report.html\n")
    assert "w4.safetensors" in (tmp_path / "report.html").read_text()


def test_files_of_one_name_are_told_apart_by_their_folders(made, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in "ab":
        (tmp_path / folder / "run.json").write_bytes((made / "run.json").read_bytes())
    done("report", "a/run.json", "b/run.json", "./a/run.json", cwd=tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "a/run.json" in text and "b/run.json" in text
    assert "./a/run.json" not in text


def test_equal_files_give_equal_bytes(made, tmp_path):
    for name in ("one.html", "two.html"):
        done("report", *(made / file for file in MADE), "--out", name, cwd=tmp_path)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_what_a_file_says_is_escaped(made, tmp_path):
    record = copy.deepcopy(BENCH)
    record["rows"][1]["mode"] = "</svg><script>"
    (tmp_path / "<b>.json").write_text(json.dumps(record))
    done("report", "<b>.json", cwd=tmp_path)
    page = checked_page((tmp_path / "report.html").read_text())
    assert page.find("script") == page.find("b") == []


@pytest.mark.parametrize(
    ("name", "content", "code", "part"),
    [
        ("notes.txt", b"some words", 2, "nothing that a report can show"),
        ("empty.json", b"", 2, "nothing that a report can show"),
        ("strange.json", b'{"answer": 42}', 2, "nothing that a report can show"),
        ("list.json", b"[1, 2]", 2, "nothing that a report can show"),
        ("broken.json", b'{"modes": ', 3, "not valid JSON"),
        ("nan.json", b'{"modes": NaN}', 3, "not valid JSON"),
        (
            "half.json",
            b'{"curves": [{}], "n": {}, "qmamba": {}}',
            3,
            "looks like drift but breaks its layout",
        ),
        ("odd.json", b'{"curves": 3, "n": [], "qmamba": 7}', 3, "looks like drift but breaks its layout"),
    ],
)
def test_any_other_file_is_refused_by_name(tmp_path, name, content, code, part):
    (tmp_path / name).write_bytes(content)
    refused_in(tmp_path, code, "report", name, parts=(f"`{name}`", part))


@pytest.mark.parametrize("key", ["qmamba", "modes", "pairs"])
@pytest.mark.parametrize("value", [None, [], {}, 3, "text"])
def test_a_comparison_that_was_changed_by_hand_never_ends_in_a_traceback(made, tmp_path, key, value):
    (tmp_path / "c.json").write_bytes((made / "compare.json").read_bytes())
    edit_json(tmp_path / "c.json", **{key: value})
    outcome = qmamba("report", "c.json", cwd=tmp_path)
    assert outcome.code == 0 or refused(outcome, 3, "`c.json` looks like comparison")
    assert (outcome.code == 0) == (tmp_path / "report.html").exists()


def test_missing_files_folders_and_outputs_are_refused(made, tmp_path):
    refused_in(tmp_path, 1, "report", "gone.json", parts=("`gone.json` does not exist",))
    refused_in(tmp_path, 3, "report", tmp_path, parts=("is not a calibration",))
    (tmp_path / "report.html").write_text("mine")
    refused_in(tmp_path, 1, "report", made / "run.json", parts=("`report.html`", "--force"))
    done("report", made / "run.json", "--force", cwd=tmp_path)
    assert checked_page((tmp_path / "report.html").read_text())


def test_damaged_artifacts_are_refused(tmp_path):
    data = bytearray(artifacts().w8.read_bytes())
    data[20] ^= 1
    (tmp_path / "w8.safetensors").write_bytes(data)
    refused_in(tmp_path, 3, "report", "w8.safetensors", parts=("w8.safetensors",))


def test_kinds_are_recognized_by_content(made):
    kinds = [kind_of_record(json.loads((made / name).read_text())) for name in MADE]
    assert kinds == [Kind.RUN, Kind.COMPARISON, Kind.SENSITIVITY, Kind.DRIFT, Kind.BENCH]
    assert kind_of_record({}) is kind_of_record([]) is kind_of_record(None) is None


def test_the_page_of_compare_shows_modes_verdicts_and_tokens(made):
    record = json.loads((made / "compare.json").read_text())
    root = checked_page((made / "compare.html").read_text())
    assert [heading.text for heading in root.find("h2")] == ["Modes", "What separates them", "Single tokens"]
    assert groups(record) == [["fp"], ["0", "2-0"], ["2-4"]]
    lines = [item.text for item in root.find("li")]
    assert lines[0] == "0 = 2-0, bit for bit."
    # Twins are judged once: three pairs of fp, 0 and 2-4.
    assert len(lines) == 4
    assert root.find("p", "lead")[0].text == headline(record)


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_the_page_of_a_mode_that_broke_down(made, value):
    record = json.loads((made / "compare.json").read_text())
    record["modes"]["2-4"].update(
        kl_mean=value, kl_max=value, kl_p99=value, kl_ci=None, perplexity=value, same_top1=value
    )
    for pair in record["pairs"]:
        if "2-4" in (pair["a"], pair["b"]) and not pair["identical"]:
            pair.update(delta_ll=value, delta_ll_ci=None, delta_kl=value, delta_kl_ci=None)
    assert value in checked_page(compare_page(record)).all_text()


def test_a_page_of_compare_without_a_float_model(made):
    record = json.loads((made / "compare.json").read_text())
    del record["modes"]["fp"]
    for metrics in record["modes"].values():
        for name in [name for name in metrics if name.startswith(("kl_", "delta_", "same_"))]:
            del metrics[name]
    record["pairs"] = [pair for pair in record["pairs"] if pair["a"] != "fp"]
    for pair in record["pairs"]:
        for name in [name for name in pair if name.startswith("delta_kl")]:
            del pair[name]
    root = checked_page(compare_page(record))
    assert root.find("svg") == []
    assert headline(record) == ""


def test_compare_refuses_one_file_for_two_outputs(tmp_path):
    before = tree(tmp_path)
    outcome = qmamba(
        *("compare", "--checkpoint", artifacts().w8, "--output", "x", "--html", "x"), cwd=tmp_path
    )
    refused(outcome, 2, "got `x` twice")
    assert tree(tmp_path) == before
