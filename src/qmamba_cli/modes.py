"""The numeric modes: one frozen row each.

A mode says which grid each tensor of the block lies on. Code branches on a column, never on a mode's name;
a new mode is a new row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from qmamba_cli.errors import UsageError


class Precision(StrEnum):
    """What the weights and the activations between operators are."""

    INT8 = "int8"
    FP32 = "fp32"


class ConvInput(StrEnum):
    """How the x half of in_proj's output reaches the convolution."""

    STATIC = "static"
    DYNAMIC = "dynamic"
    FP32 = "fp32"


class ConvOutput(StrEnum):
    """What the fused convolution + SiLU hands on."""

    INT8 = "int8"
    FP32 = "fp32"


class ScanU(StrEnum):
    """Path B: u as it is handed to the scan."""

    INT8 = "int8"
    ON_GRID = "on-grid"
    TRUE = "true"


class ScanReads(StrEnum):
    """What the scan makes of the u it is handed."""

    INT8 = "int8"
    REQUANTIZED = "requantized"
    FP32 = "fp32"


class ScanOrder(StrEnum):
    """Order of the recurrence: parallel over chunks, or left to right."""

    CHUNKED = "chunked"
    SEQUENTIAL = "sequential"


class State(StrEnum):
    """The scan state as it is carried between calls."""

    INT8 = "int8"
    FP32 = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to run the block.

    Attributes:
        name: the name of the row, as in ``--mode 2-4``.
        summary: one line for help and tables.
        precision: int8 (quantized weights, int8 between operators) or fp32 (the float model).
        conv_input: static int8, dynamic int8 (one scale a token) or fp32.
        conv_output: int8, or the true fp32 v, unrounded and unclipped.
        scan_u: q_u, s_u * q_u in fp32, or the true v.
        scan_reads: int8 as handed over, requantized to int8 inside, or fp32.
        scan_order: chunked or sequential.
        state: int8 or fp32 between calls.
        variables: the environment variables that select the row when they are the ones that say ``true``.

    Raises:
        UsageError: the columns contradict each other.
    """

    name: str
    summary: str
    precision: Precision = Precision.INT8
    conv_input: ConvInput
    conv_output: ConvOutput
    scan_u: ScanU
    scan_reads: ScanReads
    scan_order: ScanOrder
    state: State
    variables: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for broken, reason in self._contradictions():
            if broken:
                raise UsageError(f"mode {self.name}: {reason}", hint="`qmamba modes` shows every row")

    def _contradictions(self) -> tuple[tuple[bool, str], ...]:
        quantized = self.precision is Precision.INT8
        int8_u = self.scan_u is ScanU.INT8
        return (
            (
                quantized and self.conv_input is ConvInput.FP32,
                "conv_input=fp32 needs precision=fp32: the quantized convolution reads int8",
            ),
            (
                not quantized and self.conv_input is not ConvInput.FP32,
                f"conv_input={self.conv_input} needs precision=int8",
            ),
            (not quantized and self.state is State.INT8, "state=int8 needs precision=int8"),
            (not quantized and self.conv_output is ConvOutput.INT8, "conv_output=int8 needs precision=int8"),
            (
                not quantized and self.scan_reads is not ScanReads.FP32,
                f"scan_reads={self.scan_reads} needs precision=int8",
            ),
            (
                not quantized and self.scan_u is not ScanU.TRUE,
                f"scan_u={self.scan_u} needs precision=int8",
            ),
            (
                self.conv_output is ConvOutput.INT8 and self.scan_u is ScanU.TRUE,
                "scan_u=true needs conv_output=fp32: an int8 convolution keeps no true v",
            ),
            (
                int8_u and self.scan_reads is not ScanReads.INT8,
                f"scan_u=int8 is read as int8, not scan_reads={self.scan_reads}",
            ),
            (
                not int8_u and self.scan_reads is ScanReads.INT8,
                f"scan_reads=int8 needs scan_u=int8, got scan_u={self.scan_u}; use scan_reads=requantized",
            ),
        )

    def columns(self) -> dict[str, str]:
        """The numeric columns as plain strings, in table order."""
        return {name: str(getattr(self, name)) for name in COLUMNS}

    def with_columns(self, assignments: Mapping[str, str]) -> "Mode":
        """A copy with some columns replaced, as ``--set COLUMN=VALUE`` asks.

        The name of the copy lists what was changed, so that a result never passes for the plain row's.

        Raises:
            UsageError: a column or value is unknown, or the columns contradict each other.
        """
        changed: dict[str, Any] = {}
        for column, value in assignments.items():
            vocabulary = COLUMNS.get(column)
            if vocabulary is None:
                raise UsageError(f"unknown column `{column}`, expected one of {', '.join(COLUMNS)}")
            if value not in {str(member) for member in vocabulary}:
                choices = ", ".join(str(member) for member in vocabulary)
                raise UsageError(f"column `{column}`: unknown value `{value}`, expected one of {choices}")
            if str(getattr(self, column)) != value:
                changed[column] = vocabulary(value)
        if not changed:
            return self
        suffix = ",".join(f"{column}={value}" for column, value in changed.items())
        return replace(self, name=f"{self.name}+{suffix}", variables=frozenset(), **changed)


# Column name → its closed vocabulary, in table order.
COLUMNS: Mapping[str, type[StrEnum]] = MappingProxyType(
    {
        field.name: field.type
        for field in fields(Mode)
        if isinstance(field.type, type) and issubclass(field.type, StrEnum)
    }
)

_INT8_SIM = "FLOAT_SIM_ASIC_INT8"

_ROWS = (
    Mode(
        name="0",
        summary="int8 everywhere, chunked scan",
        conv_input=ConvInput.STATIC,
        conv_output=ConvOutput.INT8,
        scan_u=ScanU.INT8,
        scan_reads=ScanReads.INT8,
        scan_order=ScanOrder.CHUNKED,
        state=State.INT8,
    ),
    Mode(
        name="2-0",
        summary="mode 0 with u carried as fp32 on the int8 grid; equal to 0 bit for bit",
        conv_input=ConvInput.STATIC,
        conv_output=ConvOutput.INT8,
        scan_u=ScanU.ON_GRID,
        scan_reads=ScanReads.REQUANTIZED,
        scan_order=ScanOrder.CHUNKED,
        state=State.INT8,
        variables=frozenset({_INT8_SIM, "SSM_USE_CUDA_FOR_FP32"}),
    ),
    Mode(
        name="2-1",
        summary="int8 everywhere, left-to-right scan",
        conv_input=ConvInput.STATIC,
        conv_output=ConvOutput.INT8,
        scan_u=ScanU.INT8,
        scan_reads=ScanReads.INT8,
        scan_order=ScanOrder.SEQUENTIAL,
        state=State.INT8,
        variables=frozenset({_INT8_SIM, "SSM_USE_PYTORCH_INT8"}),
    ),
    Mode(
        name="2-2",
        summary="u on the int8 grid, fp32 state: 2-1 in prefill, a finer state in decode",
        conv_input=ConvInput.STATIC,
        conv_output=ConvOutput.INT8,
        scan_u=ScanU.ON_GRID,
        scan_reads=ScanReads.FP32,
        scan_order=ScanOrder.SEQUENTIAL,
        state=State.FP32,
        variables=frozenset({_INT8_SIM}),
    ),
    Mode(
        name="2-3",
        summary="fp32 convolution, requantized inside the scan; equal to 2-1 bit for bit",
        conv_input=ConvInput.STATIC,
        conv_output=ConvOutput.FP32,
        scan_u=ScanU.TRUE,
        scan_reads=ScanReads.REQUANTIZED,
        scan_order=ScanOrder.SEQUENTIAL,
        state=State.INT8,
        variables=frozenset({_INT8_SIM, "CONV1D_MODE23_FP32"}),
    ),
    Mode(
        name="2-4",
        summary="true fp32 u and fp32 state in the scan; x_proj still reads int8",
        conv_input=ConvInput.STATIC,
        conv_output=ConvOutput.FP32,
        scan_u=ScanU.TRUE,
        scan_reads=ScanReads.FP32,
        scan_order=ScanOrder.SEQUENTIAL,
        state=State.FP32,
        variables=frozenset({_INT8_SIM, "CONV1D_MODE24_FP32"}),
    ),
    Mode(
        name="3",
        summary="2-4 with the conv input quantized anew for each token, chunked scan",
        conv_input=ConvInput.DYNAMIC,
        conv_output=ConvOutput.FP32,
        scan_u=ScanU.TRUE,
        scan_reads=ScanReads.FP32,
        scan_order=ScanOrder.CHUNKED,
        state=State.FP32,
        variables=frozenset({"CONV1D_MODE3_FP32"}),
    ),
    Mode(
        name="fp",
        summary="the float model, the baseline of every comparison",
        precision=Precision.FP32,
        conv_input=ConvInput.FP32,
        conv_output=ConvOutput.FP32,
        scan_u=ScanU.TRUE,
        scan_reads=ScanReads.FP32,
        scan_order=ScanOrder.CHUNKED,
        state=State.FP32,
    ),
)

MODES: Mapping[str, Mode] = MappingProxyType({row.name: row for row in _ROWS})
DEFAULT_MODE = "0"
# Every variable that can select a mode; the command line reads them once.
VARIABLES: tuple[str, ...] = tuple(sorted({name for row in _ROWS for name in row.variables}))


def mode_by_name(name: str) -> Mode:
    """The row called ``name``.

    Raises:
        UsageError: there is no such row; the message lists the rows.
    """
    try:
        return MODES[name]
    except KeyError:
        raise UsageError(f"unknown mode `{name}`, expected one of {', '.join(MODES)}") from None


def mode_from_variables(environment: Mapping[str, str]) -> Mode | None:
    """The row that the environment variables select, or None where none of them says ``true``.

    A variable counts when its lower-cased value is ``true``. They must be exactly those of one row.

    Raises:
        UsageError: the variables select no row or contradict each other; the message names them.
    """
    chosen = frozenset(name for name in VARIABLES if environment.get(name, "").strip().lower() == "true")
    if not chosen:
        return None
    for row in _ROWS:
        if row.variables == chosen:
            return row
    valid = "; ".join(f"{row.name}: {' + '.join(sorted(row.variables))}" for row in _ROWS if row.variables)
    raise UsageError(
        f"environment variables {', '.join(sorted(chosen))} select no mode together",
        hint=f"set one of these sets to `true`, or pass --mode ({valid})",
    )
