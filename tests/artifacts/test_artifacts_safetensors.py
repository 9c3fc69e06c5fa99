import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.artifacts.safetensors_header import DTYPES, MAX_HEADER_BYTES, parse_header
from qmamba_cli.artifacts.safetensors_io import (
    LazyTensor,
    TensorSource,
    describe,
    open_safetensors,
    write_safetensors,
)
from qmamba_cli.errors import ArtifactError, QmambaError

TENSOR = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def pack(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def packed(document: object, data: bytes = b"") -> bytes:
    return pack(json.dumps(document).encode(), data)


def every_dtype() -> dict[str, TensorSource]:
    found: dict[str, TensorSource] = {}
    for name, row in DTYPES.items():
        found[name] = torch.arange(6).to(getattr(torch, row.torch)).reshape(2, 3)
    found["scalar"] = torch.tensor(2.5)
    found["empty"] = np.zeros((0, 3), dtype=np.float64)
    found["whole"] = np.arange(64, dtype=np.uint8)
    return found


def test_every_dtype_makes_the_round_trip(tmp_path: Path) -> None:
    tensors = every_dtype()
    digests = write_safetensors(tmp_path / "x", tensors, {"b": "2", "a": "é"})
    file = open_safetensors(tmp_path / "x")
    assert file.header.canonical
    assert file.metadata == {"a": "é", "b": "2"}
    assert set(file.names) == set(tensors) == set(digests)
    for name, value in tensors.items():
        got = file.tensor(name)
        expected = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        assert isinstance(expected, torch.Tensor)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(got, expected), name
        bits = got.view(torch.uint16) if got.dtype is torch.bfloat16 else got
        assert np.array_equal(file.numpy(name), bits.numpy()), name
        assert file.info(name) == describe(value)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = every_dtype()
    write_safetensors(tmp_path / "x", tensors, {"k": "v"})
    theirs = safetensors.torch.load_file(tmp_path / "x")
    file = open_safetensors(tmp_path / "x")
    assert set(theirs) == set(tensors)
    for name, value in theirs.items():
        assert torch.equal(value, file.tensor(name)), name


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.int8)}
    safetensors.torch.save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    file = open_safetensors(tmp_path / "x")
    assert file.metadata == {"format": "pt"}
    for name, value in tensors.items():
        assert torch.equal(file.tensor(name), value)


def test_equal_input_gives_equal_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = every_dtype()
    write_safetensors(tmp_path / "x", tensors, {"a": "1", "b": "2"})
    write_safetensors(tmp_path / "y", dict(reversed(tensors.items())), {"b": "2", "a": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_data_is_aligned(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", every_dtype())
    file = open_safetensors(tmp_path / "x")
    for name, (begin, _) in file.header.offsets.items():
        info = file.info(name)
        wanted = 64 if info.nbytes % 64 == 0 else DTYPES[info.dtype].size
        assert begin % wanted == 0, name


def test_a_strided_or_big_endian_source_is_written_by_its_values(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=">i4").reshape(2, 3)
    write_safetensors(tmp_path / "x", {"n": matrix.T, "t": torch.arange(6).reshape(2, 3).T})
    file = open_safetensors(tmp_path / "x")
    assert file.numpy("n").tolist() == file.tensor("t").tolist() == [[0, 3], [1, 4], [2, 5]]


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header += b" " * ((1 - 8 - len(header)) % 4)
    (tmp_path / "x").write_bytes(pack(header, np.float32(1.5).tobytes()))
    assert open_safetensors(tmp_path / "x").tensor("a").tolist() == [1.5]


def test_a_tensor_changed_in_place_leaves_the_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": torch.zeros(64)})
    before = (tmp_path / "x").read_bytes()
    file = open_safetensors(tmp_path / "x")
    file.tensor("a").fill_(1.0)
    assert (tmp_path / "x").read_bytes() == before
    with pytest.raises(ValueError, match="read-only"):
        file.numpy("a")[0] = 1.0
    with pytest.raises(TypeError, match="read-only"):
        file.bytes("a")[0] = 1


def test_a_lazy_tensor_is_made_once_and_must_keep_its_word(tmp_path: Path) -> None:
    calls = []

    def load() -> torch.Tensor:
        calls.append(1)
        return torch.ones(2, 3)

    write_safetensors(tmp_path / "x", {"a": LazyTensor("F32", (2, 3), load)}, lambda digests: {**digests})
    assert calls == [1]
    file = open_safetensors(tmp_path / "x")
    assert torch.equal(file.tensor("a"), torch.ones(2, 3))
    assert file.metadata["a"] != "0" * 64
    with pytest.raises(ValueError, match="was announced as"):
        write_safetensors(tmp_path / "y", {"a": LazyTensor("F32", (3, 2), load)})


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    size = 4 << 20
    tensors = {
        f"t{i}": LazyTensor("U8", (size,), lambda i=i: np.full(size, i, dtype=np.uint8)) for i in range(8)
    }
    tracemalloc.start()
    write_safetensors(tmp_path / "x", tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x").stat().st_size > 8 * size
    assert peak < 2.5 * size


@pytest.mark.parametrize(
    "tensors",
    [
        {"__metadata__": np.zeros(1, np.uint8)},
        {"a": np.zeros(1, np.bool_)},
        {"a": np.zeros(1, np.complex64)},
        {"a": torch.zeros(1, dtype=torch.bool)},
        {"a": np.zeros((1,) * 9, np.uint8)},
    ],
)
def test_what_cannot_be_read_is_not_written(tmp_path: Path, tensors: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        write_safetensors(tmp_path / "x", tensors)


@pytest.mark.parametrize(
    ("document", "data", "message"),
    [
        ([], b"", "not a JSON object"),
        ({"a": 1}, b"", "exactly the keys"),
        ({"a": {**TENSOR, "more": 1}}, b"abcd", "exactly the keys"),
        ({"a": {"dtype": "U8", "shape": [4]}}, b"abcd", "exactly the keys"),
        ({"a": {**TENSOR, "dtype": "Q3"}}, b"abcd", "dtype `Q3`"),
        ({"a": {**TENSOR, "dtype": "BOOL"}}, b"abcd", "dtype `BOOL`"),
        ({"a": {**TENSOR, "dtype": ["U8"]}}, b"abcd", "dtype `list`"),
        ({"a": {**TENSOR, "shape": [-4]}}, b"abcd", "no valid shape"),
        ({"a": {**TENSOR, "shape": [4.0]}}, b"abcd", "no valid shape"),
        ({"a": {**TENSOR, "shape": [True]}}, b"abcd", "no valid shape"),
        ({"a": {**TENSOR, "shape": "4"}}, b"abcd", "no valid shape"),
        ({"a": {**TENSOR, "shape": [1] * 9}}, b"abcd", "no valid shape"),
        ({"a": {**TENSOR, "shape": [2**40, 2**40]}}, b"abcd", "too large"),
        ({"a": {**TENSOR, "shape": [0, 2**63]}}, b"abcd", "too large"),
        ({"a": {**TENSOR, "shape": [3]}}, b"abcd", "4 bytes of data, expected 3"),
        ({"a": {**TENSOR, "dtype": "F32"}}, b"abcd", "4 bytes of data, expected 16"),
        ({"a": {**TENSOR, "data_offsets": [-4, 0]}}, b"abcd", "no valid data offsets"),
        ({"a": {**TENSOR, "data_offsets": [4, 0]}}, b"abcd", "no valid data offsets"),
        ({"a": {**TENSOR, "data_offsets": [0, 2**62]}}, b"abcd", "no valid data offsets"),
        ({"a": {**TENSOR, "data_offsets": [0, 2, 4]}}, b"abcd", "no valid data offsets"),
        ({"a": {**TENSOR, "data_offsets": [1, 5]}}, b"abcde", "leaves a gap"),
        ({"a": TENSOR, "b": {**TENSOR, "data_offsets": [2, 6]}}, b"abcdef", "overlaps"),
        ({"a": TENSOR, "b": TENSOR}, b"abcd", "overlaps"),
        ({"a": TENSOR, "b": {**TENSOR, "data_offsets": [5, 9]}}, b"abcdefghi", "leaves a gap"),
        ({"a": TENSOR}, b"abcde", "take 4 bytes, got 5"),
        ({}, b"a", "take 0 bytes, got 1"),
        ({"__metadata__": {"a": 1}}, b"", "strings to strings"),
        ({"__metadata__": []}, b"", "strings to strings"),
        ({"__metadata__": "x"}, b"", "strings to strings"),
    ],
)
def test_hostile_header(document: object, data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        parse_header(packed(document, data), "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"\0" * 7, "no safetensors file"),
        (pack(b"{}", length=2**63), "no safetensors file"),
        (pack(b"{}", length=2**64 - 1), "no safetensors file"),
        (pack(b"{}", length=3), "no safetensors file"),
        (b"Call me Ishmael. Some years ago", "no safetensors file"),
        (b"PK\x03\x04" + b"\0" * 4 + b"pytorch zip archive", "no safetensors file"),
        (pack(b""), "not valid JSON"),
        (pack(b"\xff\xfe"), "not UTF-8"),
        (pack(b"{} x"), "not valid JSON"),
        (pack(b'{"a":{},"a":{}}'), "given twice"),
        (pack(b'{"a":' * 15_000), "nested too deeply"),
        (pack(b'{"a":{"dtype":' + b"[" * 900 + b"]" * 900 + b',"shape":[],"data_offsets":[0,0]}}'), "dtype"),
        (pack(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'), "limit"),
        (pack(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}'), "no valid shape"),
        (pack(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "surrogate"),
    ],
)
def test_hostile_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        open_safetensors(tmp_path / "x")
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 500 + len(str(tmp_path))


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    length = MAX_HEADER_BYTES + 1
    with (tmp_path / "x").open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(length + 8)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=f"expected at most {MAX_HEADER_BYTES}"):
        open_safetensors(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_names_cannot_write_to_the_terminal() -> None:
    document = {"\x1b[2J\n": {**TENSOR, "dtype": "\x1b]0;owned\x07"}}
    with pytest.raises(ArtifactError) as caught:
        parse_header(packed(document, b"abcd"), "x")
    assert caught.value.message.isprintable()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(QmambaError, match="not a regular file"):
        open_safetensors(tmp_path / "pipe")
    with pytest.raises(QmambaError, match="not a regular file"):
        open_safetensors(tmp_path)
    with pytest.raises(QmambaError, match="cannot read"):
        open_safetensors(tmp_path / "missing")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": np.zeros(1)})
    with pytest.raises(ArtifactError, match="tensor `b` is missing"):
        open_safetensors(tmp_path / "x").tensor("b")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_never_crash(data: bytes, framed: bool) -> None:
    content = pack(data) if framed else data
    try:
        header = parse_header(content, "x")
    except ArtifactError:
        return
    assert sum(info.nbytes for info in header.infos.values()) <= len(content)


SCALAR = st.one_of(st.none(), st.booleans(), st.integers(-(2**64), 2**64), st.text(max_size=4))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "X"]),
        "shape": st.lists(st.integers(-1, 4), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.one_of(ENTRY, SCALAR), max_size=3), st.integers(0, 20))
def test_random_headers_are_refused_or_cover_the_data(document: dict[str, Any], size: int) -> None:
    try:
        header = parse_header(packed(document, bytes(size)), "x")
    except ArtifactError:
        return
    covered = sorted(header.offsets.values())
    assert sum(end - begin for begin, end in covered) == size
    assert all(left[1] == right[0] for left, right in itertools.pairwise(covered))


def test_reading_a_header_does_not_import_torch(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"a": np.zeros(3)})
    script = (
        "import sys; from pathlib import Path;"
        "from qmamba_cli.artifacts.safetensors_io import open_safetensors;"
        f"open_safetensors(Path({str(tmp_path / 'x')!r})).numpy('a');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
