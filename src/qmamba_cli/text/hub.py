"""Datasets of the Hugging Face Hub, with a quick and certain answer when the Hub cannot be reached."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qmamba_cli.errors import DatasetError

# The request gives up first where the network answers; the thread's limit also covers a name lookup that
# hangs, which no HTTP timeout reaches. Together with the imports the answer comes within ten seconds.
_REQUEST_SECONDS = 5.0
_PROBE_SECONDS = 7.0


def load_hub_dataset(name: str, config: str | None, split: str, *, offline: bool, hint: str) -> Any:
    """One split of a Hub dataset, memory-mapped from the local cache.

    The Hub is asked once, without retries, which revision it holds. Where it does not answer, or with
    ``offline``, the latest cached copy is used.

    Args:
        name: ``dataset`` or ``organization/dataset``.
        config: configuration, or None for the only one.
        split: for example ``train`` or ``train[:1000]``.
        offline: do not ask the Hub.
        hint: what a user without the Hub can do instead.

    Returns:
        A ``datasets.Dataset``. The libraries log when a cached copy takes the place of the Hub's.

    Raises:
        DatasetError: the Hub cannot be reached and nothing is cached, or it has no such dataset,
            configuration or split.
    """
    where = _describe(name, config, split)
    reason = "offline operation was asked for" if offline else ""
    revision = None
    if not offline:
        try:
            revision = _revision(name)
        except _UnreachableError as error:
            reason = str(error)
    if revision is None:
        return _load_cached(name, config, split, reason=reason, hint=hint)
    # Imported here: half a second, needed for Hub names only.
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    # The libraries below raise errors of many packages (HTTP, file systems, Arrow) and list none of them.
    except Exception as error:
        raise DatasetError(
            f"{where}: cannot be loaded from the Hub, got {_one_line(error)}", hint=hint
        ) from error


class _UnreachableError(Exception):
    """The Hub gave no usable answer."""


def _revision(name: str) -> str:
    """Commit of the dataset's main branch.

    Raises:
        DatasetError: the Hub answered that it has no such dataset.
        _UnreachableError: no answer in time, or a server error.
    """
    answer: list[str] = []
    failure: list[Exception] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            answer.append(HfApi().dataset_info(name, timeout=_REQUEST_SECONDS).sha or "main")
        # Handed to the caller's thread, which sorts it.
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    if answer:
        return answer[0]
    if not failure:
        raise _UnreachableError(f"no answer within {_PROBE_SECONDS:.0f} s")

    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    error = failure[0]
    if isinstance(error, RepositoryNotFoundError):
        raise DatasetError(
            f"`{name}`: no such dataset on the Hub, or it is private or gated",
            hint="check the spelling, or log in with `hf auth login`",
        ) from error
    if isinstance(error, HFValidationError):
        raise DatasetError(f"`{name}`: not a Hub name, got {_one_line(error)}") from error
    raise _UnreachableError(_one_line(error)) from error


def _load_cached(name: str, config: str | None, split: str, *, reason: str, hint: str) -> Any:
    """The latest cached copy of a dataset.

    Raises:
        DatasetError: there is none.
    """
    import datasets

    where = _describe(name, config, split)
    with _without_network(datasets):
        try:
            return datasets.load_dataset(name, config, split=split)
        except ConnectionError:
            raise DatasetError(
                f"{where}: the Hub cannot be reached ({reason}) and there is no cached copy", hint=hint
            ) from None
        # See load_hub_dataset; here for instance a configuration or split that was never downloaded.
        except Exception as error:
            raise DatasetError(
                f"{where}: the Hub cannot be reached ({reason}) and the cached copy is of no use, "
                f"got {_one_line(error)}",
                hint=hint,
            ) from error


@contextmanager
def _without_network(datasets: Any) -> Iterator[None]:
    """Turn the library's own retries off: five of them, 24 s, although the Hub is known to be away."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _describe(name: str, config: str | None, split: str) -> str:
    return f"dataset `{name}`" + (f", configuration `{config}`" if config else "") + f", split `{split}`"


def _one_line(error: Exception) -> str:
    """The first line of an error's text, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
