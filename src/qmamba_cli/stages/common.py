"""What several stages do alike."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from qmamba_cli.artifacts.checkpoint import Checkpoint, open_checkpoint
from qmamba_cli.artifacts.files import sha256_bytes
from qmamba_cli.artifacts.manifest import ModelRecord
from qmamba_cli.errors import ArtifactError, CheckpointError, QmambaError, UsageError

# One past the largest seed that every generator takes.
_SEED_LIMIT = 1 << 63


def check_seed(seed: int) -> None:
    """Refuse a seed that some generator of random numbers would not take.

    Raises:
        UsageError: it is not in [0, 2**63).
    """
    if not 0 <= seed < _SEED_LIMIT:
        raise UsageError(f"`--seed` must be at least 0 and less than 2**63, got {seed}")


@contextmanager
def within_gpu_memory(batch_size: int) -> Iterator[None]:
    """Turn a GPU's refusal of memory into an error that names the batch size to try.

    Raises:
        QmambaError: the GPU ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        detail = str(error).partition(".")[0]
        smaller = f"`--batch-size {batch_size // 2}`" if batch_size > 1 else "a shorter `--seqlen`"
        raise QmambaError(
            f"out of GPU memory at batch size {batch_size}, got: {detail}", hint=f"try {smaller}"
        ) from None


def model_record(checkpoint: Checkpoint) -> ModelRecord:
    """The manifest's record of a float checkpoint and its tokenizer."""
    return ModelRecord(
        source=checkpoint.source,
        digest=checkpoint.digest,
        config=checkpoint.config.to_dict(),
        weight_files=checkpoint.weight_files,
        tokenizer_files={name: sha256_bytes(data) for name, data in checkpoint.tokenizer_files.items()},
    )


def matching_checkpoint(
    record: ModelRecord, calibration: str, *, model: str | None, tokenizer: str | None, offline: bool
) -> Checkpoint:
    """Open the checkpoint that a calibration was made for.

    Args:
        record: the calibration's.
        calibration: its path, for messages.
        model: as the user named the checkpoint, or None for the one on record.
        tokenizer: a folder or Hub id to take the tokenizer from, or None for the model's own.
        offline: use only the Hub's local cache.

    Raises:
        CheckpointError: it cannot be opened.
        ArtifactError: its weights or its tokenizer are not those on record.
    """
    source = model or record.source
    try:
        checkpoint = open_checkpoint(source, tokenizer=tokenizer, offline=offline)
    except CheckpointError as error:
        if model is None:
            error.hint = f"the calibration names it; pass `--model` if it is elsewhere. {error.hint}"
        raise
    require_checkpoint(
        checkpoint,
        record.digest,
        f"calibration `{calibration}` was made for",
        hint=f"calibrate this one (`qmamba calibrate {source} --force`), or name the other",
        tokenizer_files=record.tokenizer_files,
    )
    return checkpoint


def require_checkpoint(
    checkpoint: Checkpoint,
    digest: str,
    made: str,
    *,
    hint: str,
    tokenizer_files: Mapping[str, str] | None = None,
) -> None:
    """Hold a checkpoint against the record that an artifact has of it.

    Args:
        checkpoint: an open one.
        digest: of the weights on record.
        made: begins the message, as in "`x` was made from".
        hint: of the error.
        tokenizer_files: name → sha256 on record, or None where only the weights matter.

    Raises:
        ArtifactError: they differ.
    """
    different = "weights" if checkpoint.digest != digest else ""
    if not different and tokenizer_files is not None:
        different = "" if model_record(checkpoint).tokenizer_files == tokenizer_files else "tokenizer"
    if different:
        raise ArtifactError(
            f"{made} another checkpoint: the {different} of `{checkpoint.source}` differ from those it names",
            hint=hint,
        )
