"""Calibration text: where it comes from and which pieces of it become samples.

`open_documents` gives random access to a source without holding its text, `choose_samples` cuts token windows
from it, and `sample_from_model` asks the model itself for text. Nothing here imports torch.
"""

from qmamba_cli.text.documents import BUNDLED, SELF, Documents, TextFile, open_documents
from qmamba_cli.text.hub import load_hub_dataset
from qmamba_cli.text.sampling import (
    SELF_BATCH,
    Encoder,
    Generate,
    Samples,
    choose_samples,
    sample_from_model,
)

__all__ = [
    "BUNDLED",
    "SELF",
    "SELF_BATCH",
    "Documents",
    "Encoder",
    "Generate",
    "Samples",
    "TextFile",
    "choose_samples",
    "load_hub_dataset",
    "open_documents",
    "sample_from_model",
]
