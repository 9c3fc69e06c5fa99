"""What several stages do alike."""

from qmamba_cli.artifacts.checkpoint import Checkpoint
from qmamba_cli.artifacts.files import sha256_bytes
from qmamba_cli.artifacts.manifest import ModelRecord


def model_record(checkpoint: Checkpoint) -> ModelRecord:
    """The manifest's record of a float checkpoint and its tokenizer."""
    return ModelRecord(
        source=checkpoint.source,
        digest=checkpoint.digest,
        config=checkpoint.config.to_dict(),
        weight_files=checkpoint.weight_files,
        tokenizer_files={name: sha256_bytes(data) for name, data in checkpoint.tokenizer_files.items()},
    )
