import hashlib
import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import DatasetError, UsageError
from qmamba_cli.resources import demo_model_path
from qmamba_cli.text import Documents, choose_samples, open_documents
from qmamba_cli.text.sampling import _PIECE_CHARACTERS, _pieces
from qmamba_cli.tokenizer import Tokenizer


class Bytes:
    """Every byte is a token."""

    def encode(self, text: str, /, *, special_tokens: bool) -> list[int]:
        assert not special_tokens
        return list(text.encode())


class Words:
    """Every word ``w12`` is the token 12."""

    def encode(self, text: str, /, *, special_tokens: bool) -> list[int]:
        assert not special_tokens
        return [int(word[1:]) for word in text.split()]


def words(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def rows_file(path: Path, lengths: list[int]) -> str:
    """Row i holds the tokens 1000·i, 1000·i + 1, …"""
    rows = (words(1000 * row, length) for row, length in enumerate(lengths))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return str(path)


def choose(name: str, samples: int, seqlen: int, seed: int = 0, shuffle: bool = True):
    return choose_samples(
        open_documents(name), Words(), samples=samples, seqlen=seqlen, seed=seed, shuffle=shuffle
    )


def seeded_order(seed: int, count: int) -> list[int]:
    """The rule, said again: ascending words of the generator."""
    keys = [int(word) for word in np.random.PCG64(seed).random_raw(count)]
    return sorted(range(count), key=lambda number: (keys[number], number))


def test_rows_in_file_order_skip_short_ones(tmp_path: Path):
    name = rows_file(tmp_path / "a.jsonl", [5, 3, 4, 0, 9, 4])
    chosen = choose(name, 3, 4, shuffle=False)
    assert chosen.ids == [0, 2, 4]
    assert chosen.skipped_short == 2
    assert chosen.tokens.tolist() == [[1000 * row + i for i in range(4)] for row in (0, 2, 4)]
    assert chosen.tokens.dtype == np.int32
    assert chosen.tokens.flags.c_contiguous
    assert chosen.dataset == name
    assert chosen.digest == hashlib.sha256(Path(name).read_bytes()).hexdigest()


def test_seeded_order_of_rows_is_pinned(tmp_path: Path):
    name = rows_file(tmp_path / "a.jsonl", [4] * 8)
    # Written down once: a changed generator or rule must not go unnoticed.
    assert choose(name, 8, 4, seed=0).ids == [3, 2, 1, 6, 0, 7, 4, 5]
    assert choose(name, 8, 4, seed=1).ids == [2, 4, 7, 5, 0, 6, 3, 1]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=700),
    samples=st.integers(1, 40),
    seed=st.integers(0, 2**64),
    shuffle=st.booleans(),
)
def test_rows_equal_the_walk_over_the_order(tmp_path_factory, lengths, samples, seed, shuffle):
    name = rows_file(tmp_path_factory.mktemp("rows") / "a.jsonl", lengths)
    order = seeded_order(seed, len(lengths)) if shuffle else list(range(len(lengths)))
    ids: list[int] = []
    skipped = 0
    for row in order:
        if len(ids) < samples:
            ids += [row] if lengths[row] >= 3 else []
            skipped += lengths[row] < 3
    if len(ids) < samples:
        with pytest.raises(DatasetError):
            choose(name, samples, 3, seed, shuffle)
        return
    chosen = choose(name, samples, 3, seed, shuffle)
    assert chosen.ids == ids
    assert chosen.skipped_short == skipped
    assert chosen.tokens[:, 0].tolist() == [1000 * row for row in ids]


def test_rare_long_rows_are_found_in_order(tmp_path: Path):
    lengths = [4 if row % 97 == 0 else 1 for row in range(12_000)]
    name = rows_file(tmp_path / "a.jsonl", lengths)
    chosen = choose(name, 100, 4, seed=3)
    expected = [row for row in seeded_order(3, 12_000) if row % 97 == 0][:100]
    assert chosen.ids == expected
    assert chosen.skipped_short == seeded_order(3, 12_000).index(expected[-1]) + 1 - 100


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(0, 400),
    seqlen=st.integers(1, 20),
    samples=st.integers(1, 30),
    seed=st.integers(0, 2**64),
    shuffle=st.booleans(),
)
def test_windows_of_a_txt_file(tmp_path_factory, length, seqlen, samples, seed, shuffle):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_text(words(0, length))
    count = length // seqlen
    if count < samples:
        with pytest.raises(DatasetError):
            choose(str(path), samples, seqlen, seed, shuffle)
        return
    chosen = choose(str(path), samples, seqlen, seed, shuffle)
    order = seeded_order(seed, count) if shuffle else list(range(count))
    assert chosen.ids == order[:samples]
    expected = [[seqlen * number + i for i in range(seqlen)] for number in order[:samples]]
    assert chosen.tokens.tolist() == expected
    assert chosen.tokens.dtype == np.int32
    assert chosen.skipped_short == 0


class Visited(Documents):
    """Rows of one token, every 97th of four; remembers which rows were read."""

    name, digest = "made", "0" * 64

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __len__(self) -> int:
        return 12_000

    def __getitem__(self, index: int) -> str:
        self.rows.append(index)
        return "w1 w2 w3 w4" if index % 97 == 0 else "w1"


def test_rows_are_read_forwards_in_few_sweeps():
    documents = Visited()
    chosen = choose_samples(documents, Words(), samples=100, seqlen=4, seed=3, shuffle=True)
    assert len(chosen.ids) == 100
    assert len(set(documents.rows)) == len(documents.rows)
    # A parquet file decodes a row group anew for every step backwards.
    assert sum(after < before for before, after in pairwise(documents.rows)) < 10


def test_seeds_and_repeats(tmp_path: Path):
    name = rows_file(tmp_path / "a.jsonl", [6] * 50)
    first, again, other = choose(name, 20, 5, 7), choose(name, 20, 5, 7), choose(name, 20, 5, 8)
    assert first.ids == again.ids
    assert np.array_equal(first.tokens, again.tokens)
    assert first.ids != other.ids
    # A larger sample begins with the smaller one.
    assert choose(name, 40, 5, 7).ids[:20] == first.ids


@pytest.mark.parametrize(
    ("lengths", "samples", "message", "hint"),
    [
        (
            [4, 4, 2, 3],
            3,
            "too few rows of at least 4 tokens, got 2, expected 3 "
            "(2 rows of 4 are too short, the longest of them has 3 tokens)",
            "take `--samples 2`, or a smaller `--seqlen`",
        ),
        (
            [4, 1],
            2,
            "too few rows of at least 4 tokens, got 1, expected 2 "
            "(1 row of 2 is too short, the longest of them has 1 token)",
            "take `--samples 1`, or a smaller `--seqlen`",
        ),
        ([4, 4], 3, "too few rows, got 2, expected 3", "take `--samples 2`"),
        (
            [3, 2],
            1,
            "text too short for one sample, got at most 3 tokens a row (2 rows of 2 are too short), "
            "expected at least 4",
            "take `--seqlen 3` or less, or a longer text",
        ),
        (
            [0],
            1,
            "text too short for one sample, got at most 0 tokens a row (1 row of 1 is too short), "
            "expected at least 4",
            "take a longer text",
        ),
    ],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_too_few_rows(tmp_path: Path, lengths, samples, message, hint, shuffle):
    name = rows_file(tmp_path / "a.jsonl", lengths)
    with pytest.raises(DatasetError) as caught:
        choose(name, samples, 4, shuffle=shuffle)
    assert caught.value.message == f"`{name}`: {message}"
    assert caught.value.hint == hint
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("length", "message", "hint"),
    [
        (
            11,
            "too few windows of 4 tokens, got 2 (11 tokens of text), expected 3",
            "take `--samples 2`, or a smaller `--seqlen`",
        ),
        (
            3,
            "text too short for one sample, got 3 tokens, expected at least 4",
            "take `--seqlen 3` or less, or a longer text",
        ),
        (0, "text too short for one sample, got 0 tokens, expected at least 4", "take a longer text"),
    ],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_too_little_text(tmp_path: Path, length, message, hint, shuffle):
    path = tmp_path / "a.txt"
    path.write_text(words(0, length))
    with pytest.raises(DatasetError) as caught:
        choose(str(path), 3, 4, shuffle=shuffle)
    assert caught.value.message == f"`{path}`: {message}"
    assert caught.value.hint == hint


def test_absurd_requests_are_refused_without_allocating(tmp_path: Path):
    name = rows_file(tmp_path / "a.jsonl", [4, 4])
    with pytest.raises(DatasetError, match=r"expected 1000000000000000"):
        choose(name, 10**15, 4)
    with pytest.raises(DatasetError, match=r"expected at least 1000000000000000"):
        choose(name, 1, 10**15)
    path = tmp_path / "a.txt"
    path.write_text(words(0, 40))
    with pytest.raises(DatasetError, match=r"expected 1000000000000000"):
        choose(str(path), 10**15, 4)


@pytest.mark.parametrize(
    ("option", "value", "least"), [("samples", 0, 1), ("seqlen", 0, 1), ("seqlen", -3, 1), ("seed", -1, 0)]
)
def test_options_out_of_range(tmp_path: Path, option: str, value: int, least: int):
    documents = open_documents(rows_file(tmp_path / "a.jsonl", [4]))
    options = {"samples": 1, "seqlen": 1, "seed": 0, option: value}
    with pytest.raises(UsageError) as caught:
        choose_samples(documents, Words(), shuffle=True, **options)
    assert caught.value.message == f"`{option}`: out of range, got {value}, expected at least {least}"


@pytest.mark.parametrize("shuffle", [True, False])
def test_memory_of_a_large_txt_file(tmp_path: Path, shuffle: bool):
    path = tmp_path / "big.txt"
    with path.open("w") as handle:
        for _ in range(100):
            handle.write("word " * 20_000 + "\n")
    tracemalloc.start()
    try:
        chosen = choose_samples(
            open_documents(str(path)), Bytes(), samples=8, seqlen=2048, seed=0, shuffle=shuffle
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert chosen.tokens.shape == (8, 2048)
    assert path.stat().st_size > 10_000_000
    assert peak < 5_000_000


def test_memory_of_a_large_jsonl_file(tmp_path: Path):
    path = tmp_path / "big.jsonl"
    with path.open("w") as handle:
        for _ in range(3000):
            handle.write('{"text": "' + "word " * 1000 + '"}\n')
    tracemalloc.start()
    try:
        chosen = choose_samples(
            open_documents(str(path)), Bytes(), samples=300, seqlen=128, seed=0, shuffle=True
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert chosen.tokens.shape == (300, 128)
    assert path.stat().st_size > 13_000_000
    assert peak < 2_000_000


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from("ab \n\t.é"), max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_pieces_are_the_text_cut_before_lone_spaces(text: str, cuts: list[int]):
    edges = [0, *sorted(cuts), len(text)]
    pieces = list(_pieces(text[a:b] for a, b in pairwise(edges) if a <= b))
    assert "".join(pieces) == text
    assert all(pieces)
    for before, after in pairwise(pieces):
        assert after[0] == " "
        assert not before[-1].isspace()
        assert not after[1].isspace()


def test_pieces_without_any_space_stay_bounded():
    blocks = ["x" * _PIECE_CHARACTERS] * 40
    pieces = list(_pieces(blocks))
    assert "".join(pieces) == "".join(blocks)
    assert len(pieces) >= 2
    assert max(map(len, pieces)) <= 17 * _PIECE_CHARACTERS


@pytest.fixture(scope="module")
def demo_tokenizer() -> Tokenizer:
    names = ("tokenizer.json", "tokenizer_config.json")
    return Tokenizer.from_files({name: (demo_model_path() / name).read_bytes() for name in names})


def long_text() -> str:
    generator = np.random.default_rng(5)
    atoms = [
        "the",
        "River's",
        "don't",
        "--",
        "1899",
        "\n\n",
        "  ",
        "é",
        "“Yes,”",
        "x" * 30,
        "\t",
        ".",
        "!?\n",
        " ",
    ]
    picks = generator.integers(0, len(atoms), 60_000)
    spaces = generator.integers(0, 4, 60_000)
    return "".join(atoms[a] + (" " if s else "") for a, s in zip(picks, spaces, strict=True))


def test_pieces_give_the_tokens_of_the_whole_text(tmp_path: Path, demo_tokenizer: Tokenizer):
    text = long_text()
    assert len(text) > 3 * _PIECE_CHARACTERS
    whole = demo_tokenizer.encode(text, special_tokens=False)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    count = len(whole) // 64
    options = {"samples": count, "seqlen": 64, "seed": 0, "shuffle": False}
    windows = choose_samples(open_documents(str(path)), demo_tokenizer, **options)
    assert windows.tokens.ravel().tolist() == whole[: 64 * count]

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    most = len(whole) - len(whole) % 100
    row = choose_samples(
        open_documents(str(path)), demo_tokenizer, **{**options, "samples": 1, "seqlen": most}
    )
    assert row.tokens[0].tolist() == whole[:most]


def test_bundled_text_gives_512_samples(demo_tokenizer: Tokenizer):
    chosen = choose_samples(
        open_documents("bundled"), demo_tokenizer, samples=512, seqlen=512, seed=0, shuffle=True
    )
    assert chosen.tokens.shape == (512, 512)
    assert chosen.skipped_short == 0
    # No special token is in the text.
    assert chosen.tokens.min() > 0
    assert chosen.tokens.max() < 8192
