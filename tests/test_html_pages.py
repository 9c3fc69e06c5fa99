"""Whole pages: self-contained, named, and complete, also where a model broke down."""

import copy
import subprocess
import sys

import pytest
from html_checks import checked_page

from qmamba_cli.html.charts import Bar, bar_chart
from qmamba_cli.html.drift import drift_page
from qmamba_cli.html.page import Column, Figure, Section, Table, Text, render_page
from qmamba_cli.html.sensitivity import sensitivity_page

ROW = {
    "kl": 0.02,
    "kl_ci": [0.01, 0.03],
    "delta_ll": -0.001,
    "share": 0.4,
    "sqnr_db": 30.0,
    "clip_rate": 1e-4,
}
MODEL = {"source": "demo <&>", "digest": "ab" * 32}
SENSITIVITY = {
    "sites": [
        {"site": "x_proj:input", "layer": None, **ROW},
        {"site": "x_proj:input", "layer": 1, **ROW},
        {"site": "in_proj.weight", "layer": None, **ROW},
        {"site": "in_proj.weight", "layer": 0, **ROW},
    ],
    "parts": [{"site": "in_proj:output", "part": "z", "layer": None, **ROW}],
    "leave_one_out": [{"site": "x_proj:input", "layer": None, **ROW}],
    "everything": {"kl": 0.05, "kl_ci": [0.04, 0.06], "delta_ll": -0.01},
    "histograms": [
        {"site": "x_proj:input", "layer": 1, "edges": [0, 1, 2], "counts": [9, 1], "clip": 1.5, "absmax": 2.0,
         "sqnr_db": None},
    ],
    "n": {"documents": 4, "original": 49, "tokens": 2044},
    "interval": "95%",
    "qmamba": {
        "model": MODEL, "calibration": {"digest": "cd" * 32}, "task": "perplexity", "weights": "W4A8",
        "alpha": 0.9995, "layers": 2, "tool_version": "1.0",
    },
}  # fmt: skip


def point(t, kl=0.01):
    return {"t": t, "kl": kl, "kl_ci": [kl / 2, kl * 2], "logits_error": 0.1, "state_error": 0.2,
            "state_error_layers": [0.1, 0.3]}  # fmt: skip


DRIFT = {
    "curves": [
        {"mode": "0", "path": "prefill", "state": "int8", "points": [point(1), point(2)]},
        {"mode": "0", "path": "decode", "state": "int8", "points": [point(1), point(2, 0.05)]},
        {"mode": "2-4", "path": "prefill", "state": "fp32", "points": [point(1), point(2)]},
        {"mode": "2-4", "path": "decode", "state": "fp32", "points": [point(1), point(2, 0.002)]},
    ],
    "n": {"streams": 2, "length": 2, "tokens": 4},
    "interval": "95%",
    "qmamba": {"model": MODEL, "artifact": {"digest": "ef" * 32}, "weights": "W8A8", "data": None,
               "tool_version": "1.0"},
}  # fmt: skip


def test_a_page_escapes_what_it_is_given():
    bad = "<b>&</b>"
    table = Table(
        columns=[Column(heading=bad), Column(heading="n", number=True)], rows=[(bad, "1")], caption=bad
    )
    chart = Figure(svg=bar_chart("bars", [Bar(label=bad, value=1.0)]), caption=bad)
    page = render_page(
        bad,
        [Section(heading=bad, blocks=[Text(text=bad), table, chart])],
        lead=bad,
        facts={bad: bad},
        footer=bad,
    )
    root = checked_page(page)
    assert root.find("b") == []
    assert root.find("h1")[0].text == bad
    assert [cell.text for cell in root.find("td")] == [bad, "1"]
    assert len(root.find("svg")) == 1


def test_links_lead_to_the_sections():
    sections = [Section(heading=f"part {number}", blocks=[]) for number in range(3)]
    links = checked_page(render_page("title", sections)).find("a")
    assert [link.text for link in links] == ["part 0", "part 1", "part 2"]
    assert checked_page(render_page("title", sections[:2])).find("a") == []


def test_the_sensitivity_page_shows_every_view():
    root = checked_page(sensitivity_page(SENSITIVITY))
    headings = [heading.text for heading in root.find("h2")]
    assert headings == [
        "One tensor at a time",
        "Everything but one",
        "Layer by layer",
        "Tensors that share a scale",
        "The worst activations",
    ]
    labels = [drawing.attributes["aria-label"] for drawing in root.find("svg")]
    assert "KL divergence by layer and tensor" in labels
    assert "Magnitudes of layer 1, x_proj:input" in labels
    assert "Quantizing x_proj:input alone costs 0.02 nats a token, 40 %" in root.find("p", "lead")[0].text
    assert root.find("line", "clip")


def test_the_sensitivity_page_of_one_view():
    record = {**SENSITIVITY, "leave_one_out": [], "parts": [], "histograms": []}
    record["sites"] = [row for row in record["sites"] if row["layer"] is not None]
    headings = [heading.text for heading in checked_page(sensitivity_page(record)).find("h2")]
    assert headings == ["Layer by layer"]


def test_the_drift_page_shows_both_paths():
    root = checked_page(drift_page(DRIFT))
    assert [heading.text for heading in root.find("h2")][1:] == [
        "Prefill: one pass to each length",
        "Decode: token by token",
    ]
    assert len(root.find("svg")) == 8
    lead = root.find("p", "lead")[0].text
    assert "mode 0 is 0.01 nats a token" in lead and "0.05 when it goes token by token" in lead
    assert "mode 2-4 stays at 0.002" in lead


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_model_that_broke_down_still_has_its_page(value):
    # JSON holds these as strings.
    record = copy.deepcopy(SENSITIVITY)
    for row in record["sites"]:
        row.update(kl=value, kl_ci=None, share=0.0, delta_ll="-inf", sqnr_db=None)
    record["everything"].update(kl=value, kl_ci=None)
    assert value in checked_page(sensitivity_page(record)).all_text()
    drift = copy.deepcopy(DRIFT)
    drift["curves"][1]["points"][1] = {**point(2), "kl": value, "kl_ci": None, "state_error": value}
    assert value in checked_page(drift_page(drift)).all_text()


def test_the_templates_are_imported_when_a_page_is_made():
    code = "import sys, qmamba_cli.html.page, qmamba_cli.html.sensitivity; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
