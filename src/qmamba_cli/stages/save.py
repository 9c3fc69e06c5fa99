"""Writing results: each file whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qmamba_cli.artifacts.files import atomic_file, check_output
from qmamba_cli.evaluation.results import to_json


def samples_path(output: Path) -> Path:
    """Where the sample log of a results file goes.

    >>> samples_path(Path("out/results.json")).as_posix()
    'out/results.samples.jsonl'
    """
    return output.with_name(f"{output.stem}.samples.jsonl")


def check_outputs(output: Path | None, *, log_samples: bool, force: bool) -> None:
    """Refuse output paths before any work is done for them.

    Raises:
        QmambaError: a file exists and ``force`` is false, or cannot be written.
    """
    if output is not None:
        check_output(output, force=force)
        if log_samples:
            check_output(samples_path(output), force=force)


def save_results(
    output: Path, results: Mapping[str, Any], lines: Sequence[str] | None, *, force: bool
) -> None:
    """Write the results and, where there are lines, the sample log beside them.

    Raises:
        QmambaError: a file exists and ``force`` is false, or cannot be written.
    """
    if lines is not None:
        with atomic_file(samples_path(output), force=force) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    with atomic_file(output, force=force) as temporary:
        temporary.write_text(to_json(results), encoding="utf-8")
