import gzip
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qmamba_cli.errors import DatasetError, UsageError
from qmamba_cli.resources import calib_data_path
from qmamba_cli.text import TextFile, open_documents


def write_rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, columns: dict[str, list], group: int = 10) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return str(path)


def refused(dataset: str, **options) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        open_documents(dataset, **options)
    return caught.value


def test_jsonl_gives_rows_in_any_order(tmp_path: Path):
    texts = ["first", "zweite größer", 'a "quoted" one\nwith lines', "", "last"]
    name = write_rows(tmp_path / "a.jsonl", texts)
    documents = open_documents(name)
    assert len(documents) == 5
    assert [documents[i] for i in (4, 0, 2, 1, 3)] == [texts[i] for i in (4, 0, 2, 1, 3)]
    assert documents.name == name
    assert documents.digest == hashlib.sha256(Path(name).read_bytes()).hexdigest()


def test_jsonl_passes_over_blank_lines_marks_and_carriage_returns(tmp_path: Path):
    path = tmp_path / "a.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}')
    documents = open_documents(str(path))
    assert [documents[i] for i in range(len(documents))] == ["one", "two"]


def test_jsonl_column(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1, "body": "this"}\n')
    assert open_documents(str(path), text_column="body")[0] == "this"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops}", "line 3: not JSON, got Expecting property name enclosed in double quotes"),
        (b'{"text": "cut', "line 3: not JSON, got Invalid control character"),
        (b'{"text": "\xff"}', "line 3: not JSON, got byte 0xff at offset 10"),
        (b"[" * 200_000, "line 3: not JSON"),
        (b'["text"]', "line 3: not an object, got an array, expected an object with a field `text`"),
        (b'"text"', "line 3: not an object, got a string"),
        (b"3", "line 3: not an object, got a number"),
        (b'{"Text": "x", "id": 1}', "line 3: no field `text`, got `Text`, `id`"),
        (b"{}", "line 3: no field `text`, got none"),
        (b'{"text": null}', "line 3, field `text`: must be a string, got null"),
        (b'{"text": ["a"]}', "line 3, field `text`: must be a string, got an array"),
        (b'{"text": true}', "line 3, field `text`: must be a string, got a boolean"),
        (b'{"text": {}}', "line 3, field `text`: must be a string, got an object"),
        (b'{"text": "\\ud800"}', "line 3, field `text`: must be Unicode text, got a lone surrogate"),
    ],
    ids=lambda value: value[:12].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_jsonl_names_the_bad_line(tmp_path: Path, line: bytes, message: str):
    path = tmp_path / "bad.jsonl"
    # Line 2 is blank: the number counts lines, not rows.
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    error = refused(str(path))
    assert error.message.startswith(f"`{path}`, ")
    assert message in error.message
    assert error.exit_code == 1


def test_missing_field_hints_at_the_option(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n')
    assert "--text-column" in refused(str(path)).hint


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_jsonl_without_rows(tmp_path: Path, content: bytes):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    assert refused(str(path)).message == f"`{path}`: no text, got 0 rows, expected at least 1"


def test_jsonl_is_not_held_in_memory(tmp_path: Path):
    path = tmp_path / "big.jsonl"
    line = json.dumps({"text": "word " * 2000}) + "\n"
    with path.open("w") as handle:
        for _ in range(2000):
            handle.write(line)
    tracemalloc.start()
    try:
        documents = open_documents(str(path))
        lengths = {len(documents[i]) for i in range(0, len(documents), 100)}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lengths == {10_000}
    assert path.stat().st_size > 20_000_000
    assert peak < 1_000_000


def test_txt_is_one_document(tmp_path: Path):
    path = tmp_path / "a.txt"
    content = "Eins\r\n\n zwei größer\n"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    documents = open_documents(str(path))
    assert isinstance(documents, TextFile)
    assert len(documents) == 1
    assert documents[0] == content
    assert "".join(documents.blocks(3)) == content
    assert documents.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(IndexError):
        documents[1]


def test_txt_that_is_not_utf8(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("größer".encode("latin-1"))
    documents = open_documents(str(path))
    with pytest.raises(DatasetError, match="not UTF-8, got byte 0xf6 at offset 2"):
        documents[0]


@pytest.mark.parametrize(
    "kind",
    [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())],
    ids=str,
)
def test_parquet_gives_rows_in_any_order(tmp_path: Path, kind: pyarrow.DataType):
    texts = [f"row {i} größer" for i in range(205)]
    name = write_parquet(
        tmp_path / "a.parquet", {"id": range(205), "text": pyarrow.array(texts, type=kind)}, group=100
    )
    documents = open_documents(name)
    assert len(documents) == 205
    order = [204, 0, 99, 100, 64, 63, 63, 199, 200, 1]
    assert [documents[i] for i in order] == [texts[i] for i in order]
    assert [documents[i] for i in range(205)] == texts
    assert documents.digest == hashlib.sha256(Path(name).read_bytes()).hexdigest()
    with pytest.raises(IndexError):
        documents[205]


def test_parquet_passes_over_empty_row_groups(tmp_path: Path):
    path = tmp_path / "a.parquet"
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for texts in (["a", "b"], [], ["c"]):
            writer.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}))
    documents = open_documents(str(path))
    assert [documents[i] for i in (2, 0, 1)] == ["c", "a", "b"]


def test_parquet_is_not_held_in_memory(tmp_path: Path):
    path = tmp_path / "big.parquet"
    texts = [os.urandom(4000).hex() for _ in range(2000)]
    # One group of pages of about a megabyte, as usual; by itself pyarrow looks at a page's size only once in
    # 1024 rows, and makes pages of 8 MB from rows as long as these.
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, use_dictionary=False, write_batch_size=16
    )
    before = pyarrow.total_allocated_bytes()
    documents = open_documents(str(path))
    most = 0
    for row in range(0, 2000, 50):
        assert documents[row] == texts[row]
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert path.stat().st_size > 8_000_000
    assert most < 4_000_000


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"]}, "no column `text`, got `body`"),
        ({"text": [1, 2]}, "column `text` must hold strings, got int64"),
        ({"text": pyarrow.array([], pyarrow.string())}, "no text, got 0 rows"),
    ],
)
def test_parquet_refused(tmp_path: Path, columns: dict[str, list], message: str):
    assert message in refused(write_parquet(tmp_path / "a.parquet", columns)).message


def test_parquet_null_names_the_row(tmp_path: Path):
    documents = open_documents(write_parquet(tmp_path / "a.parquet", {"text": ["x", None]}))
    with pytest.raises(DatasetError, match="row 1, column `text`: must be a string, got null"):
        documents[1]


def test_parquet_damaged(tmp_path: Path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 is how it begins")
    assert "not a readable parquet file" in refused(str(path)).message
    write_parquet(path, {"text": [os.urandom(2000).hex() for _ in range(50)]}, group=50)
    content = bytearray(path.read_bytes())
    content[4:2004] = bytes(2000)
    path.write_bytes(content)
    documents = open_documents(str(path))
    with pytest.raises(DatasetError, match="row 3: damaged"):
        documents[3]


@pytest.mark.parametrize("name", ["none.jsonl", "no/such/none.txt", "/none.parquet"])
def test_missing_file(name: str):
    error = refused(name)
    assert error.message == f"`{name}`: no such file"
    assert "bundled" in error.hint
    assert "self" in error.hint


def test_folder_and_other_files_are_no_source(tmp_path: Path):
    assert "got a folder" in refused(str(tmp_path)).message
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    assert refused(str(folder)).message == f"`{folder}`: no such file"
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}"))
    assert (
        "got a file ending in `.gz`, expected a file ending in .jsonl, .txt" in refused(str(packed)).message
    )


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "../x", ".hidden", ":config", "größer"])
def test_what_can_be_no_name_is_wrong_usage(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # An empty folder: no name happens to be that of a file.
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if name == "":
        # The empty path is the current folder.
        assert "got a folder" in refused(name).message
        return
    with pytest.raises(UsageError, match="names no text source") as caught:
        open_documents(name)
    assert f"got `{name}`" in caught.value.message


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".jsonl"])
def test_a_path_the_system_refuses(name: str):
    assert "cannot be read, got File name too long" in refused(name).message


def test_bundled_text():
    documents = open_documents("bundled", text_column="not used")
    assert documents.name == "bundled"
    assert len(documents) >= 512
    assert documents.digest == hashlib.sha256(calib_data_path("calibration.jsonl").read_bytes()).hexdigest()


def test_opening_files_imports_nothing_heavy(tmp_path: Path):
    name = write_rows(tmp_path / "a.jsonl", ["x"])
    program = (
        "import sys; from qmamba_cli.text import open_documents; open_documents(sys.argv[1]);"
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'transformers', 'huggingface_hub')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
