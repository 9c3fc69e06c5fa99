"""Small artifacts that every test of this folder starts from."""

from pathlib import Path
from typing import Any

import numpy as np

from qmamba_cli.artifacts.calibration import write_calibration
from qmamba_cli.artifacts.files import sha256_bytes
from qmamba_cli.artifacts.manifest import (
    CalibrationManifest,
    CalibrationReference,
    DatasetRecord,
    ModelRecord,
    QuantizationRecord,
    QuantizedManifest,
    SiteRecord,
)
from qmamba_cli.artifacts.quantized import write_quantized

# The letters in it are escaped in JSON, where a flipped bit can change `\u00e9` to `\u00E9`.
TOKENIZER = {"tokenizer.json": '{"é": 1}'.encode(), "tokenizer_config.json": b"{}"}
SITES = {
    "layers.0.x_proj:input": SiteRecord(observer="percentile", alpha=0.9995, absmax=1e-05, observations=10),
    "lm_head:input": SiteRecord(observer="minmax", alpha=None, absmax=12.5, observations=3),
}
SCALES = {"layers.0.x_proj:input": 0.125, "lm_head:input": 0.5}
DATASET = DatasetRecord(
    dataset="café.jsonl",
    digest="d" * 64,
    text_column="text",
    sample_ids=[4, 0, 7],
    shuffle=True,
    seed=0,
    samples=3,
    seqlen=16,
    tokens=48,
    batch_size=2,
)
MODEL = ModelRecord(
    source="demo",
    digest="a" * 64,
    config={"d_model": 4, "norm_eps": 1e-05, "conv_bias": True, "bos_token_id": None},
    weight_files={"model.safetensors": "b" * 64},
    tokenizer_files={name: sha256_bytes(data) for name, data in TOKENIZER.items()},
)


def statistics() -> dict[str, np.ndarray]:
    return {
        "layers.0.x_proj:input.histogram": np.arange(5, dtype=np.int64),
        "lm_head:input.absmax": np.array([12.5], dtype=np.float32),
    }


def calibration_manifest(**changes: Any) -> CalibrationManifest:
    fields: dict[str, Any] = {
        "tool_version": "0.1.0",
        "model": MODEL,
        "dataset": DATASET,
        "alpha": 0.9995,
        "reduction": "global",
        "dtype": "fp32",
        "device": "cpu",
        "sites": SITES,
        "created_by": {"python": "3.11.0"},
    }
    return CalibrationManifest(**{**fields, **changes})


def quantized_manifest(**changes: Any) -> QuantizedManifest:
    fields: dict[str, Any] = {
        "tool_version": "0.1.0",
        "model": MODEL,
        "calibration": CalibrationReference(
            digest="c" * 64, dataset=DATASET, alpha=0.9995, reduction="global"
        ),
        "quantization": QuantizationRecord(
            recipe="plain",
            w_bits=4,
            group_size=128,
            embedding_bits=16,
            alpha=0.9995,
            ignore=[],
            weights={"layers.0.in_proj": "w4-g128"},
        ),
        "sites": SITES,
        "created_by": {"python": "3.11.0"},
    }
    return QuantizedManifest(**{**fields, **changes})


def tensors() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        "embeddings.weight": torch.randn(8, 4, generator=generator).to(torch.bfloat16),
        "layers.0.in_proj.qweight": torch.arange(6, dtype=torch.uint8).reshape(3, 2),
        "layers.0.in_proj.scale": np.array([0.5, 0.25, 1.0], dtype=np.float32),
        "layers.0.x_proj.qweight": torch.tensor([[-128, 127, 3]], dtype=torch.int8),
    }


def make_calibration(path: Path, *, force: bool = False, **changes: Any) -> CalibrationManifest:
    return write_calibration(
        path,
        manifest=calibration_manifest(**changes),
        scales=SCALES,
        statistics=statistics(),
        force=force,
    )


def make_quantized(path: Path, *, force: bool = False, **changes: Any) -> QuantizedManifest:
    return write_quantized(
        path, tensors=tensors(), files=TOKENIZER, manifest=quantized_manifest(**changes), force=force
    )
