"""Measures the host memory that the stages take at a published model's size, without its weights.

    python benchmarks/memory.py [--shape 2.8b] [--layers N] [--samples 2 --seqlen 64 --batch-size 2] [--self]

Writes a sharded float32 checkpoint of random weights to a temporary folder, one tensor in memory at a time,
and runs `calibrate` and `export` at W4 and W8 on it on the CPU, each in a process of its own, whose largest
resident memory it prints beside its seconds. Each stage's `--dry-run` goes before, with what it foretells.
``--self`` lets the model write its own calibration text. Takes the checkpoint's size on the disk, with
``--self`` twice that.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A process's peak begins with what its parent held when it was started, so this one holds little: no torch,
# and the checkpoint is written by a child.
import numpy as np

from qmamba_cli.artifacts.checkpoint_config import huggingface_config
from qmamba_cli.artifacts.safetensors_io import LazyTensor, write_safetensors
from qmamba_cli.config import MambaConfig
from qmamba_cli.resources import demo_model_path

# d_model and layers, as in `stages.bench`, which imports torch.
SHAPES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
SHARD_BYTES = 2 * 10**9
WORDS = ("the", "lamp", "burned", "low", "and", "she", "had", "not", "written", "for", "weeks", "while")


def config_of(shape: str, layers: int | None) -> MambaConfig:
    d_model, n_layer = SHAPES[shape]
    return MambaConfig(
        d_model=d_model,
        n_layer=layers or n_layer,
        vocab_size=50280,
        d_state=16,
        d_conv=4,
        d_inner=2 * d_model,
        dt_rank=-(-d_model // 16),
        bos_token_id=0,
        eos_token_id=0,
    )


def drawn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values with which activations neither vanish nor grow without bound."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(shape, dtype=np.float32)
    if name.endswith("A_log"):
        return np.log(np.tile(np.arange(1, shape[1] + 1, dtype=np.float32), (shape[0], 1)))
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return 1 + np.float32(0.1) * values
    if name.endswith("dt_proj.bias"):
        return np.float32(0.5) * values - 4
    return values * np.float32(shape[-1] ** -0.5)


def write_checkpoint(folder: Path, config: MambaConfig) -> None:
    """The files of a sharded checkpoint."""
    folder.mkdir(parents=True)
    shards: list[dict[str, LazyTensor]] = [{}]
    used = total = 0
    for number, (name, shape) in enumerate(config.tensor_shapes().items()):
        size = 4 * int(np.prod(shape))
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = LazyTensor("F32", shape, lambda n=name, s=shape, i=number: drawn(n, s, i))
        used, total = used + size, total + size
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(huggingface_config(config)))
    for path in demo_model_path().glob("*token*"):
        shutil.copy(path, folder)


def write_text(path: Path, rows: int, tokens: int) -> None:
    generator = np.random.default_rng(0)
    texts = (" ".join(generator.choice(WORDS, tokens)) for _ in range(rows))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def child(*arguments: object, folder: Path) -> tuple[str, float, float]:
    """Run the command line: its output, its seconds and its largest resident memory in GB."""
    began = time.perf_counter()
    with (folder / "out").open("w+") as out:
        command = [sys.executable, "-m", "qmamba_cli", *map(str, arguments)]
        pid = os.posix_spawn(
            sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1)]
        )
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise SystemExit(
                f"`{' '.join(command[2:])}` ended with status {os.waitstatus_to_exitcode(status)}"
            )
        out.seek(0)
        return out.read(), time.perf_counter() - began, usage.ru_maxrss / 1e6


def foretold(text: str) -> str:
    """The numbers of a dry run that a plan would look at."""
    found: dict[str, Any] = json.loads(text)
    found |= found.pop("estimate", None) or {}
    row = []
    for name in ("bytes", "stored_bytes", "bits_per_weight", "memory_bytes", "seconds", "batch_seconds"):
        if name in found:
            value = found[name]
            row.append(f"{name} {value / 1e9:.2f} GB" if "bytes" in name else f"{name} {value:,.2f}")
    return ", ".join(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2.8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--bits", default="4,8", help="comma-separated bits of the exports")
    parser.add_argument("--self", action="store_true", help="text sampled from the model itself")
    parser.add_argument("--folder", type=Path, help="where everything goes, else a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="qmamba-memory-") as name:
        folder = Path(name)
        config = config_of(options.shape, options.layers)
        began = time.perf_counter()
        if os.fork() == 0:
            write_checkpoint(folder / "model", config)
            os._exit(0)
        os.wait()
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        print(f"checkpoint: {size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s", flush=True)
        write_text(folder / "text.jsonl", 4 * options.samples, 2 * options.seqlen)
        work = ("--workdir", folder / "w", "--json")
        text = "self" if options.self else folder / "text.jsonl"
        sizes = ("--samples", options.samples, "--seqlen", options.seqlen, "--batch-size", options.batch_size)
        calibrate = ("calibrate", folder / "model", "--dataset", text, *sizes, "--device", "cpu", *work)
        exports = [
            ("export", "--out", folder / f"w{bits}.safetensors", "--w-bits", bits, *work)
            for bits in options.bits.split(",")
            if bits
        ]
        run = ("run", "--task", "lastword", "--backend", "cpu", *work)
        for command in (calibrate, *exports, *([run] if exports else ())):
            label = f"{command[0]} W{command[4]}" if command[0] == "export" else command[0]
            out, seconds, peak = child(*command, "--dry-run", folder=folder)
            print(f"{label} --dry-run: {seconds:.1f} s, peak {peak:.2f} GB; {foretold(out)}", flush=True)
            if command is not run:
                _, seconds, peak = child(*command, folder=folder)
                print(f"{label}: {seconds:.0f} s, peak {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
