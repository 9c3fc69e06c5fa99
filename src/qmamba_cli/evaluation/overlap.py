"""Passages that two texts have in common, found as runs of words.

Words are what lies between white space and punctuation, in lower case, so that another layout or spelling of
quotes hides nothing. Thirteen in a row are a passage: shorter runs are common phrases.

Source: Brown et al., "Language Models are Few-Shot Learners" (2020), appendix C.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

RUN = 13
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What an evaluation text shares with a calibration text.

    Attributes:
        documents: documents of the evaluation text.
        too_short: those of fewer than `RUN` words, which cannot be judged.
        shared: positions of the documents that share at least one run of `RUN` words, ascending.
        example: one such run; empty where there is none.
    """

    documents: int
    too_short: int
    shared: tuple[int, ...]
    example: str


def shared_passages(calibration: Iterable[str], evaluation: Sequence[str], *, run: int = RUN) -> Overlap:
    """Find the documents of ``evaluation`` that share a run of words with any text of ``calibration``.

    >>> shared_passages(["It was a dark and stormy night"], ["a dark, and STORMY day", "Dark"], run=4)
    Overlap(documents=2, too_short=1, shared=(0,), example='a dark and stormy')

    Args:
        calibration: texts, read once.
        evaluation: documents; their runs are held in memory.
        run: words in a row, at least 1.
    """
    known: dict[str, list[int]] = {}
    too_short = 0
    for position, text in enumerate(evaluation):
        runs = set(_runs(text, run))
        too_short += not runs
        for found in runs:
            known.setdefault(found, []).append(position)
    shared: set[int] = set()
    examples = set()
    for text in calibration:
        for found in _runs(text, run):
            if found in known:
                shared.update(known[found])
                examples.add(found)
    return Overlap(
        documents=len(evaluation),
        too_short=too_short,
        shared=tuple(sorted(shared)),
        example=min(examples, default=""),
    )


def _runs(text: str, run: int) -> Iterator[str]:
    words = [word.lower() for word in _WORD.findall(text)]
    return (" ".join(words[start : start + run]) for start in range(len(words) - run + 1))
