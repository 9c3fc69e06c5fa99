"""Writing the outcome of one command to several files: each whole or not at all."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from qmamba_cli.artifacts.files import atomic_file, check_output
from qmamba_cli.errors import UsageError


def check_reports(paths: Iterable[Path | None], *, force: bool) -> None:
    """Refuse output paths before any work is done for them.

    Args:
        paths: None for what was not asked for.
        force: whether existing files may be replaced.

    Raises:
        UsageError: two of them are the same file.
        QmambaError: a file exists and ``force`` is false, or cannot be written.
    """
    seen: set[Path] = set()
    for path in paths:
        if path is None:
            continue
        if path.resolve() in seen:
            raise UsageError(
                f"two outputs go to one file, got `{path}` twice, expected a file each",
                hint="give every output a name of its own",
            )
        seen.add(path.resolve())
        check_output(path, force=force)


def save_reports(texts: Mapping[Path, str], *, force: bool) -> None:
    """Write each text to its file.

    Raises:
        QmambaError: a file exists and ``force`` is false, or cannot be written.
    """
    for path, text in texts.items():
        with atomic_file(path, force=force) as temporary:
            temporary.write_text(text, encoding="utf-8")
