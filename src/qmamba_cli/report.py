"""How each command's outcome is shown: a short table for people, or one JSON object."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmamba_cli import console
from qmamba_cli.console import Column
from qmamba_cli.errors import (
    ArtifactError,
    CheckpointError,
    DatasetError,
    DeviceError,
    QmambaError,
    UsageError,
)
from qmamba_cli.modes import COLUMNS, MODES
from qmamba_cli.progress import Progress
from qmamba_cli.sites import site_keys

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qmamba_cli.stages.calibrate import CalibrateReport
    from qmamba_cli.stages.demo import DemoOptions
    from qmamba_cli.stages.export import ExportReport
    from qmamba_cli.stages.inspect import Check, Inspection
    from qmamba_cli.stages.parts import Part
    from qmamba_cli.stages.selftest import Compiled, Outcome

_DIGEST = 12
# How much of lm-eval's layout a person wants to see, and in what order.
_METRICS = ("acc", "perplexity", "bits_per_token", "top1_acc", "kl", "same_top1")
# The next step where an error names none.
_NEXT_STEPS: Mapping[type[QmambaError], str] = {
    ArtifactError: "copy the artifact again, or make it again with `qmamba calibrate` and `qmamba export`",
    CheckpointError: "name another checkpoint, or `demo`, the bundled model",
    DatasetError: "correct the text, or use the bundled one: `--dataset bundled`, `--task lastword`",
    DeviceError: "use the CPU: `--backend cpu`, or `--device cpu` of `qmamba calibrate`",
}
# How the parser of options says what it wanted.
_WANTED = "Input should be "
_BARE_OPTION = re.compile(r"(?<![\w`-])--?[a-zA-Z][\w-]*(?![\w`-])")


def problem_of(error: BaseException, arguments: Sequence[str]) -> QmambaError:
    """What went wrong in this program's manner, with a next step: the error's own or that of its kind.

    Args:
        error: one of this program's errors, a `MemoryError`, or a complaint of the parser of options.
        arguments: the command line after the program's name.
    """
    if isinstance(error, MemoryError):
        return QmambaError("out of memory", hint="try a smaller `--batch-size` or `--seqlen`")
    problem = error if isinstance(error, QmambaError) else _usage_error(error, arguments)
    if not problem.hint:
        command = " ".join(["qmamba", *arguments[:1]])
        problem.hint = _NEXT_STEPS.get(type(problem), f"`{command} --help` lists the options")
    return problem


def _usage_error(error: Any, arguments: Sequence[str]) -> UsageError:
    context = getattr(error, "ctx", None)
    command = "qmamba" if context is None else context.command_path
    text = error.format_message().strip().rstrip(".").replace("'", "`")
    options: Sequence[str] = getattr(getattr(error, "param", None), "opts", ())
    if _WANTED in text and options:
        wanted = text.partition(_WANTED)[2].partition(",")[0]
        text = f"invalid value of `{options[0]}`, got `{_given(options, arguments)}`, expected {wanted}"
    text = _BARE_OPTION.sub(r"`\g<0>`", text)
    return UsageError(text[:1].lower() + text[1:], hint=f"`{command} --help` lists the options")


def _given(options: Sequence[str], arguments: Sequence[str]) -> str:
    """What the command line says behind one of an option's names; the last word where it is given twice."""
    given = ""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in options:
            given = value if equals else following
    return given


def show_calibration(report: "CalibrateReport", *, dry_run: bool, as_json: bool) -> None:
    """The outcome of `calibrate`."""
    clip = report.widest_clip
    if as_json:
        values = asdict(report) | {"path": str(report.path), "dry_run": dry_run}
        if clip is not None:
            values["widest_clip"] = dict(zip(("site", "absmax", "observed"), clip, strict=True))
        console.write_json(values)
        return
    rows = {
        "artifact": f"{report.path} (not written)" if dry_run else str(report.path),
        "digest": report.digest[:_DIGEST],
        "sites": str(report.sites),
        "samples": str(report.samples),
        "tokens": f"{report.tokens:,}",
        "widest clip": "none"
        if clip is None
        else f"{clip[0]} at {clip[1]:.4g}, {clip[1] / clip[2]:.0%} of its maximum",
        "device": report.device,
    }
    if report.skipped_short:
        rows["too short"] = f"{report.skipped_short:,} rows passed over"
    if dry_run:
        del rows["digest"], rows["widest clip"]
    console.facts("calibration" if not dry_run else "calibration (dry run)", rows)


def show_export(report: "ExportReport", *, dry_run: bool, as_json: bool) -> None:
    """The outcome of `export`."""
    if as_json:
        values = asdict(report) | {"path": str(report.path), "dry_run": dry_run}
        values["parts"] = [
            {"part": part.name, "bytes": part.bytes, "bits_per_weight": part.bits_per_weight}
            for part in report.parts
        ]
        console.write_json(values)
        return
    written = "not written" if dry_run else f"digest {report.digest[:_DIGEST]}"
    size = f"{console.size(report.bytes)}, {report.bits_per_weight:.2f} bits per weight"
    _show_parts(f"{report.path}: {size}, {written}", report.parts)


def _show_parts(title: str, parts: "Sequence[Part]") -> None:
    total = sum(part.bytes for part in parts)
    columns = (Column("part"), Column("size", True), Column("share", True), Column("bits per weight", True))
    rows = [
        (
            part.name,
            console.size(part.bytes),
            f"{part.bytes / total:.1%}",
            "" if part.bits_per_weight is None else f"{part.bits_per_weight:.2f}",
        )
        for part in parts
    ]
    console.table(title, columns, rows)


def show_results(results: Mapping[str, Any], *, output: Path | None, as_json: bool) -> None:
    """The outcome of `run --task`."""
    if as_json:
        from qmamba_cli.evaluation.results import to_json

        console.write(to_json(results))
        return
    extra = results["qmamba"]
    for task, metrics in results["results"].items():
        counts = results["n-samples"][task]
        title = (
            f"{task}: mode {extra['mode']['name']}, {extra['weights']}, {extra['backend']}, "
            f"{counts['effective']} of {counts['original']}, {extra['seconds']:.1f} s"
        )
        columns = (Column("metric"), Column("value", True), Column("standard error", True))
        rows = [
            (name, _number(metrics[f"{name},none"]), _number(metrics.get(f"{name}_stderr,none")))
            for name in _METRICS
            if f"{name},none" in metrics
        ]
        console.table(title, columns, rows)
    if output is not None:
        console.note(f"results written to {output}")


def _number(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.5g}"


def show_modes(*, as_json: bool) -> None:
    """The table of modes."""
    if as_json:
        rows = [
            {"name": row.name, "summary": row.summary, **row.columns(), "variables": sorted(row.variables)}
            for row in MODES.values()
        ]
        console.write_json({"modes": rows, "columns": {name: list(kind) for name, kind in COLUMNS.items()}})
        return
    columns = [Column("mode"), *(Column(name) for name in COLUMNS), Column("selected by")]
    cells = [
        (row.name, *row.columns().values(), " ".join(sorted(row.variables)) or "-") for row in MODES.values()
    ]
    console.table("numeric modes", columns, cells)
    console.facts("", {row.name: row.summary for row in MODES.values()})


def show_inspection(inspection: "Inspection", *, as_json: bool) -> None:
    """The outcome of `inspect`."""
    if as_json:
        console.write_json(inspection.to_dict())
        return
    manifest = inspection.manifest
    dataset = getattr(manifest, "dataset", None) or manifest.calibration.dataset  # type: ignore[union-attr]
    config = manifest.model.config
    rows = {
        "format": f"{manifest.FORMAT} {manifest.format_version}, by qmamba-cli {manifest.tool_version}",
        "digest": manifest.content_digest,
        "model": f"{manifest.model.source}, digest {manifest.model.digest[:_DIGEST]}",
        "sizes": ", ".join(f"{name} {config[name]}" for name in ("n_layer", "d_model", "d_inner", "d_state")),
        "text": f"{dataset.dataset}, {dataset.samples} x {dataset.seqlen} tokens, seed {dataset.seed}",
    }
    quantization = getattr(manifest, "quantization", None)
    if quantization is None:
        rows["observers"] = f"alpha {manifest.alpha}, reduction {manifest.reduction}"  # type: ignore[union-attr]
    else:
        group = "" if quantization.group_size is None else f", groups of {quantization.group_size}"
        rows["weights"] = f"W{quantization.w_bits}A8{group}, embedding {quantization.embedding_bits} bits"
        rows["calibration"] = f"digest {manifest.calibration.digest[:_DIGEST]}, alpha {quantization.alpha}"  # type: ignore[union-attr]
        rows["bits per weight"] = f"{inspection.bits_per_weight:.2f}"
    rows["made with"] = ", ".join(f"{name} {version}" for name, version in manifest.created_by.items())
    console.facts(str(inspection.path), rows)
    if inspection.parts:
        _show_parts("", inspection.parts)
    columns = (Column("site"), Column("observer"), Column("absmax", True), Column("observations", True))
    sites = [
        (
            key,
            site.observer.value + ("" if site.alpha is None else f" {site.alpha}"),
            f"{site.absmax:.4g}",
            f"{site.observations:,}",
        )
        for key, site in ((key, manifest.sites[key]) for key in site_keys(int(config["n_layer"] or 0)))
    ]
    console.table("sites", columns, sites)


def show_checks(path: Path, checks: "Sequence[Check]", *, as_json: bool) -> None:
    """The outcome of `verify`.

    Raises:
        ArtifactError: a check failed.
    """
    failed = [check for check in checks if check.verdict.value == "failed"]
    if as_json:
        rows = [{"what": row.what, "verdict": row.verdict.value, "detail": row.detail} for row in checks]
        console.write_json({"path": str(path), "ok": not failed, "checks": rows})
    else:
        columns = (Column("check"), Column("verdict"), Column("detail"))
        console.table(
            f"verify {path}", columns, [(row.what, row.verdict.value, row.detail) for row in checks]
        )
    if failed:
        raise ArtifactError(
            f"{failed[0].what} failed: {failed[0].detail}",
            hint="copy the artifact again, or make it again with `qmamba calibrate` and `qmamba export`",
        )


def show_demo(options: "DemoOptions", *, progress: Progress, as_json: bool) -> None:
    """Run the demo and show each step's outcome and the table of modes."""
    from qmamba_cli.stages import demo

    if not as_json:
        console.note(
            f"$ qmamba calibrate {demo.MODEL} --samples {options.samples} --workdir {options.folder}"
        )
    calibrated, exported = demo.prepare(options, progress=progress)
    if not as_json:
        show_calibration(calibrated, dry_run=False, as_json=False)
        console.note(f"$ qmamba export --out {exported.path} --workdir {options.folder}")
        show_export(exported, dry_run=False, as_json=False)
        console.note(f"$ qmamba run --mode MODE --task lastword --workdir {options.folder}   (each mode)")
    rows = []
    for row in demo.rows(options, progress=progress):
        rows.append(row)
        if not as_json:
            console.note(f"mode {row.mode}: {row.seconds:.1f} s")
    if as_json:
        console.write_json(
            {
                "calibration": str(calibrated.path),
                "checkpoint": str(exported.path),
                "modes": [asdict(row) for row in rows],
            }
        )
        return
    columns = (
        Column("mode"),
        Column("last-word accuracy", True),
        Column("perplexity", True),
        Column("KL to float", True),
        Column("seconds", True),
    )
    cells = [
        (
            row.mode,
            f"{row.acc:.3f} ± "
            + (row.acc_stderr if isinstance(row.acc_stderr, str) else f"{row.acc_stderr:.3f}"),
            f"{row.perplexity:.2f}",
            f"{row.kl:.5f}",
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    console.table(
        f"the bundled model, W{options.w_bits}A8, every mode",
        columns,
        cells,
        caption="± is one standard error; KL in nats a token; seconds on this machine",
    )


def show_selftest(outcomes: "Iterable[Outcome]", copy_gb_s: float, *, as_json: bool) -> None:
    """The outcome of `selftest`.

    Raises:
        QmambaError: a kernel strayed from its reference.
    """
    rows = list(outcomes)
    failed = [row for row in rows if not row.passed]
    if as_json:
        from qmamba_cli.evaluation.results import json_safe

        values = [asdict(row) | {"passed": row.passed} for row in rows]
        console.write_json({"copy_gb_s": copy_gb_s, "passed": not failed, "kernels": json_safe(values)})
    else:
        headings = ("worst error", "of budget", "ms", "GB/s", "of copy")
        columns = (
            Column("operator"),
            Column("case"),
            Column("class"),
            *(Column(name, True) for name in headings),
        )
        cells = [
            (
                row.operator,
                row.variant,
                row.exactness.value,
                f"{row.worst:.2g}",
                f"{row.budget_used:.1%}",
                f"{row.ms:.4f}",
                f"{row.gb_s:.0f}",
                f"{row.gb_s / copy_gb_s:.0%}",
            )
            for row in rows
        ]
        caption = f"times include the launch from Python; a device copy runs at {copy_gb_s:.0f} GB/s"
        console.table("every kernel against its reference", columns, cells, caption=caption)
    if failed:
        raise QmambaError(
            f"{len(failed)} of {len(rows)} kernels stray from their reference, first "
            f"{failed[0].operator} ({failed[0].variant}): {failed[0].budget_used:.3g} times its budget",
            hint="use `--backend cpu`, and report this with the output of `qmamba selftest --json`",
        )


def show_compiled(compiled: "Iterable[Compiled]", *, as_json: bool) -> None:
    """The outcome of `selftest --compile-only`."""
    rows = list(compiled)
    if as_json:
        console.write_json({"compiled": [asdict(row) for row in rows]})
        return
    columns = (
        Column("operator"),
        Column("arch"),
        Column("instances", True),
        Column("machine code", True),
        Column("seconds", True),
    )
    cells = [
        (row.operator, row.arch, str(row.entries), console.size(row.bytes), f"{row.seconds:.2f}")
        for row in rows
    ]
    console.table("kernels compiled without a GPU", columns, cells)
