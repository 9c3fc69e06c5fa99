"""The model folder's card, with results if there are any, and its way to the Hub."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qmamba_cli.artifacts.folder import MAX_SHARD_BYTES
from qmamba_cli.artifacts.hub import parse_hub_id
from qmamba_cli.artifacts.manifest import CalibrationManifest, QuantizedManifest
from qmamba_cli.errors import UsageError
from qmamba_cli.stages.results_file import ResultsFile, number, read_results, require_lineage

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]*)")
_TAGS = ("mamba", "mamba-1", "qmamba", "quantized", "int8")
# What the card shows of a task, and what larger values mean there.
_METRICS = ("acc", "perplexity", "bits_per_token", "top1_acc", "kl", "same_top1")


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderOptions:
    """What a model folder has beyond the one file.

    Attributes:
        max_shard_bytes: data of a shard, at least 1.
        results: results of this model for its card.
        base_model: Hub id of the float model for the card, or None for the checkpoint's if it is one.
    """

    max_shard_bytes: int = MAX_SHARD_BYTES
    results: Sequence[Path] = ()
    base_model: str | None = None

    def __post_init__(self) -> None:
        if self.max_shard_bytes < 1:
            raise UsageError(f"`--max-shard-size` must be at least 1 byte, got {self.max_shard_bytes}")
        if self.base_model is not None and parse_hub_id(self.base_model) is None:
            raise UsageError(
                f"`--base-model` must be a Hub id, got `{self.base_model}`", hint="as in `organisation/name`"
            )


def parse_size(text: str) -> int:
    """Bytes of a size as people write it, decimal units and binary ones.

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size("64")
    (5000000000, 1572864, 64)

    Raises:
        UsageError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[2] or "B").upper() not in _UNITS:
        raise UsageError(
            f"`--max-shard-size` must be a number with a unit, got `{text}`", hint="as in 5GB, 500MB or 2GiB"
        )
    return int(float(match[1]) * _UNITS[(match[2] or "B").upper()])


def card_results(options: FolderOptions, calibration: CalibrationManifest) -> tuple[ResultsFile, ...]:
    """The results for the card, held against what is known before the weights are quantized.

    Raises:
        QmambaError: a file cannot be read.
        ArtifactError: one is no results file, or was measured on another calibration or checkpoint.
    """
    results = tuple(read_results(path) for path in options.results)
    for row in results:
        require_lineage(row, "model", calibration.model.digest)
        require_lineage(row, "calibration", calibration.content_digest)
    return results


def model_card(
    manifest: QuantizedManifest, results: Sequence[ResultsFile], base_model: str | None = None
) -> str:
    """README.md of a model folder: the Hub's metadata, the recipe and the results. Depends on nothing else.

    Args:
        manifest: sealed.
        results: measured on this model.
        base_model: Hub id of the float model, or None for the manifest's source if it is one.

    Raises:
        ArtifactError: results were measured on another artifact.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    for row in results:
        require_lineage(row, "artifact", manifest.content_digest)
    source = manifest.model.source
    if base_model is None and parse_hub_id(source) is not None and not Path(source).exists():
        base_model = source.partition("@")[0]
    name = f"{_cell(_plain(source))}, {_weights(manifest)}"
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task}, mode {row.mode}",
            metric_type=metric,
            metric_value=value,
        )
        for row in results
        for task, metrics in row.tasks.items()
        for metric, value, _ in _measured(metrics)
        if math.isfinite(value)
    ]
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=None if base_model is None else "quantized",
        library_name="qmamba-cli",
        pipeline_tag="text-generation",
        tags=[*_TAGS, f"{manifest.quantization.w_bits}-bit"],
        model_name=name if measured else None,
        eval_results=measured or None,
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(name, manifest, results, base_model)}"
    return str(ModelCard(text))


def push_to_hub(folder: Path, repo: str, *, private: bool, offline: bool) -> str:
    """Upload a finished model folder.

    Args:
        folder: the model folder.
        repo: ``organisation/name``; made where it does not exist.
        private: whether a new repository is private.
        offline: refuse.

    Returns:
        Where it is.

    Raises:
        UsageError: ``repo`` is no Hub id, or ``offline``.
        QmambaError: the Hub refuses or cannot be reached.
    """
    from qmamba_cli.artifacts.hub_upload import upload

    check_push(repo, offline=offline)
    return upload(folder, repo, private=private)


def check_push(repo: str, *, offline: bool) -> None:
    """Refuse an upload that cannot be, before any work is done for it.

    Raises:
        UsageError: ``repo`` is no Hub id, or ``offline``.
        QmambaError: huggingface_hub is set to be offline.
    """
    from qmamba_cli.artifacts.hub_upload import check_online

    hub_id = parse_hub_id(repo)
    if hub_id is None or hub_id.revision is not None:
        raise UsageError(f"`--push-to-hub` must be a Hub id, got `{repo}`", hint="as in `organisation/name`")
    if offline:
        raise UsageError("`--push-to-hub` needs the network, got `--offline`", hint="leave one of them out")
    check_online()


def _weights(manifest: QuantizedManifest) -> str:
    return f"W{manifest.quantization.w_bits}A8"


def _plain(source: str) -> str:
    """The last part of a source, so that no path of the machine is published."""
    return PurePosixPath(source.partition("@")[0].rstrip("/")).name or "model"


def _measured(metrics: Any) -> list[tuple[str, float, float | None]]:
    """(metric, value, standard error or None) of a task, in the order of the results table."""
    rows = []
    for name in _METRICS:
        value = number(metrics.get(f"{name},none"))
        if value is not None:
            rows.append((name, value, number(metrics.get(f"{name}_stderr,none"))))
    return rows


def _body(
    name: str, manifest: QuantizedManifest, results: Sequence[ResultsFile], base_model: str | None
) -> str:
    plain = f"`{_cell(_plain(manifest.model.source))}`"
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else plain
    lines = [
        f"# {name}",
        "",
        f"{base}, a Mamba-1 language model, quantized to {manifest.quantization.w_bits}-bit weights and "
        "8-bit activations by qmamba-cli. One set of weights serves every numeric mode of that program; "
        "other programs cannot run it.",
        "",
        "```sh",
        "hf download ORGANISATION/NAME --local-dir model",
        "qmamba verify model",
        'qmamba run --checkpoint model --mode 2-4 --prompt "Once upon a time"',
        "```",
        "",
        "## Recipe",
        "",
        *_table(("", ""), _recipe(manifest)),
    ]
    if results:
        lines += ["", "## Results", "", *_results_table(results)]
        lines += ["", "± is one standard error. Measured by `qmamba run` on this model, by digest."]
    return "\n".join([*lines, ""])


def _recipe(manifest: QuantizedManifest) -> list[tuple[str, ...]]:
    quantization, dataset = manifest.quantization, manifest.calibration.dataset
    group = "one scale a row" if quantization.group_size is None else f"groups of {quantization.group_size}"
    schemes = sorted(set(quantization.weights.values()))
    return [
        ("in_proj, out_proj", f"{quantization.w_bits} bits, {group}"),
        ("embedding", f"{quantization.embedding_bits} bits"),
        ("all weight formats", ", ".join(f"`{scheme}`" for scheme in schemes)),
        ("kept finer", ", ".join(f"`{_cell(pattern)}`" for pattern in quantization.ignore) or "none"),
        ("activations", f"int8, one static scale a site; alpha {quantization.alpha}"),
        (
            "calibration text",
            f"{_cell(_plain(dataset.dataset))}, {dataset.samples} x {dataset.seqlen} tokens",
        ),
        ("digest", f"`{manifest.content_digest}`"),
        ("digest of the calibration", f"`{manifest.calibration.digest}`"),
        ("digest of the float checkpoint", f"`{manifest.model.digest}`"),
        (
            "made with",
            ", ".join(f"{name} {version}" for name, version in sorted(manifest.created_by.items())),
        ),
    ]


def _results_table(results: Sequence[ResultsFile]) -> list[str]:
    rows = []
    for row in results:
        for task, metrics in row.tasks.items():
            for metric, value, error in _measured(metrics):
                shown = f"{value:.5g}" + ("" if error is None else f" ± {error:.2g}")
                count = row.document.get("n-samples", {}).get(task, {}).get("effective", "")
                rows.append((_cell(task), _cell(row.mode), str(count), metric, shown))
    return _table(("task", "mode", "n", "metric", "value"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _cell(text: str) -> str:
    """Text from a file as one cell of a Markdown table."""
    return re.sub(r"[\r\n]+", " ", text).replace("|", "\\|").replace("`", "'")
