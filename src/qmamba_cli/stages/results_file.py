"""Results files as the last link of the lineage: what they say of the artifact they were measured on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmamba_cli.artifacts.files import reading, sha256_bytes, strict_json
from qmamba_cli.errors import ArtifactError, QmambaError

# Results with a confidence interval a document stay far below it.
_MAX_BYTES = 1 << 26
_HINT = "name a file that `qmamba run --task … --output FILE` wrote"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsFile:
    """A results file that was read.

    Attributes:
        path: the file.
        digest: sha256 of its bytes; results carry no digest of their own.
        document: the JSON object.
    """

    path: Path
    digest: str
    document: Mapping[str, Any]

    @property
    def own(self) -> Mapping[str, Any]:
        """The ``qmamba`` block."""
        block: Mapping[str, Any] = self.document["qmamba"]
        return block

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]:
        """Task → its metrics."""
        tasks: Mapping[str, Mapping[str, Any]] = self.document["results"]
        return tasks

    @property
    def mode(self) -> str:
        """Name of the mode row, or an empty string where there is none."""
        mode = self.own.get("mode")
        return str(mode.get("name", "")) if isinstance(mode, dict) else ""

    def named(self, link: str) -> str | None:
        """The digest that the results name for ``artifact``, ``calibration`` or ``model``, if any."""
        record = self.own.get(link)
        digest = record.get("digest") if isinstance(record, dict) else None
        return digest if isinstance(digest, str) else None

    def located(self, link: str) -> str | None:
        """Where the results say that ``artifact`` lay or that ``model`` came from; None without one."""
        record = self.own.get(link)
        place = record.get("path" if link == "artifact" else "source") if isinstance(record, dict) else None
        return place if isinstance(place, str) else None


def read_results(path: Path) -> ResultsFile:
    """Read a results file.

    Raises:
        QmambaError: it cannot be read.
        ArtifactError: it is not a results file of this program.
    """
    with reading(path), path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ArtifactError(
            f"`{path}` is too large, expected results of at most {_MAX_BYTES} bytes", hint=_HINT
        )
    try:
        document = strict_json(data)
    except ValueError as error:
        raise ArtifactError(f"`{path}` is not valid JSON, got: {error}", hint=_HINT) from None
    tasks = document.get("results") if isinstance(document, dict) else None
    sound = isinstance(tasks, dict) and all(isinstance(metrics, dict) for metrics in tasks.values())
    if not sound or not isinstance(document.get("qmamba"), dict):
        raise ArtifactError(
            f"`{path}` has no `results` and `qmamba`, expected results of `qmamba run`", hint=_HINT
        )
    return ResultsFile(path=path, digest=sha256_bytes(data), document=document)


def is_results(path: Path) -> bool:
    """Whether ``path`` is a file of JSON text, so that only results can be meant.

    Raises:
        QmambaError: it cannot be read.
    """
    if not path.is_file():
        return False
    with reading(path), path.open("rb") as file:
        head = file.read(64)
    # A safetensors file begins with a length, whose high bytes are zeros.
    return head.lstrip()[:1] == b"{" and b"\0" not in head[:8]


def require_lineage(results: ResultsFile, link: str, digest: str) -> None:
    """Refuse results that name another digest.

    Args:
        results: the results.
        link: ``artifact``, ``calibration`` or ``model``.
        digest: what they must name.

    Raises:
        ArtifactError: they name another one, or none.
    """
    found = results.named(link)
    if found != digest:
        raise ArtifactError(
            f"`{results.path}` was measured on another {link}, got digest {found}, expected {digest}",
            hint="name results of this very model; `qmamba verify RESULTS` says where they come from",
        )


def number(value: object) -> float | None:
    """A metric as a finite or infinite number; None for a missing one.

    >>> number(1), number("inf"), number("N/A"), number(True)
    (1.0, inf, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("inf", "-inf", "nan"):
        return None
    return float(value)


def require_exists(path: Path) -> None:
    """Refuse a path with nothing at it.

    Raises:
        QmambaError: nothing is there.
    """
    with reading(path):
        if not path.exists():
            raise QmambaError(f"`{path}` does not exist", hint="name an artifact, a work folder or results")
