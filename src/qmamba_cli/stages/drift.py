"""How far each mode parts from the float model as the sequence grows, in prefill and in decode."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.artifacts.manifest import library_versions, tool_version
from qmamba_cli.errors import CheckpointError, UsageError
from qmamba_cli.evaluation.divergence import CONFIDENCE, RESAMPLES
from qmamba_cli.evaluation.documents import perplexity_windows, read_text_documents
from qmamba_cli.evaluation.drift import PATHS, Point, States, point, tokens_read, trace
from qmamba_cli.model.mamba import Mamba, ModelState
from qmamba_cli.model.prepare import float_model
from qmamba_cli.modes import MODES, Mode, Precision, mode_by_name
from qmamba_cli.progress import Advance, Progress, silent
from qmamba_cli.resources import calib_data_path
from qmamba_cli.stages.common import require_checkpoint, within_gpu_memory
from qmamba_cli.stages.drift_curves import Curve, measured_curves
from qmamba_cli.stages.partial import Keeper, fingerprint_of
from qmamba_cli.stages.run import LoadedModel, ModelOptions, load_model

ALL = "all"
# One of each pair that is equal bit for bit.
DEFAULT_MODES = ("0", "2-1", "2-2", "2-4", "3")


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftOptions:
    """What `drift` is asked; the defaults are the command line's.

    Attributes:
        modes: names of quantized modes; ``all`` alone stands for every one.
        workdir: the work folder.
        checkpoint: the quantized file, or None for the work folder's last export.
        model: the float model, or None for the one the quantized file names.
        data: the text, or None for the bundled passages.
        text_column: field that holds the text of a .jsonl.
        length: tokens a stream.
        streams: pieces of the text that run side by side.
        paths: prefill, decode or both.
        backend: auto, cpu or cuda.
        offline: use only the Hub's local cache.
        keeper: where an interrupted measurement keeps what it has; with None an interrupt is raised.
    """

    modes: Sequence[str] = DEFAULT_MODES
    workdir: Path = Path("qmamba-artifacts")
    checkpoint: Path | None = None
    model: str | None = None
    data: Path | None = None
    text_column: str = "text"
    length: int = 1024
    streams: int = 8
    paths: Sequence[str] = PATHS
    backend: str = "auto"
    offline: bool = False
    keeper: Keeper | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """What `drift` found.

    Attributes:
        curves: by path, then by mode; the last that was measured before an interrupt may be shorter.
        streams: pieces of text that ran.
        length: tokens of each.
        context: how it was made: model, file, text, versions, seconds.
        partial: whether it was interrupted.
    """

    curves: Sequence[Curve]
    streams: int
    length: int
    context: Mapping[str, Any]
    partial: bool = False

    def record(self) -> dict[str, Any]:
        """The report as one JSON object; the HTML page is made of it alone."""
        return {
            "curves": [
                {
                    "mode": one.mode,
                    "path": one.path,
                    "state": MODES[one.mode].state.value,
                    "points": [point.record() for point in one.points],
                }
                for one in self.curves
            ],
            "n": {"streams": self.streams, "length": self.length, "tokens": self.streams * self.length},
            "interval": f"{CONFIDENCE:.0%}, percentiles of {RESAMPLES} bootstrap resamples of streams",
            **({"partial": True} if self.partial else {}),
            "qmamba": dict(self.context),
        }


def drift(options: DriftOptions, *, progress: Progress = silent) -> DriftReport:
    """Measure what quantization and carried state do to long sequences.

    Reads the quantized file, the float model and the text; writes nothing but, when it is interrupted and an
    output is named, the curves so far. Deterministic given these, the options and the machine.

    Raises:
        KeyboardInterrupt: it was interrupted before there was anything to show, or has no keeper.
        UsageError: an option is out of range.
        ArtifactError: the quantized file is damaged or the float model is not the one it was made from.
        DatasetError: the text is shorter than one stream.
    """
    rows = _check_options(options)
    started = time.perf_counter()
    loaded = _load(options, rows[0])
    baseline = _float_model(options, loaded)
    data = options.data or calib_data_path("lastword.jsonl")
    texts = read_text_documents(data, column=options.text_column)
    ids = perplexity_windows(loaded.tokenizer, texts, options.length)[: options.streams]
    circumstances = {
        "backend": baseline.backend.name,
        "tool_version": tool_version(),
        "versions": library_versions(),
        "threads": torch.get_num_threads(),
    }
    record = {
        **loaded.provenance,
        # The file's path may change, its digest not.
        "artifact": loaded.provenance["artifact"]["digest"],
        **circumstances,
        "modes": [mode.columns() for mode in rows],
        "paths": list(options.paths),
    }

    @lru_cache(maxsize=1)
    def model_in(mode: Mode) -> Mamba:
        return (loaded if mode is rows[0] else _load(options, mode)).model

    with within_gpu_memory(len(ids)):
        with progress("running the float model", tokens_read(options.length, PATHS[0])) as advance:
            expected = list(trace(baseline, ids, _reader(baseline), path=PATHS[0], advance=advance))

        def follow(mode: Mode, path: str, advance: Advance) -> Iterator[Point]:
            model = model_in(mode)
            steps = trace(model, ids, _reader(model), path=path, advance=advance)
            for reference, got in zip(expected, steps, strict=True):
                yield point(baseline, reference, model, got)

        curves, partial = measured_curves(
            [(mode, path) for mode in rows for path in options.paths],
            follow,
            length=options.length,
            layers=baseline.config.n_layer,
            keeper=options.keeper,
            fingerprint=fingerprint_of(record, [ids]),
            progress=progress,
        )
    curves.sort(key=lambda one: options.paths.index(one.path))
    return DriftReport(
        curves=curves,
        streams=len(ids),
        length=options.length,
        partial=partial,
        context={
            "command": "drift",
            **loaded.provenance,
            "data": None if options.data is None else str(options.data),
            **circumstances,
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


def _check_options(options: DriftOptions) -> list[Mode]:
    if options.length < 2:
        raise UsageError(f"`--length` must be at least 2, got {options.length}")
    if options.streams < 1:
        raise UsageError(f"`--streams` must be at least 1, got {options.streams}")
    if not options.paths:
        raise UsageError(
            "expected one of `--prefill` and `--decode`, got neither", hint="leave both out to measure both"
        )
    names = list(dict.fromkeys(options.modes))
    if names == [ALL]:
        return [mode for mode in MODES.values() if mode.precision is Precision.INT8]
    rows = [mode_by_name(name) for name in names]
    for row in rows:
        if row.precision is not Precision.INT8:
            raise UsageError(
                f"`--modes`: got `{row.name}`, the float model that every mode is compared with",
                hint="name quantized modes, or `all`",
            )
    if not rows:
        raise UsageError("`--modes` is empty, expected at least one mode", hint="`--modes 0,2-4`")
    return rows


def _load(options: DriftOptions, mode: Mode) -> LoadedModel:
    return load_model(
        ModelOptions(
            mode=mode,
            workdir=options.workdir,
            checkpoint=options.checkpoint,
            backend=options.backend,
            offline=options.offline,
        )
    )


def _float_model(options: DriftOptions, loaded: LoadedModel) -> Mamba:
    record = loaded.provenance["model"]
    source = options.model or record["source"]
    try:
        checkpoint = open_checkpoint(source, offline=options.offline)
    except CheckpointError as error:
        if options.model is None:
            error.hint = f"the quantized file names it; pass `--model` if it is elsewhere. {error.hint}"
        raise
    require_checkpoint(
        checkpoint,
        record["digest"],
        f"`{loaded.name}` was made from",
        hint="name the float model that the quantized file was made from: `--model MODEL`",
    )
    backend = loaded.model.backend
    weights = float_model(checkpoint.config, checkpoint.load, device=backend.device)
    return Mamba(weights, MODES["fp"], backend)


def _reader(model: Mamba) -> Callable[[ModelState], States]:
    """Takes the scan states out of a model's state, in real units whatever their grid."""

    def read(state: ModelState) -> States:
        states = []
        for layer, block in enumerate(state):
            scale = model.weights.blocks[layer].scales.ssm_state
            if block.ssm.dtype == torch.int8 and scale is not None:
                states.append(model.backend.dequantize(block.ssm, scale))
            else:
                states.append(block.ssm.clone())
        return states

    return read
