"""How long-running work reports its progress without knowing who shows it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeAlias

# Called with the number of units finished since the last call.
Advance: TypeAlias = Callable[[int], None]


class Progress(Protocol):
    """Opens one progress line: ``with progress("calibrating", 512) as advance: advance(8)``."""

    def __call__(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Open a line of ``total`` units; the value of the context advances it."""


@contextmanager
def silent(description: str, total: int) -> Iterator[Advance]:  # noqa: ARG001 (the protocol's signature)
    """A `Progress` that shows nothing."""

    def advance(_units: int) -> None:
        return None

    yield advance


_LISTENERS: list[Callable[[str], None]] = []


def listen(tell: Callable[[str], None]) -> None:
    """Have lines for people told to ``tell``, once for each call of `notice`."""
    if tell not in _LISTENERS:
        _LISTENERS.append(tell)


def notice(text: str) -> None:
    """One line for people from where no progress line is open, as when kernels are compiled at first use."""
    for tell in _LISTENERS:
        tell(text)
