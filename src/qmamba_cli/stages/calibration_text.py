"""The text of a calibration: all of its samples, and what they share with a text for evaluation."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qmamba_cli.evaluation.documents import read_text_documents
from qmamba_cli.evaluation.overlap import Overlap, shared_passages
from qmamba_cli.model.generate import sample_sequences
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.progress import Progress
from qmamba_cli.stages.spooled import give_memory_back
from qmamba_cli.text import SELF, Samples, choose_samples, open_documents, sample_from_model
from qmamba_cli.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qmamba_cli.stages.calibrate import CalibrateOptions


def all_samples(
    options: "CalibrateOptions",
    tokenizer: Tokenizer,
    model: AbstractContextManager[Mamba] | None,
    progress: Progress,
) -> Samples | None:
    """All of the samples, whatever part of them is observed.

    Args:
        options: what is asked.
        tokenizer: of the model.
        model: brings the float model, where the text is its own.
        progress: told of every sampled token.

    Returns:
        The samples; None where the model would have to make them and is not given.

    Raises:
        DatasetError: the text is missing, malformed or too short.
    """
    if options.dataset == SELF:
        if model is None:
            return None
        with model as loaded:
            samples = _sample_from_model(options, tokenizer, loaded, progress)
        # Before it is given back, since this name may be the last one of the model.
        del loaded
        give_memory_back()
        return samples
    documents = open_documents(options.dataset, text_column=options.text_column, offline=options.offline)
    return choose_samples(
        documents,
        tokenizer,
        samples=options.samples,
        seqlen=options.seqlen,
        seed=options.seed,
        shuffle=options.shuffle,
    )


def overlap_with(path: Path, column: str, tokenizer: Tokenizer, tokens: NDArray[np.int32]) -> Overlap:
    """Passages of an evaluation file that the observed text holds as well.

    Args:
        path: the evaluation text, a .jsonl or a .txt file.
        column: field that holds the text of a .jsonl.
        tokenizer: turns the windows back into text.
        tokens: (samples, seqlen), what is observed.

    Raises:
        DatasetError: the file is missing or malformed.
    """
    evaluation = read_text_documents(path, column=column)
    return shared_passages((tokenizer.decode(window.tolist()) for window in tokens), evaluation)


def _sample_from_model(
    options: "CalibrateOptions", tokenizer: Tokenizer, model: Mamba, progress: Progress
) -> Samples:
    vocab_size = min(tokenizer.vocab_size, model.vocab_size)
    with progress("sampling text from the model", options.samples * options.seqlen) as advance:

        def generate(start: NDArray[np.int64], *, length: int, seed: int) -> NDArray[np.int64]:
            return sample_sequences(
                model, start, length=length, seed=seed, vocab_size=vocab_size, on_tokens=advance
            )

        return sample_from_model(
            generate,
            samples=options.samples,
            seqlen=options.seqlen,
            seed=options.seed,
            vocab_size=vocab_size,
            start_id=tokenizer.prefix_id,
        )
