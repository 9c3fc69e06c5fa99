"""What several stages do alike."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qmamba_cli.artifacts.checkpoint import Checkpoint
from qmamba_cli.artifacts.files import sha256_bytes
from qmamba_cli.artifacts.manifest import ModelRecord
from qmamba_cli.errors import QmambaError, UsageError

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
