import itertools
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from qmamba_cli.errors import UsageError
from qmamba_cli.modes import (
    COLUMNS,
    DEFAULT_MODE,
    MODES,
    VARIABLES,
    Mode,
    mode_by_name,
    mode_from_variables,
)

# precision, conv input, conv output, u handed over, scan reads, order, state.
TABLE = {
    "0": ("int8", "static", "int8", "int8", "int8", "chunked", "int8"),
    "2-0": ("int8", "static", "int8", "on-grid", "requantized", "chunked", "int8"),
    "2-1": ("int8", "static", "int8", "int8", "int8", "sequential", "int8"),
    "2-2": ("int8", "static", "int8", "on-grid", "fp32", "sequential", "fp32"),
    "2-3": ("int8", "static", "fp32", "true", "requantized", "sequential", "int8"),
    "2-4": ("int8", "static", "fp32", "true", "fp32", "sequential", "fp32"),
    "3": ("int8", "dynamic", "fp32", "true", "fp32", "chunked", "fp32"),
    "fp": ("fp32", "fp32", "fp32", "true", "fp32", "chunked", "fp32"),
}

SELECTED_BY = {
    "2-0": {"FLOAT_SIM_ASIC_INT8", "SSM_USE_CUDA_FOR_FP32"},
    "2-1": {"FLOAT_SIM_ASIC_INT8", "SSM_USE_PYTORCH_INT8"},
    "2-2": {"FLOAT_SIM_ASIC_INT8"},
    "2-3": {"FLOAT_SIM_ASIC_INT8", "CONV1D_MODE23_FP32"},
    "2-4": {"FLOAT_SIM_ASIC_INT8", "CONV1D_MODE24_FP32"},
    "3": {"CONV1D_MODE3_FP32"},
}


def possible(row: dict[str, str]) -> bool:
    """Whether the columns make sense together, said positively."""
    if row["precision"] == "fp32":
        float_model = {"conv_input": "fp32", "conv_output": "fp32", "scan_u": "true", "scan_reads": "fp32"}
        return row["state"] == "fp32" and all(row[name] == value for name, value in float_model.items())
    true_v_exists = row["conv_output"] == "fp32"
    return (
        row["conv_input"] != "fp32"
        and (row["scan_u"] != "true" or true_v_exists)
        and (row["scan_u"] == "int8") == (row["scan_reads"] == "int8")
    )


def test_the_table_is_the_guides():
    assert {name: tuple(row.columns().values()) for name, row in MODES.items()} == TABLE
    assert tuple(MODES) == tuple(TABLE)
    assert DEFAULT_MODE == "0"


def test_columns_come_in_table_order():
    names = ("precision", "conv_input", "conv_output", "scan_u", "scan_reads", "scan_order", "state")
    assert tuple(COLUMNS) == names
    assert all(tuple(row.columns()) == names for row in MODES.values())


@pytest.mark.parametrize("row", MODES.values(), ids=MODES.keys())
def test_every_row_is_valid_named_and_frozen(row):
    assert mode_by_name(row.name) is row
    assert row.summary and len(row.summary) <= 90
    values = {name: COLUMNS[name](value) for name, value in row.columns().items()}
    assert Mode(name=row.name, summary=row.summary, variables=row.variables, **values) == row
    with pytest.raises(FrozenInstanceError):
        row.name = "other"
    with pytest.raises(TypeError):
        MODES["new"] = row


def test_no_two_rows_are_the_same():
    assert len(set(TABLE.values())) == len(TABLE)
    assert len({tuple(row.columns().values()) for row in MODES.values()}) == len(MODES)


def test_an_unknown_mode_lists_the_rows():
    with pytest.raises(UsageError) as caught:
        mode_by_name("2-5")
    assert caught.value.message == "unknown mode `2-5`, expected one of 0, 2-0, 2-1, 2-2, 2-3, 2-4, 3, fp"


@pytest.mark.parametrize(
    ("name", "column", "value", "reason"),
    [
        ("0", "conv_input", "fp32", "conv_input=fp32 needs precision=fp32"),
        ("fp", "conv_input", "static", "conv_input=static needs precision=int8"),
        ("fp", "conv_input", "dynamic", "conv_input=dynamic needs precision=int8"),
        ("fp", "state", "int8", "state=int8 needs precision=int8"),
        ("fp", "conv_output", "int8", "conv_output=int8 needs precision=int8"),
        ("fp", "scan_reads", "requantized", "scan_reads=requantized needs precision=int8"),
        ("fp", "scan_reads", "int8", "scan_reads=int8 needs precision=int8"),
        ("fp", "scan_u", "on-grid", "scan_u=on-grid needs precision=int8"),
        ("2-2", "scan_u", "true", "scan_u=true needs conv_output=fp32"),
        ("0", "scan_reads", "fp32", "scan_u=int8 is read as int8, not scan_reads=fp32"),
        ("0", "scan_reads", "requantized", "scan_u=int8 is read as int8, not scan_reads=requantized"),
        ("2-2", "scan_reads", "int8", "scan_reads=int8 needs scan_u=int8, got scan_u=on-grid"),
        ("2-4", "scan_reads", "int8", "scan_reads=int8 needs scan_u=int8, got scan_u=true"),
    ],
)
def test_each_contradiction_is_refused_with_its_reason(name, column, value, reason):
    with pytest.raises(UsageError) as caught:
        MODES[name].with_columns({column: value})
    assert reason in caught.value.message
    assert f"{column}={value}" in caught.value.message
    assert "qmamba modes" in caught.value.hint


def test_exactly_the_possible_combinations_are_accepted():
    vocabularies = [[str(member) for member in vocabulary] for vocabulary in COLUMNS.values()]
    accepted = 0
    for values in itertools.product(*vocabularies):
        row = dict(zip(COLUMNS, values, strict=True))
        if possible(row):
            assert MODES["0"].with_columns(row).columns() == row
            accepted += 1
        else:
            with pytest.raises(UsageError):
                MODES["0"].with_columns(row)
    assert accepted == 66


def test_with_columns_says_in_the_name_what_was_changed():
    changed = MODES["0"].with_columns({"conv_input": "dynamic", "state": "fp32", "scan_order": "chunked"})
    assert changed.name == "0+conv_input=dynamic,state=fp32"
    assert changed.columns() == MODES["0"].columns() | {"conv_input": "dynamic", "state": "fp32"}
    assert changed.variables == frozenset()
    assert MODES["0"].columns()["conv_input"] == "static"


def test_with_columns_that_change_nothing_gives_the_row_itself():
    row = MODES["2-4"]
    assert row.with_columns({}) is row
    assert row.with_columns(row.columns()) is row


def test_two_columns_may_be_changed_together_where_one_alone_is_refused():
    row = MODES["0"]
    with pytest.raises(UsageError):
        row.with_columns({"scan_u": "on-grid"})
    assert row.with_columns({"scan_u": "on-grid", "scan_reads": "fp32"}).columns()["scan_reads"] == "fp32"


@pytest.mark.parametrize("column", ["name", "summary", "variables", "colour", ""])
def test_an_unknown_column_is_refused(column):
    with pytest.raises(UsageError) as caught:
        MODES["0"].with_columns({column: "int8"})
    assert caught.value.message == f"unknown column `{column}`, expected one of {', '.join(COLUMNS)}"


@pytest.mark.parametrize("column", COLUMNS)
def test_an_unknown_value_is_refused(column):
    with pytest.raises(UsageError) as caught:
        MODES["0"].with_columns({column: "fp64"})
    choices = ", ".join(str(member) for member in COLUMNS[column])
    assert caught.value.message == f"column `{column}`: unknown value `fp64`, expected one of {choices}"


@pytest.mark.parametrize("size", range(len(VARIABLES) + 1))
def test_every_set_of_variables_selects_its_row_or_is_refused(size):
    for chosen in itertools.combinations(VARIABLES, size):
        environment = dict.fromkeys(chosen, "true")
        rows = [name for name, variables in SELECTED_BY.items() if variables == set(chosen)]
        if not chosen:
            assert mode_from_variables(environment) is None
        elif rows:
            assert mode_from_variables(environment) is MODES[rows[0]]
        else:
            with pytest.raises(UsageError) as caught:
                mode_from_variables(environment)
            assert f"variables {', '.join(sorted(chosen))} select no mode" in caught.value.message
            assert "CONV1D_MODE3_FP32" in caught.value.hint


def test_the_variables_are_the_guides():
    assert set(VARIABLES) == set().union(*SELECTED_BY.values())


@pytest.mark.parametrize("value", ["true", "TRUE", "True"])
def test_a_variable_counts_in_any_case(value):
    assert mode_from_variables({"CONV1D_MODE3_FP32": value}) is MODES["3"]


@pytest.mark.parametrize("value", ["", "1", "yes", "false", "truer"])
def test_a_variable_that_does_not_say_true_does_not_count(value):
    assert mode_from_variables({"CONV1D_MODE3_FP32": value}) is None
    environment = {"FLOAT_SIM_ASIC_INT8": "true", "CONV1D_MODE3_FP32": value, "PATH": "true"}
    assert mode_from_variables(environment) is MODES["2-2"]


def test_the_table_needs_no_torch():
    code = "import sys, qmamba_cli.modes; sys.exit(any(m in sys.modules for m in ('torch', 'cupy', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
