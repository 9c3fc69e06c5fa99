"""Gates: what they say, what they mean, and how they are refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmamba_cli.errors import UsageError
from qmamba_cli.evaluation.gates import check_gates, evaluate_gate, parse_gate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl<0.02", (None, "kl", "<", 0.02, False)),
        (" kl <= 2e-2 ", (None, "kl", "<=", 0.02, False)),
        ("acc>=baseline-0.01", (None, "acc", ">=", -0.01, True)),
        ("acc >= baseline + .5", (None, "acc", ">=", 0.5, True)),
        ("perplexity<baseline", (None, "perplexity", "<", 0.0, True)),
        ("ll_per_token>-3.5", (None, "ll_per_token", ">", -3.5, False)),
        ("2-4:kl_p99<1", ("2-4", "kl_p99", "<", 1.0, False)),
        (
            "0+conv_input=dynamic,alpha=1:kl<0.1",
            ("0+conv_input=dynamic,alpha=1", "kl", "<", 0.1, False),
        ),
    ],
)
def test_gates_are_read(text: str, expected: tuple[object, ...]) -> None:
    gate = parse_gate(text)
    assert (gate.mode, gate.metric, gate.comparison, gate.offset, gate.relative) == expected
    assert gate.text == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        *("", "kl", "kl<", "<0.02", "kl=0.02", "kl==0.02", "kl<<0.02", "kl<0.02<1", "kl<two", "0.02>kl"),
        *("kl<baseline*0.9", "kl<baseline-", "kl<nan", "kl<inf", "kl<1e999", "kl<0.02 acc>0.1", "a b<1"),
    ],
)
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a") as caught:
        parse_gate(text)
    assert f"`{text}`" in caught.value.message and caught.value.hint


@given(st.text(max_size=30))
def test_any_text_is_a_gate_or_a_usage_error(text: str) -> None:
    try:
        gate = parse_gate(text)
    except UsageError:
        return
    assert math.isfinite(gate.offset) and gate.metric.isidentifier()


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("kl<0.02", True),
        ("kl<0.01", False),
        ("kl<=0.01", True),
        ("kl>0.01", False),
        ("kl>=0.01", True),
        ("kl<=baseline", True),
        ("kl<=baseline-0.001", False),
        ("kl<=baseline+0.001", True),
    ],
)
def test_a_gate_holds_or_fails(text: str, passes: bool) -> None:
    outcome = evaluate_gate(parse_gate(text), {"0": {"kl": 0.01}}, {"0": {"kl": 0.01}})
    assert outcome.passed is passes
    assert outcome.value == 0.01
    assert f"`{text}` {'passed' if passes else 'failed'}: got 0.01 in mode 0" in outcome.message


def test_a_gate_without_a_mode_is_about_all_and_names_the_worst() -> None:
    modes = {"0": {"kl_mean": 0.02}, "2-4": {"kl_mean": 0.01}, "3": {"kl_mean": 0.03}}
    outcome = evaluate_gate(parse_gate("kl<0.015"), modes)
    assert (outcome.passed, outcome.mode, outcome.value) == (False, "3", 0.03)
    assert outcome.failed == ("0", "3")
    assert outcome.message.endswith("got 0.03 in mode 3, expected < 0.015 (failed in 0, 3)")
    passed = evaluate_gate(parse_gate("kl<0.04"), modes)
    assert passed.passed and passed.mode == "3"
    only = evaluate_gate(parse_gate("2-4:kl<0.015"), modes)
    assert only.passed and only.mode == "2-4"


def test_the_baseline_counts_mode_by_mode() -> None:
    modes, earlier = {"0": {"acc": 0.5}, "3": {"acc": 0.4}}, {"0": {"acc": 0.52}, "3": {"acc": 0.3}}
    outcome = evaluate_gate(parse_gate("acc>=baseline"), modes, earlier)
    assert (outcome.mode, outcome.bound, outcome.failed) == ("0", 0.52, ("0",))


@pytest.mark.parametrize("comparison", ["<", "<=", ">", ">="])
def test_nan_passes_no_gate(comparison: str) -> None:
    modes = {"0": {"kl": 0.1}, "3": {"kl": math.nan}}
    outcome = evaluate_gate(parse_gate(f"kl{comparison}1"), modes)
    assert not outcome.passed and outcome.mode == "3"


def test_names_of_run_and_compare_find_each_other() -> None:
    assert evaluate_gate(parse_gate("kl<1"), {"0": {"kl_mean": 0.5}}).passed
    assert evaluate_gate(parse_gate("kl_mean<=baseline"), {"0": {"kl_mean": 1}}, {"0": {"kl": 1}}).passed


def test_impossible_gates_are_refused_in_advance() -> None:
    with pytest.raises(UsageError, match="unknown metric `speed`, expected one of acc, kl_mean"):
        check_gates([parse_gate("speed<1")], ["acc", "kl_mean"])
    with pytest.raises(UsageError, match="got mode `9`, expected one of 0, 3"):
        check_gates([parse_gate("9:acc<1")], ["acc"], modes=["0", "3"])
    with pytest.raises(UsageError, match="got mode `0`, expected no mode"):
        check_gates([parse_gate("0:acc<1")], ["acc"])
    with pytest.raises(UsageError, match="without earlier results") as caught:
        check_gates([parse_gate("acc>baseline")], ["acc"])
    assert "--baseline-results" in caught.value.hint
    check_gates([parse_gate("acc>baseline"), parse_gate("kl<1")], ["acc", "kl_mean"], has_baseline=True)
    check_gates([parse_gate("exact_match>0.1")], None)


def test_what_results_lack_is_named() -> None:
    with pytest.raises(UsageError, match="got no metric `kl` in mode 0, expected one of acc"):
        evaluate_gate(parse_gate("kl<1"), {"0": {"acc": 0.5, "acc_stderr": None}})
    with pytest.raises(
        UsageError, match="got no metric `acc` in the earlier results of mode 0, expected one of none"
    ):
        evaluate_gate(parse_gate("acc>baseline"), {"0": {"acc": 0.5}}, {"3": {"acc": 0.5}})
