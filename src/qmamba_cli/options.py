"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Workdir = Annotated[Path, typer.Option("--workdir", help="Folder through which the stages find each other.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use only the Hub's local cache.")]
TokenizerFrom = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or Hub id of the tokenizer, if not the model's own.")
]
BackendName = Annotated[str, typer.Option("--backend", help="auto, cpu or cuda.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where an interrupted run with this --output stopped.")
]
DEFAULT_WORKDIR = Path("qmamba-artifacts")
