"""Stage 3: a model in one numeric mode, on a task or a prompt, to results."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.artifacts.manifest import library_versions, tool_version
from qmamba_cli.artifacts.quantized import QuantizedArtifact, read_quantized
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.evaluation.documents import (
    load_lambada_openai,
    load_lastword,
    perplexity_windows,
    read_text_documents,
)
from qmamba_cli.evaluation.results import (
    build_results,
    last_word_metrics,
    perplexity_metrics,
    run_config,
    sample_lines,
)
from qmamba_cli.evaluation.scoring import score_last_word, score_perplexity
from qmamba_cli.evaluation.statistics import BOOTSTRAP_ITERS
from qmamba_cli.evaluation.tasks import Task, task_by_name
from qmamba_cli.kernels.backend import Backend, select_backend
from qmamba_cli.model.generate import generate
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model
from qmamba_cli.model.quantize import quantized_model
from qmamba_cli.model.weights import ModelWeights
from qmamba_cli.modes import MODES, Mode, Precision
from qmamba_cli.progress import Progress, silent
from qmamba_cli.quant.weights import DEFAULT_GROUP_SIZE
from qmamba_cli.sites import SITES, site_key
from qmamba_cli.stages.common import check_seed, within_gpu_memory
from qmamba_cli.tokenizer import Tokenizer

# Below it, logits divided by the temperature leave float32's range.
MIN_TEMPERATURE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model runs, and how.

    Attributes:
        mode: the row.
        workdir: the work folder.
        checkpoint: the quantized file, or None for the work folder's last export.
        model: the float model of a row with precision=fp32.
        backend: auto, cpu or cuda.
        tokenizer: a folder or Hub id to take a float model's tokenizer from, or None for its own.
        offline: use only the Hub's local cache.
    """

    mode: Mode
    workdir: Path = Path("qmamba-artifacts")
    checkpoint: Path | None = None
    model: str | None = None
    backend: str = "auto"
    tokenizer: str | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What is asked of the model.

    Attributes:
        task: name of a built-in task.
        data: a file in place of the task's own texts.
        text_column: field that holds the text of a .jsonl.
        limit: documents (windows) to score, or None for all.
        batch_size: documents a forward pass; it changes the last bits of the scores.
        seqlen: tokens a window of the perplexity task.
        baseline: float model that the perplexity task compares with, or None.
    """

    task: str
    data: Path | None = None
    text_column: str = "text"
    limit: int | None = None
    batch_size: int = 16
    seqlen: int = 512
    baseline: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: in its mode, on its backend.
        tokenizer: its tokenizer.
        provenance: where it comes from, for the results.
        name: the file or checkpoint as named.
    """

    model: Mamba
    tokenizer: Tokenizer
    provenance: Mapping[str, Any]
    name: str


def load_model(options: ModelOptions) -> LoadedModel:
    """Load what a mode needs: the quantized file, or the float checkpoint.

    Raises:
        UsageError: the mode and the inputs do not belong together.
        ArtifactError: the quantized file is damaged.
        QmambaError: an input or the backend is missing.
    """
    backend = select_backend(options.backend)
    if options.mode.precision is Precision.FP32:
        return _load_float(options, backend)
    if options.model is not None:
        raise UsageError(
            f"`--model` belongs to mode fp, got mode {options.mode.name}",
            hint="name the quantized file with `--checkpoint FILE`, or compare with `--baseline MODEL`",
        )
    path = options.checkpoint or Workdir(options.workdir).resolve_export().path
    artifact = read_quantized(path)
    return LoadedModel(
        model=Mamba(assemble(artifact), options.mode, backend),
        tokenizer=Tokenizer.from_files(artifact.files),
        provenance={
            "artifact": {"path": str(path), "digest": artifact.digest},
            "calibration": {"digest": artifact.manifest.calibration.digest},
            "model": {"source": artifact.manifest.model.source, "digest": artifact.manifest.model.digest},
            "weights": f"W{artifact.manifest.quantization.w_bits}A8",
        },
        name=str(path),
    )


def assemble(artifact: QuantizedArtifact) -> ModelWeights:
    """The weights of an open quantized file, as the block reads them.

    Raises:
        ArtifactError: a tensor the model needs is not in the file.
    """
    config = MambaConfig.from_dict(dict(artifact.manifest.model.config))
    tensors = _Tensors(artifact)
    scales: dict[str, float] = {}
    for site in SITES.values():
        values = tensors[f"scales.{site.name}"].tolist()
        layers = range(config.n_layer) if site.per_layer else (None,)
        scales |= {site_key(site.name, layer): value for layer, value in zip(layers, values, strict=True)}
    try:
        return quantized_model(
            config,
            tensors,
            scales,
            group_size=artifact.manifest.quantization.group_size or DEFAULT_GROUP_SIZE,
        )
    except KeyError as error:
        raise ArtifactError(
            f"`{artifact.path}` has no tensor {error}, which its configuration asks for",
            hint=artifact.manifest.REMEDY,
        ) from None


class _Tensors(Mapping[str, torch.Tensor]):
    """Tensors of a quantized file, read when they are asked for."""

    def __init__(self, artifact: QuantizedArtifact) -> None:
        self._artifact = artifact
        self._names = frozenset(artifact.names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._artifact.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _load_float(options: ModelOptions, backend: Backend) -> LoadedModel:
    if options.model is None:
        raise UsageError(
            f"mode {options.mode.name} runs the float model and needs `--model`",
            hint="add `--model MODEL`: a folder, a Hub id or `demo`",
        )
    if options.checkpoint is not None:
        raise UsageError(f"`--checkpoint` holds quantized weights, got mode {options.mode.name}")
    checkpoint = open_checkpoint(options.model, tokenizer=options.tokenizer, offline=options.offline)
    return LoadedModel(
        model=Mamba(float_model(checkpoint.config, checkpoint.load), options.mode, backend),
        tokenizer=Tokenizer.from_files(checkpoint.tokenizer_files),
        provenance={
            "artifact": None,
            "calibration": None,
            "model": {"source": checkpoint.source, "digest": checkpoint.digest},
            "weights": "fp32",
        },
        name=options.model,
    )


def run_task(
    loaded: LoadedModel, options: TaskOptions, *, offline: bool = False, progress: Progress = silent
) -> tuple[dict[str, Any], list[str]]:
    """Score a task.

    Reads the task's texts; writes nothing. Deterministic given the model, the texts, the options and the
    machine.

    Returns:
        The results in lm-eval's layout with a ``qmamba`` block, and the lines of the sample log (none for
        running text).

    Raises:
        UsageError: an option is out of range or does not belong to the task.
        DatasetError: the texts are missing or malformed.
    """
    task = task_by_name(options.task)
    _check_task_options(task, options)
    started = time.perf_counter()
    with within_gpu_memory(options.batch_size):
        if task.is_last_word:
            metrics, original, effective, lines = _run_last_word(loaded, task, options, offline, progress)
        else:
            metrics, original, effective, lines = _run_perplexity(loaded, options, offline, progress)
    model = loaded.model
    results = build_results(
        task,
        metrics,
        original=original,
        effective=effective,
        config=run_config(
            model="qmamba",
            model_args={"name": loaded.name, "mode": model.mode.name},
            batch_size=options.batch_size,
            device=model.backend.name,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_ITERS if task.is_last_word else None,
        ),
        qmamba={
            "mode": {"name": model.mode.name, **model.mode.columns()},
            "backend": model.backend.name,
            "device": str(model.backend.device),
            **loaded.provenance,
            "tool_version": tool_version(),
            "versions": library_versions(),
            "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - started, 3),
        },
        dataset=None if options.data is None else str(options.data),
    )
    return results, lines


def _check_task_options(task: Task, options: TaskOptions) -> None:
    for name in ("limit", "batch_size", "seqlen"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}")
    if task.is_last_word and options.baseline is not None:
        raise UsageError(
            f"`--baseline` belongs to the perplexity task, got `--task {task.name}`",
            hint="`qmamba run --task perplexity --task-data FILE --baseline MODEL`",
        )
    if not task.is_last_word and options.data is None:
        raise UsageError(
            f"`--task {task.name}` needs a text", hint="add `--task-data FILE`, a .txt or a .jsonl"
        )


def _run_last_word(
    loaded: LoadedModel, task: Task, options: TaskOptions, offline: bool, progress: Progress
) -> tuple[dict[str, float | str], int, int, list[str]]:
    if options.data is not None:
        documents = read_text_documents(options.data, column=options.text_column)
    elif task.name == "lastword":
        documents = load_lastword()
    else:
        documents = load_lambada_openai(offline=offline)
    scored = documents[: options.limit]
    scores = score_last_word(
        loaded.model, loaded.tokenizer, scored, batch_size=options.batch_size, progress=progress
    )
    return last_word_metrics(scores), len(documents), len(scored), list(sample_lines(scores))


def _run_perplexity(
    loaded: LoadedModel, options: TaskOptions, offline: bool, progress: Progress
) -> tuple[dict[str, float | str], int, int, list[str]]:
    assert options.data is not None
    texts = read_text_documents(options.data, column=options.text_column)
    windows = perplexity_windows(loaded.tokenizer, texts, options.seqlen)
    baseline = None
    if options.baseline is not None:
        baseline = _load_baseline(options.baseline, loaded, offline)
    scored = windows[: options.limit]
    score = score_perplexity(
        loaded.model, scored, baseline=baseline, batch_size=options.batch_size, progress=progress
    )
    return perplexity_metrics(score), len(windows), len(scored), []


def _load_baseline(source: str, loaded: LoadedModel, offline: bool) -> Mamba:
    checkpoint = open_checkpoint(source, offline=offline)
    if checkpoint.config.vocab_size != loaded.model.vocab_size:
        raise ArtifactError(
            f"baseline `{source}` has a vocabulary of {checkpoint.config.vocab_size}, "
            f"expected {loaded.model.vocab_size}",
            hint="name the float model that the quantized file was made from",
        )
    return Mamba(float_model(checkpoint.config, checkpoint.load), MODES["fp"], loaded.model.backend)


def run_prompt(
    loaded: LoadedModel, prompt: str, *, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Continue a prompt, in pieces of text as they become certain.

    Raises:
        UsageError: the prompt has no tokens, or an option is out of range.
    """
    check_seed(seed)
    if temperature != 0 and not (temperature >= MIN_TEMPERATURE and math.isfinite(temperature)):
        raise UsageError(
            f"`--temperature` must be 0 or a finite number of at least {MIN_TEMPERATURE}, got {temperature}",
            hint="0 takes the most likely token; 1 samples from the model as it is",
        )
    tokenizer = loaded.tokenizer
    decoder = tokenizer.stream_decoder()
    for token in generate(
        loaded.model,
        tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        eos_id=tokenizer.eos_id,
        vocab_size=min(tokenizer.vocab_size, loaded.model.vocab_size),
    ):
        piece = decoder.push(token)
        if piece:
            yield piece
    rest = decoder.flush()
    if rest:
        yield rest
