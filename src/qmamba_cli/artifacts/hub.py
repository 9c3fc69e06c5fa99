"""Model folders on the Hugging Face Hub, found within seconds or given up.

huggingface_hub asks with no time limit by default, its downloads retry for 20 seconds and more, and a name
server that never answers cannot be interrupted. So one bounded question goes first: which files there are
and, of a model, whether they are served. Only a Hub that answered it is downloaded from.
"""

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmamba_cli.errors import CheckpointError

# Limit of each network operation of the question, and of the whole question, in seconds.
_OPERATION_SECONDS = 4.0
_ANSWER_SECONDS = 6.0
TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
)
_SAFETENSORS_PATTERNS = ("model*.safetensors", "model.safetensors.index.json")
_PICKLE_PATTERNS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?:@(?P<revision>[\w.-][\w./-]{0,127}))?",
    re.ASCII,
)
_LOCAL_WAY = "give a local folder with config.json and safetensors weights, or `demo`, the bundled model"


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository on the Hub.

    Attributes:
        repo: ``organisation/name``.
        revision: a branch, tag or commit, or None for the main branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_hub_id(source: str) -> HubId | None:
    """``organisation/name`` with an optional ``@revision``; None where ``source`` cannot be one.

    >>> parse_hub_id("state-spaces/mamba-130m-hf@main")
    HubId(repo='state-spaces/mamba-130m-hf', revision='main')
    >>> parse_hub_id("./models/x") is None
    True
    """
    match = _HUB_ID.fullmatch(source)
    # The Hub's own rules for names.
    if match is None or re.search(r"\.\.|--|[.-]$", match["repo"]):
        return None
    return HubId(match["repo"], match["revision"])


def fetch(hub_id: HubId, *, weights: bool, offline: bool) -> Path:
    """The folder of the Hub's cache that holds a repository, downloading what is missing.

    A Hub that cannot be reached is asked once, never again, and the cached copy is taken where there is one.

    Args:
        hub_id: the repository.
        weights: fetch config.json, the weights (safetensors where there are any) and the tokenizer; without
            it the tokenizer only.
        offline: use the cached copy without asking.

    Raises:
        CheckpointError: there is no such repository, no access to it, or neither a Hub nor a cached copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class TerminalBar(tqdm):
        """A bar that vanishes where stderr is no terminal."""

        def __init__(self, *args: Any, **options: Any) -> None:
            # The base class has no annotations.
            super().__init__(*args, **{"disable": None, **options})  # type: ignore[no-untyped-call]

    patterns = list(TOKENIZER_PATTERNS)
    if not offline:
        answer = _ask(hub_id, weights=weights)
        if isinstance(answer, Exception):
            return _cached(hub_id, weights=weights, reason=_first_line(answer))
        if weights:
            has_safetensors = any(re.fullmatch(r"model.*\.safetensors", name) for name in answer)
            patterns += ["config.json", *(_SAFETENSORS_PATTERNS if has_safetensors else _PICKLE_PATTERNS)]
        try:
            return Path(
                snapshot_download(
                    hub_id.repo,
                    revision=hub_id.revision,
                    allow_patterns=patterns,
                    tqdm_class=TerminalBar,
                    etag_timeout=_OPERATION_SECONDS,
                )
            )
        except Exception as error:
            # The transport's classes differ among versions of huggingface_hub and share no base class.
            raise CheckpointError(
                f"cannot download `{hub_id}` from the Hugging Face Hub, got `{_first_line(error)}`",
                hint=f"try again: finished files are kept; or {_LOCAL_WAY}",
            ) from None
    return _cached(hub_id, weights=weights, reason="offline")


def _cached(hub_id: HubId, *, weights: bool, reason: str) -> Path:
    """The cached copy of a repository; what is missing inside it shows when it is opened."""
    from huggingface_hub import snapshot_download

    key_file = "config.json" if weights else "tokenizer*"
    try:
        folder = Path(
            snapshot_download(
                hub_id.repo, revision=hub_id.revision, allow_patterns=key_file, local_files_only=True
            )
        )
    except (OSError, ValueError):
        folder = None
    if folder is None or not any(folder.glob(key_file)):
        raise CheckpointError(
            f"cannot get `{hub_id}`: no local folder of that name, no cached copy, and the Hugging Face Hub "
            f"cannot be asked, got `{reason}`",
            hint=_LOCAL_WAY,
        )
    return folder


def _ask(hub_id: HubId, *, weights: bool) -> list[str] | Exception:
    """File names of a repository, or why the Hub gave no answer; definite refusals are raised.

    Raises:
        CheckpointError: the Hub answered that the repository or revision does not exist or is closed.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    outcome: list[list[str] | Exception] = []

    def question() -> None:
        try:
            info = HfApi().model_info(hub_id.repo, revision=hub_id.revision, timeout=_OPERATION_SECONDS)
            names = [sibling.rfilename for sibling in info.siblings or []]
            if weights and "config.json" in names:
                # The list is served from another place than the files, and of closed models too.
                url = hf_hub_url(hub_id.repo, "config.json", revision=info.sha)
                get_hf_file_metadata(url, timeout=_OPERATION_SECONDS)
            outcome.append(names)
        except Exception as error:
            # Handed to the caller; the transport's classes differ among versions of huggingface_hub.
            outcome.append(error)

    thread = threading.Thread(target=question, name="hub-question", daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    answer = outcome[0] if outcome else TimeoutError(f"no answer within {_ANSWER_SECONDS:g} s")
    match answer:
        case GatedRepoError():
            what = f"`{hub_id.repo}` on the Hugging Face Hub is gated, and you have no access to it"
        case RevisionNotFoundError():
            what = f"`{hub_id.repo}` on the Hugging Face Hub has no revision `{hub_id.revision}`"
        case RepositoryNotFoundError():
            what = f"the Hugging Face Hub has no model `{hub_id.repo}`, or it is private"
        case _:
            return answer
    raise CheckpointError(what, hint=f"check the name; or {_LOCAL_WAY}")


def _first_line(error: Exception) -> str:
    """An exception in one short line; where huggingface_hub explains one at length, the one explained."""
    if isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:160] if text else type(error).__name__
