"""Damaged artifacts: every one is refused as damaged, at no more cost than the file's own size."""

import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from artifact_samples import MODEL, TOKENIZER, make_calibration, make_quantized, quantized_manifest, tensors
from random_models import small_config
from victims import OLD, STAGES, Child, identity, working_folder

from qmamba_cli.artifacts.calibration import read_calibration
from qmamba_cli.artifacts.files import canonical_json, sha256_bytes
from qmamba_cli.artifacts.folder import check_sums, write_folder
from qmamba_cli.artifacts.quantized import METADATA_KEY, read_quantized, read_quantized_manifest
from qmamba_cli.artifacts.safetensors_io import open_safetensors, write_safetensors
from qmamba_cli.artifacts.weight_files import SafetensorsFile
from qmamba_cli.errors import ArtifactError, CheckpointError, QmambaError
from qmamba_cli.modes import mode_by_name
from qmamba_cli.stages.inspect import inspect
from qmamba_cli.stages.run import ModelOptions, load_model
from qmamba_cli.stages.verify import Others, verify

# What reading may take beside the file itself: the parsed header, pydantic's copies, and malloc's own arenas.
ALLOWANCE = 96 << 20
READ: dict[str, Callable[[Path], object]] = {
    "q": read_quantized,
    "folder": lambda path: check_sums(path, read_quantized(path).manifest),
    "c": read_calibration,
}


@cache
def _samples(where: Path) -> Path:
    make_quantized(where / "q")
    make_calibration(where / "c")
    write_folder(
        where / "folder",
        tensors=tensors(),
        files=TOKENIZER,
        manifest=quantized_manifest(model=MODEL.model_copy(update={"config": small_config().to_dict()})),
        card=lambda manifest: manifest.content_digest,
        max_shard_bytes=64,
    )
    return where


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized file, a calibration and a model folder of a few hundred bytes of data."""
    return _samples(tmp_path_factory.mktemp("samples"))


def limit_memory(more: int) -> None:
    """Let this process take ``more`` bytes of address space beyond what it has; a child's to call."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


def in_child(work: Callable[[], object]) -> None:
    assert Child.start(work).wait() == 0, "the traceback is above"


@contextmanager
def damaged(path: Path, place: int, byte: int) -> Iterator[None]:
    with path.open("r+b", buffering=0) as file:
        before = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([byte]), place)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), before, place)


def header_length(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def described_bytes(path: Path) -> int:
    """Length of the part of a file that describes: its header, or all of a JSON file."""
    return path.stat().st_size if path.suffix == ".json" else header_length(path)


def flip_every_bit(artifact: str, root: Path, file: Path) -> None:
    data = file.read_bytes()
    limit_memory(ALLOWANCE)
    for place in range(described_bytes(file)):
        for bit in range(8):
            with damaged(file, place, data[place] ^ 1 << bit), pytest.raises(ArtifactError):
                READ[artifact](root / artifact)
    READ[artifact](root / artifact)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("artifact", "name"),
    [
        ("q", ""),
        ("c", "manifest.json"),
        ("c", "scales.safetensors"),
        ("c", "statistics.safetensors"),
        ("c", "coverage.safetensors"),
    ],
)
def test_every_flipped_bit_of_what_describes_is_found(samples: Path, artifact: str, name: str) -> None:
    in_child(lambda: flip_every_bit(artifact, samples, samples / artifact / name))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00001-of-*.safetensors"])
def test_every_flipped_bit_beside_a_folders_manifest_is_found(samples: Path, name: str) -> None:
    """The folder's manifest is that of the file, spelling and digest, so it is not gone through again."""
    (file,) = (samples / "folder").glob(name)
    in_child(lambda: flip_every_bit("folder", samples, file))


@pytest.mark.parametrize("name", ["config.json", "README.md", "SHA256SUMS"])
def test_every_flipped_bit_of_what_others_read_is_found(samples: Path, name: str) -> None:
    folder = samples / "folder"
    manifest = read_quantized_manifest(folder)
    content = (folder / name).read_bytes()
    for place, byte in enumerate(content):
        for bit in range(8):
            with damaged(folder / name, place, byte ^ 1 << bit), pytest.raises(ArtifactError):
                check_sums(folder, manifest)
    assert check_sums(folder, manifest)


def test_random_flips_of_data_are_found(tmp_path: Path) -> None:
    """A thousand bits of a real export, and of the statistics of a real calibration."""
    identity(STAGES["export"], OLD)
    folder = working_folder(STAGES["export"], tmp_path / "w")
    export = folder / "ckpt.safetensors"
    statistics = folder / "calibration" / "statistics.safetensors"

    def work() -> None:
        generator = random.Random(1)
        limit_memory(ALLOWANCE + export.stat().st_size)
        for count, file, read in (
            (700, export, lambda: read_quantized(export)),
            (300, statistics, lambda: read_calibration(folder / "calibration")),
        ):
            begin, end = header_length(file), file.stat().st_size
            content = file.read_bytes()
            for _ in range(count):
                place = generator.randrange(begin, end)
                with (
                    damaged(file, place, content[place] ^ 1 << generator.randrange(8)),
                    pytest.raises(ArtifactError, match="the data of tensor"),
                ):
                    read()
            read()

    in_child(work)


def test_every_cut_is_found(samples: Path, tmp_path: Path) -> None:
    """At every 64th byte, and a byte to either side of it."""

    def work() -> None:
        shutil.copytree(samples, tmp_path / "copy")
        limit_memory(ALLOWANCE)
        for artifact in READ:
            path = tmp_path / "copy" / artifact
            for file in [path] if path.is_file() else sorted(path.iterdir()):
                content = file.read_bytes()
                for middle in range(0, len(content) + 1, 64):
                    for length in {middle - 1, middle, middle + 1}:
                        if 0 <= length < len(content):
                            file.write_bytes(content[:length])
                            with pytest.raises(ArtifactError):
                                READ[artifact](path)
                file.write_bytes(content)
            READ[artifact](path)

    in_child(work)


def test_cuts_of_a_real_export_are_found(tmp_path: Path) -> None:
    folder = working_folder(STAGES["export"], tmp_path / "w")
    export = folder / "ckpt.safetensors"
    size = export.stat().st_size

    def work() -> None:
        limit_memory(ALLOWANCE + size)
        # From the end to the front the file need not be written again.
        for length in range(size - 64, 0, -64 * 41):
            os.truncate(export, length)
            with pytest.raises(ArtifactError):
                read_quantized(export)

    in_child(work)


def test_verify_says_that_damage_is_damage(tmp_path: Path) -> None:
    """What the readers find is what `verify` reports, of every link that it follows."""
    folder = working_folder(STAGES["export"], tmp_path / "w")
    generator = random.Random(2)
    for file in (folder / "ckpt.safetensors", *sorted((folder / "calibration").iterdir())):
        content = file.read_bytes()
        for _ in range(4):
            place = generator.randrange(len(content))
            with damaged(file, place, content[place] ^ 1 << generator.randrange(8)):
                checks = verify(folder / "ckpt.safetensors", Others(workdir=folder))
                assert "failed" in {check.verdict for check in checks}, (file, place)
    checks = verify(folder / "ckpt.safetensors", Others(workdir=folder))
    assert {check.verdict for check in checks} <= {"ok", "absent"}, checks


def test_verify_covers_every_file_of_a_folder(tmp_path: Path) -> None:
    folder = working_folder(STAGES["export-folder"], tmp_path / "w")
    generator = random.Random(3)
    for file in sorted((folder / "ckpt").iterdir()):
        content = file.read_bytes()
        place = generator.randrange(len(content))
        with damaged(file, place, content[place] ^ 1 << generator.randrange(8)):
            checks = verify(folder / "ckpt", Others(workdir=folder))
            assert "failed" in {check.verdict for check in checks}, (file, place)
    checks = verify(folder / "ckpt", Others(workdir=folder))
    assert {check.verdict for check in checks} <= {"ok", "absent"}, checks


def framed(header: bytes, *, length: int | None = None, data: bytes = b"") -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def tensor(**changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}


def described(**entries: object) -> bytes:
    return json.dumps(entries).encode()


_BIG = 4 << 20
HOSTILE = {
    **{f"a length of 2^{power}": framed(b"{}", length=1 << power) for power in (22, 31, 32, 40, 62, 63)},
    "a length of 2^64-1": framed(b"{}", length=(1 << 64) - 1),
    "a tensor of 2^62 bytes": framed(described(a=tensor(shape=[1 << 62], data_offsets=[0, 1 << 62]))),
    "a tensor of 2^63 elements": framed(described(a=tensor(shape=[1 << 32, 1 << 31]))),
    "a dimension of 2^64": framed(described(a=tensor(shape=[0, 1 << 64], data_offsets=[0, 0]))),
    "a number of 4000 digits": framed(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,0]}}'
    ),
    "overlap": framed(described(a=tensor(), b=tensor(data_offsets=[2, 6])), data=bytes(6)),
    "the same place": framed(described(a=tensor(), b=tensor()), data=bytes(4)),
    "a gap": framed(described(a=tensor(data_offsets=[4, 8])), data=bytes(8)),
    "behind the end": framed(described(a=tensor(data_offsets=[100, 104])), data=bytes(4)),
    "backwards": framed(described(a=tensor(data_offsets=[4, 0])), data=bytes(4)),
    "negative": framed(described(a=tensor(data_offsets=[-4, 0])), data=bytes(4)),
    "a key twice": framed(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'),
    "a key of a tensor twice": framed(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "metadata twice": framed(b'{"__metadata__":{"a":"1"},"__metadata__":{}}'),
    "not UTF-8": framed(b'{"\xff":1}'),
    "an overlong encoding": framed(b'{"\xc0\xaf":1}'),
    "half a surrogate pair": framed(rb'{"\ud800":1}'),
    "a zero byte": framed(b'{"a":\x00}'),
    "a byte order mark": framed(b"\xef\xbb\xbf{}"),
    "another encoding": framed("{}".encode("utf-16")),
    "deep lists": framed(b"[" * _BIG),
    "deep objects": framed(b'{"a":' * (_BIG // 5)),
    "deep and closed": framed(b'{"a":' + b"[" * 16_000 + b"]" * 16_000 + b"}"),
    "many lists": framed(b"[" + b"[]," * (_BIG // 3) + b"[]]"),
    "many numbers": framed(b"[" + b"1," * (_BIG // 2 - 1) + b"1]"),
    "many tensors": framed(
        b"{"
        + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(60_000))
        + b"}"
    ),
    "a long string": framed(b'{"' + b"a" * (_BIG - 10) + b'":1}'),
    "many escapes": framed(b'{"' + rb"A" * (_BIG // 6 - 4) + b'":1}'),
    "a long number": framed(b"[" + b"1" * (_BIG - 2) + b"]"),
    "a number too large": framed(b'{"a":{"dtype":"U8","shape":[1e400],"data_offsets":[0,0]}}'),
    "not a number": framed(b'{"a":NaN}'),
    "a list": framed(b"[]"),
    "spaces alone": framed(b" " * _BIG),
    "no closing": framed(b'{"a":{"dtype":"U8"'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(HOSTILE[name])

    def work() -> None:
        limit_memory(ALLOWANCE)
        for read in (open_safetensors, read_quantized, lambda path: SafetensorsFile(path, f"`{path}`")):
            with pytest.raises((ArtifactError, CheckpointError)) as caught:
                read(path)
            assert len(caught.value.message) < 600 + len(str(path))
            assert caught.value.message.isprintable()

    in_child(work)


@pytest.mark.parametrize("name", ["deep lists", "many numbers", "a long string", "half a surrogate pair"])
@pytest.mark.parametrize("target", ["c/manifest.json", "folder/qmamba.json", "workdir.json"])
def test_hostile_json_is_refused_wherever_json_is_read(
    samples: Path, tmp_path: Path, name: str, target: str
) -> None:
    from qmamba_cli.artifacts.workdir import Workdir

    shutil.copytree(samples, tmp_path, dirs_exist_ok=True)
    (tmp_path / target).write_bytes(HOSTILE[name][8:])

    def work() -> None:
        limit_memory(ALLOWANCE)
        with pytest.raises(ArtifactError) as caught:
            if target == "workdir.json":
                Workdir(tmp_path).last_export()
            else:
                READ[target.partition("/")[0]]((tmp_path / target).parent)
        assert caught.value.message.isprintable()

    in_child(work)


@pytest.mark.parametrize("value", [True, 1 << 31, 1 << 200, 1e308, 0, -1, "x", None], ids=str)
@pytest.mark.parametrize("key", ["n_layer", "vocab_size"])
def test_a_forged_size_is_refused(tmp_path: Path, key: str, value: object) -> None:
    """Right digests prove nothing: a size is held against its limits before anything is made of it."""
    folder = working_folder(STAGES["export"], tmp_path / "w")
    path = folder / "ckpt.safetensors"
    file = open_safetensors(path)
    manifest = json.loads(file.metadata[METADATA_KEY])
    manifest["model"]["config"][key] = value
    manifest["content_digest"] = ""
    manifest["content_digest"] = sha256_bytes(canonical_json(manifest).encode())
    contents = {name: file.tensor(name).clone() for name in file.names}
    write_safetensors(path, contents, {METADATA_KEY: canonical_json(manifest)})

    def work() -> None:
        limit_memory(ALLOWANCE)
        read_quantized(path)
        for use in (
            lambda: inspect(path),
            lambda: load_model(ModelOptions(mode=mode_by_name("2-4"), checkpoint=path)),
        ):
            with pytest.raises(QmambaError, match=key):
                use()

    in_child(work)
