"""Times the loading of a quantized model onto the GPU, with the memory that it and one decoder take.

    python benchmarks/gpu_load.py [--shape 2.8b] [--bits 4,8] [--batch 1] [--backend cuda]

Writes a quantized file of random weights to a temporary folder, so that it lies in the page cache, and loads
it in a process of its own: the seconds of `load_model`, of `Decoder` and until the first token, the largest
memory of tensors on the GPU, and the largest resident memory of the host, with what of it is the file itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.artifacts.files import sha256_bytes
from qmamba_cli.artifacts.manifest import QuantizedManifest
from qmamba_cli.artifacts.quantized import write_quantized
from qmamba_cli.artifacts.records import (
    CalibrationReference,
    DatasetRecord,
    ModelRecord,
    QuantizationRecord,
    SiteRecord,
)
from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.model.quantize import Recipe, weight_schemes
from qmamba_cli.model.random_weights import random_quantized
from qmamba_cli.model.weights import LinearWeights, ModelWeights, SiteScales
from qmamba_cli.modes import MODES
from qmamba_cli.quant.packing import pack_uint4
from qmamba_cli.sites import SITES, ObserverKind, site_key
from qmamba_cli.stages.bench import shape_config
from qmamba_cli.stages.export import scale_tensors

_ALPHA = 0.9995
_NO_DIGEST = "0" * 64


def stored(weights: ModelWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a quantized file."""
    table = weights.embedding
    if table.dtype == torch.int8:
        assert weights.embedding_scale is not None
        yield "embeddings.qweight", table
        yield "embeddings.scale", weights.embedding_scale
    else:
        yield "embeddings.weight", table.to(torch.float16)
    yield "norm_f.weight", torch.ones(weights.config.d_model) if weights.norm_f is None else weights.norm_f
    for layer, block in enumerate(weights.blocks):
        at = f"layers.{layer}"
        for name, linear in (("in_proj", block.in_proj), ("out_proj", block.out_proj)):
            yield from projection(f"{at}.{name}", linear)
        for name, linear in (("x_proj", block.x_proj), ("dt_proj", block.dt_proj)):
            yield from projection(f"{at}.{name}", linear)
        yield f"{at}.dt_proj.bias", block.dt_bias
        yield f"{at}.conv1d.qweight", block.conv_weight
        assert block.conv_scale is not None
        yield f"{at}.conv1d.scale", block.conv_scale
        if block.conv_bias is not None:
            yield f"{at}.conv1d.bias", block.conv_bias
        yield f"{at}.A_log", torch.log(-block.A)
        yield f"{at}.D", block.D


def projection(module: str, linear: LinearWeights) -> Iterator[tuple[str, torch.Tensor]]:
    weight = linear.weight
    if isinstance(weight, PackedInt4):
        yield f"{module}.qweight", weight.codes
        yield f"{module}.multiplier", pack_uint4(weight.multiplier)
    else:
        assert isinstance(weight, torch.Tensor)
        yield f"{module}.qweight", weight
    assert linear.scale is not None
    yield f"{module}.scale", linear.scale
    if linear.bias is not None:
        yield f"{module}.bias", linear.bias


def site_scales(scales: SiteScales, n_layer: int) -> dict[str, float]:
    fields = {name.replace(":", "_").replace("ssm_state_act_input", "ssm_state"): name for name in SITES}
    named = {site: getattr(scales, field, None) or 0.05 for field, site in fields.items()}
    return {
        site_key(site.name, layer): named[site.name]
        for site in SITES.values()
        for layer in (range(n_layer) if site.per_layer else (None,))
    }


def manifest_of(weights: ModelWeights, bits: int, scales: dict[str, float], files: dict[str, bytes]):
    config = weights.config
    dataset = DatasetRecord(
        dataset="random",
        digest=_NO_DIGEST,
        text_column=None,
        sample_ids=[0],
        shuffle=False,
        seed=0,
        samples=1,
        seqlen=1,
        tokens=1,
        batch_size=1,
    )
    return QuantizedManifest(
        tool_version="0",
        model=ModelRecord(
            source="random",
            digest=_NO_DIGEST,
            config=config.to_dict(),
            weight_files={},
            tokenizer_files={name: sha256_bytes(data) for name, data in files.items()},
        ),
        calibration=CalibrationReference(
            digest=_NO_DIGEST, dataset=dataset, alpha=_ALPHA, reduction="global"
        ),
        quantization=QuantizationRecord(
            w_bits=4 if bits == 4 else 8,
            group_size=128 if bits == 4 else None,
            embedding_bits=8,
            alpha=_ALPHA,
            ignore=[],
            weights=weight_schemes(config, Recipe(w_bits=bits)),
        ),
        sites={
            key: SiteRecord(
                observer=SITES[key.rpartition(".")[2]].observer,
                alpha=_ALPHA if SITES[key.rpartition(".")[2]].observer is ObserverKind.PERCENTILE else None,
                absmax=127 * scale,
                observations=1,
            )
            for key, scale in scales.items()
        },
        created_by={"python": "3"},
    )


def write(path: Path, shape: str, bits: int, device: torch.device) -> None:
    config = shape_config(shape)
    weights = random_quantized(config, bits, device, seed=0)
    files = open_checkpoint("demo").tokenizer_files
    scales = site_scales(weights.blocks[0].scales, config.n_layer)
    tensors = dict(stored(weights))
    if bits == 4 and device.type == "cpu":
        raise SystemExit("4-bit weights are packed on a GPU only, got the cpu backend, expected --bits 8")
    write_quantized(
        path,
        tensors={**tensors, **scale_tensors(scales, config.n_layer)},
        files=files,
        manifest=manifest_of(weights, bits, scales, files),
    )


def status(*names: str) -> dict[str, float]:
    """Megabytes of some fields of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) / 1000 for name in names if name in fields}


def measure(path: Path, batch: int, backend_name: str) -> dict[str, float | str]:
    """In a fresh process: load, prepare a decoder, make a few tokens."""
    begin = time.perf_counter()
    from qmamba_cli.model.decode import Decoder
    from qmamba_cli.stages.load import ModelOptions, load_model

    backend = select_backend(backend_name)
    gpu = backend.device.type == "cuda"
    if gpu:
        torch.zeros(1, device=backend.device)
    started = status("VmRSS", "RssAnon", "RssFile")
    ready = time.perf_counter()
    loaded = load_model(ModelOptions(mode=MODES["0"], checkpoint=path, backend=backend_name))
    if gpu:
        torch.cuda.synchronize()
    done = time.perf_counter()
    row: dict[str, float | str] = {
        "import_and_device_s": ready - begin,
        "load_s": done - ready,
        "host_before_MB": started["VmRSS"],
        "host_peak_MB": status("VmHWM")["VmHWM"],
        **{f"host_after_{name}_MB": value for name, value in status("RssAnon", "RssFile").items()},
    }
    if gpu:
        row["load_peak_gpu_MB"] = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(loaded.model, batch)
    if gpu:
        torch.cuda.synchronize()
        row["pack_peak_gpu_MB"] = torch.cuda.max_memory_allocated() / 1e6
        row["pack_s"] = time.perf_counter() - done
    decoder.prepare()
    ids = torch.randint(loaded.model.vocab_size, (batch, 64), generator=torch.Generator().manual_seed(0))
    first = decoder.start(ids).tolist()
    row["first_token_after_s"] = time.perf_counter() - ready
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    tokens = [first, *(decoder.step().tolist() for _ in range(4))]
    row["tokens"] = str(tokens)[:80]
    if gpu:
        row["decode_gpu_MB"] = torch.cuda.max_memory_allocated() / 1e6
        row["reserved_gpu_MB"] = torch.cuda.memory_reserved() / 1e6
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2.8b")
    parser.add_argument("--bits", default="4,8", help="comma-separated bits of the weights")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--folder", type=Path, help="where the file goes, else a temporary folder")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.batch, options.backend)))
        return
    device = select_backend(options.backend).device
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for bits in map(int, options.bits.split(",")):
            path = Path(folder) / f"w{bits}.safetensors"
            begin = time.perf_counter()
            write(path, options.shape, bits, device)
            print(
                f"{options.shape} W{bits}: {path.stat().st_size / 1e6:.0f} MB written in "
                f"{time.perf_counter() - begin:.1f} s",
                flush=True,
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()
            command = [sys.executable, __file__, "--measure", str(path), "--batch", str(options.batch)]
            done = subprocess.run(
                [*command, "--backend", options.backend], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(done.stderr[-3000:])
                continue
            for name, value in json.loads(done.stdout).items():
                print(f"    {name:24s} {value if isinstance(value, str) else round(value, 2)}", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
