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
