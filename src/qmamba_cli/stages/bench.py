"""How fast a model runs: first-token and per-token time of every mode beside the float model, in one run."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from qmamba_cli.artifacts.manifest import tool_version
from qmamba_cli.artifacts.quantized import read_quantized
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import QmambaError, UsageError
from qmamba_cli.kernels.backend import Backend, select_backend
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.modes import MODES, Mode, Precision
from qmamba_cli.progress import Progress, silent
from qmamba_cli.stages.bench_machine import machine, peak_host_bytes
from qmamba_cli.stages.bench_measure import Counts, Measured, Spread, Timed, timed
from qmamba_cli.stages.bench_peer import peer
from qmamba_cli.stages.load import quantized_provenance
from qmamba_cli.stages.run import ModelOptions, load_model

# d_model and n_layer of the published state-spaces/mamba models; what else there is follows from d_model.
SHAPES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
)
DEFAULT_MODES = ("0", "2-4", "3")
_VOCABULARY = 50280
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is timed.

    Attributes:
        modes: the rows; a row with precision=fp32 is the float baseline and changes nothing beside it.
        checkpoint: the quantized file, or None for the work folder's last export.
        shape: one of `SHAPES` in place of a file: random weights, nothing is downloaded.
        w_bits: bits of in_proj and out_proj of the random weights, each timed.
        workdir: the work folder.
        backend: auto, cpu or cuda.
        batch_sizes: rows at once, each timed.
        prompt_lengths: tokens of a prompt, each timed.
        new_tokens: one-token steps that are timed.
        repeat: prompts that are timed.
        warmup: prompts and steps before those that are timed.
        baseline: also time the float model, fp16 on a GPU and fp32 on a CPU.
        breakdown: also time each operator.
    """

    modes: Sequence[Mode] = tuple(MODES[name] for name in DEFAULT_MODES)
    checkpoint: Path | None = None
    shape: str | None = None
    w_bits: Sequence[int] = (4, 8)
    workdir: Path = Path("qmamba-artifacts")
    backend: str = "auto"
    batch_sizes: Sequence[int] = (1,)
    prompt_lengths: Sequence[int] = (512,)
    new_tokens: int = 64
    repeat: int = 10
    warmup: int = 3
    baseline: bool = True
    breakdown: bool = False

    def __post_init__(self) -> None:
        counts = {
            "batch-size": self.batch_sizes,
            "prompt-length": self.prompt_lengths,
            "new-tokens": (self.new_tokens,),
            "repeat": (self.repeat,),
        }
        for name, values in counts.items():
            for value in values:
                if value < 1:
                    raise UsageError(f"`--{name}` must be at least 1, got {value}")
        if self.warmup < 0:
            raise UsageError(f"`--warmup` must be at least 0, got {self.warmup}")
        if not (self.modes or self.baseline):
            raise UsageError("no mode is left to time, expected at least one `--mode`")
        if self.shape is None:
            return
        if self.shape not in SHAPES:
            raise UsageError(f"unknown shape `{self.shape}`, expected one of {', '.join(SHAPES)}")
        if self.checkpoint is not None:
            raise UsageError(
                "`--shape` makes random weights, got `--checkpoint` beside it, expected one of them"
            )
        for bits in self.w_bits:
            if bits not in (4, 8):
                raise UsageError(f"`--w-bits` must be 4 or 8, got {bits}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One model at one batch size and prompt length.

    Attributes:
        mode: name of the row, or of the peer.
        weights: format of the weights, as in ``W4A8``.
        batch_size: rows at once.
        prompt_length: tokens of a prompt.
        load_s: seconds until the model was ready.
        measured: times and memory; None where it did not run.
        first_token_speedup: the float row's time over this one's; None without a float row.
        token_speedup: likewise for one step.
        error: why it did not run.
    """

    mode: str
    weights: str
    batch_size: int
    prompt_length: int
    load_s: float
    measured: Measured | None = None
    first_token_speedup: float | None = None
    token_speedup: float | None = None
    error: str | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether this is the float model that the others are compared with."""
        return self.mode in MODES and MODES[self.mode].precision is Precision.FP32

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of all rows together, from the median step."""
        return None if self.measured is None else 1e3 * self.batch_size / self.measured.token_ms.median

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """The outcome of `bench`.

    Attributes:
        model: the file or the shape.
        config: sizes of the model.
        machine: device, driver and versions.
        settings: counts of what was timed.
        rows: one a model, batch size and prompt length.
        host_bytes: largest memory of the process so far, or None where the system does not say.
        notes: what a reader must know beside the numbers.
        provenance: the file, its calibration and float model by digest; empty with random weights.
        partial: whether it was interrupted, so that only the first rows are there.
    """

    model: str
    config: MambaConfig
    machine: Mapping[str, str]
    settings: Mapping[str, int]
    rows: Sequence[BenchRow]
    host_bytes: int | None
    notes: Sequence[str] = field(default_factory=tuple)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "config": self.config.to_dict(),
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "rows": [row.to_dict() for row in self.rows],
            "peak_host_bytes": self.host_bytes,
            "notes": list(self.notes),
            **({"qmamba": dict(self.provenance)} if self.provenance else {}),
            **({"partial": True} if self.partial else {}),
        }


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model that is timed, made when its turn comes."""

    mode: str
    weights: str
    make: Callable[[], Mamba]


def bench(options: BenchOptions, *, progress: Progress = silent) -> BenchReport:
    """Time every model that the options name; reads the file and writes nothing.

    A model that does not fit into the GPU's memory becomes a row that says so. Interrupted, it returns the
    rows so far; it cannot go on later, since only times of one run are comparable.

    Raises:
        KeyboardInterrupt: it was interrupted before the first row.
        UsageError: the options contradict each other.
        ArtifactError: the quantized file is damaged.
        DeviceError: the backend cannot run here.
        QmambaError: nothing could be timed.
    """
    backend = select_backend(options.backend)
    name, config, subjects, provenance = _subjects(options, backend)
    counts = Counts(
        batch_sizes=tuple(dict.fromkeys(options.batch_sizes)),
        prompt_lengths=tuple(dict.fromkeys(options.prompt_lengths)),
        new_tokens=options.new_tokens,
        repeat=options.repeat,
        warmup=options.warmup,
        breakdown=options.breakdown,
    )
    rows: list[BenchRow] = []
    cases = len(counts.batch_sizes) * len(counts.prompt_lengths)
    note, partial = "", False
    try:
        with progress("timing", (len(subjects) + 1) * cases) as advance:
            for subject in subjects:
                for timing in timed(subject.make, backend.device, counts):
                    rows.append(_row(subject.mode, subject.weights, timing))
                    advance(1)
                _release()
            peer_rows, note = peer(config, backend.device, counts)
            rows += [_row("mamba_ssm", "fp16", timing) for timing in peer_rows]
            advance(cases)
    except KeyboardInterrupt:
        if not rows:
            raise
        partial = True
    if all(row.measured is None for row in rows):
        raise QmambaError(f"nothing could be timed: {rows[0].error}", hint=_smaller(options))
    return BenchReport(
        model=name,
        config=config,
        machine={**machine(backend.device), "qmamba-cli": tool_version()},
        settings={"new_tokens": options.new_tokens, "repeat": options.repeat, "warmup": options.warmup},
        rows=_compared(rows),
        host_bytes=peak_host_bytes(),
        notes=(note,) if note else (),
        provenance=provenance,
        partial=partial,
    )


def _smaller(options: BenchOptions) -> str:
    smallest = min(options.batch_sizes)
    return f"try `--batch-size {smallest // 2}`" if smallest > 1 else "try a shorter `--prompt-length`"


def _row(mode: str, weights: str, timing: Timed) -> BenchRow:
    return BenchRow(
        mode=mode,
        weights=weights,
        batch_size=timing.batch_size,
        prompt_length=timing.prompt_length,
        load_s=timing.load_s,
        measured=timing.measured,
        error=timing.error,
    )


def _compared(rows: Sequence[BenchRow]) -> list[BenchRow]:
    floats = {
        (row.batch_size, row.prompt_length): row.measured
        for row in rows
        if row.is_baseline and row.measured is not None
    }

    def ratio(ours: Spread, theirs: Spread) -> float | None:
        return theirs.median / ours.median if ours.median > 0 else None

    compared = []
    for row in rows:
        theirs = floats.get((row.batch_size, row.prompt_length))
        if row.measured is not None and theirs is not None:
            row = replace(
                row,
                first_token_speedup=ratio(row.measured.first_token_ms, theirs.first_token_ms),
                token_speedup=ratio(row.measured.token_ms, theirs.token_ms),
            )
        compared.append(row)
    return compared


def _release() -> None:
    """Give memory back before the next model is made."""
    gc.collect()
    if torch.cuda.is_available():
        # cuBLAS keeps its workspaces, which are not the next model's memory.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _subjects(
    options: BenchOptions, backend: Backend
) -> tuple[str, MambaConfig, list[_Subject], Mapping[str, Any]]:
    provenance: Mapping[str, Any] = {}
    if options.shape is not None:
        config = shape_config(options.shape)
        name, quantized = f"{options.shape}, random weights", list(_random(options, config, backend))
    else:
        path = options.checkpoint or Workdir(options.workdir).resolve_export().path
        artifact = read_quantized(path)
        manifest, provenance = artifact.manifest, quantized_provenance(artifact)
        config = MambaConfig.from_dict(dict(manifest.model.config))
        name, weights = str(path), f"W{manifest.quantization.w_bits}A8"
        quantized = [
            _Subject(mode.name, weights, _loader(mode, path, options.backend)) for mode in _quantized(options)
        ]
    floats = [mode for mode in options.modes if mode.precision is Precision.FP32]
    if options.baseline or floats:
        dtype = torch.float16 if backend.device.type == "cuda" else torch.float32
        label = "fp16" if dtype is torch.float16 else "fp32"
        row = floats[0] if floats else MODES["fp"]
        quantized.insert(0, _Subject(row.name, label, lambda: _float(config, row, dtype, backend)))
    return name, config, quantized, provenance


def _quantized(options: BenchOptions) -> list[Mode]:
    rows = {mode.name: mode for mode in options.modes if mode.precision is Precision.INT8}
    return list(rows.values())


def _loader(mode: Mode, path: Path, backend: str) -> Callable[[], Mamba]:
    return lambda: load_model(ModelOptions(mode=mode, checkpoint=path, backend=backend)).model


def _random(options: BenchOptions, config: MambaConfig, backend: Backend) -> Iterator[_Subject]:
    for bits in dict.fromkeys(options.w_bits):
        for mode in _quantized(options):

            def make(bits: int = bits, mode: Mode = mode) -> Mamba:
                from qmamba_cli.model.random_weights import random_quantized

                return Mamba(random_quantized(config, bits, backend.device, _SEED), mode, backend)

            yield _Subject(mode.name, f"W{bits}A8", make)


def _float(config: MambaConfig, mode: Mode, dtype: torch.dtype, backend: Backend) -> Mamba:
    """The float model with random weights: their values do not change the time, and no download is needed."""
    from qmamba_cli.model.random_weights import random_float

    return Mamba(random_float(config, dtype, backend.device), mode, backend)


def shape_config(name: str) -> MambaConfig:
    """Sizes of a published model.

    >>> shape_config("2.8b").dt_rank
    160

    Source: the config.json of state-spaces/mamba-130m to mamba-2.8b.
    """
    d_model, n_layer = SHAPES[name]
    return MambaConfig(
        d_model=d_model,
        n_layer=n_layer,
        vocab_size=_VOCABULARY,
        d_state=16,
        d_conv=4,
        d_inner=2 * d_model,
        dt_rank=math.ceil(d_model / 16),
    )
