"""What the benchmarks measure: one frozen row a case, with its shape, bytes moved and arithmetic.

Letters: b batch, l tokens, d d_inner, n d_state, r dt_rank, w conv width; sizes are those of the demo model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

D_MODEL, D_INNER, D_STATE, DT_RANK, D_CONV = 256, 512, 16, 16, 4
# 8 prompts of 512 tokens: what `calibrate` and `run --task` hand over at a time.
PREFILL_BATCH, PREFILL_LENGTH = 8, 512
ROWS = PREFILL_BATCH * PREFILL_LENGTH
# The modes that are timed: all int8, true u left to right, and dynamic conv input.
TIMED_MODES = ("0", "2-4", "3")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCase:
    """Tokens a second of the whole demo model, quantized, over transformers' float model in the same run.

    Attributes:
        name: as the command line names it.
        mode: row of the table of modes.
        w_bits: bits of in_proj and out_proj.
        batch: sequences.
        length: tokens of a prefill; of a decode, how many one-token steps are timed.
        decode: one token a call with carried state, after a prompt; else a prefill.
    """

    name: str
    mode: str
    w_bits: int
    batch: int
    length: int
    decode: bool

    @property
    def tokens(self) -> int:
        """Tokens of one timed call."""
        return self.batch * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCase:
    """One operator at the shape of a prefill.

    Attributes:
        name: as the command line names it.
        op: name of the operator, which is that of its folder.
        variant: key of the inputs in ``run.py``.
        shape: the shape in words.
        bytes: bytes that must be read and written at least once, each counted once.
        flops: multiplications and additions, two for each multiply-add.
    """

    name: str
    op: str
    variant: str
    shape: str
    bytes: int
    flops: int


def _model_cases() -> tuple[ModelCase, ...]:
    prefill = (
        ModelCase(
            name=f"prefill-{mode}",
            mode=mode,
            w_bits=4,
            batch=PREFILL_BATCH,
            length=PREFILL_LENGTH,
            decode=False,
        )
        for mode in TIMED_MODES
    )
    decode = (
        ModelCase(name=f"decode-{mode}", mode=mode, w_bits=4, batch=1, length=64, decode=True)
        for mode in TIMED_MODES
    )
    return (*prefill, *decode)


def _linear(name: str, variant: str, m: int, k: int, in_bytes: int, out_bytes: int) -> OpCase:
    return OpCase(
        name=name,
        op="linear",
        variant=variant,
        shape=f"({ROWS}, {k}) x ({m}, {k})",
        bytes=ROWS * k * in_bytes + m * k * in_bytes + ROWS * m * out_bytes,
        flops=2 * ROWS * m * k,
    )


def _scan(name: str, variant: str, u_bytes: int) -> OpCase:
    # Read u, dt, z (d each) and B, C (n each), int8 but for u; write y in float32. A state element takes the
    # decay's product and exponential, the driven term, and a multiply-add each of recurrence and output.
    per_token = D_INNER * (u_bytes + 2) + 2 * D_STATE + 4 * D_INNER
    return OpCase(
        name=name,
        op="selective_scan",
        variant=variant,
        shape=f"b={PREFILL_BATCH} l={PREFILL_LENGTH} d={D_INNER} n={D_STATE}",
        bytes=ROWS * per_token,
        flops=7 * ROWS * D_INNER * D_STATE,
    )


def _conv(name: str, variant: str, out_bytes: int) -> OpCase:
    return OpCase(
        name=name,
        op="causal_conv1d",
        variant=variant,
        shape=f"b={PREFILL_BATCH} l={PREFILL_LENGTH} d={D_INNER} w={D_CONV}",
        bytes=ROWS * D_INNER * (1 + out_bytes),
        flops=2 * ROWS * D_INNER * D_CONV,
    )


MODEL_CASES = _model_cases()
OP_CASES = (
    OpCase(
        name="rms_norm-i8",
        op="rms_norm",
        variant="i8",
        shape=f"({ROWS}, {D_MODEL})",
        bytes=ROWS * D_MODEL * (4 + 1),
        flops=4 * ROWS * D_MODEL,
    ),
    _linear("in_proj-i8", "in_proj_i8", 2 * D_INNER, D_MODEL, 1, 1),
    _linear("in_proj-f32", "in_proj_f32", 2 * D_INNER, D_MODEL, 4, 4),
    _linear("out_proj-i8", "out_proj_i8", D_MODEL, D_INNER, 1, 4),
    _conv("causal_conv1d-i8-i8", "i8_i8", 1),
    _conv("causal_conv1d-i8-f32", "i8_f32", 4),
    _scan("selective_scan-chunked-i8", "chunked_i8", 1),
    _scan("selective_scan-sequential-f32", "sequential_f32", 4),
    OpCase(
        name="hadamard-i8",
        op="hadamard",
        variant="i8",
        shape=f"({ROWS}, {D_INNER})",
        bytes=ROWS * D_INNER * (4 + 1),
        # A butterfly of log2(512) additions an element; the implementation may do more.
        flops=9 * ROWS * D_INNER,
    ),
)
CASES: Mapping[str, ModelCase | OpCase] = MappingProxyType(
    {case.name: case for case in (*MODEL_CASES, *OP_CASES)}
)
