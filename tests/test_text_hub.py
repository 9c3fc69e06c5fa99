import hashlib
import shutil
import threading
from pathlib import Path
from typing import NoReturn

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from qmamba_cli.errors import DatasetError
from qmamba_cli.text import hub, load_hub_dataset, open_documents

TEXTS = [f"text number {i}" for i in range(7)]


def asking_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[str]:
    """Let the Hub answer with ``error``; the names asked for are collected."""
    asked: list[str] = []

    def answer(self: object, name: str, **options: object) -> NoReturn:
        asked.append(name)
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", answer)
    return asked


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def cache(empty_cache: Path, tmp_path: Path) -> Path:
    """A cache that holds ``someone/tiny``, configuration ``default``, split ``train``."""
    datasets.disable_progress_bars()
    source = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": TEXTS, "label": list(range(7))}).to_parquet(source)
    datasets.load_dataset("parquet", data_files={"train": str(source)}, cache_dir=str(tmp_path / "made"))
    (built,) = (tmp_path / "made").glob("parquet/*/*/*/dataset_info.json")
    # The place and the names that a download of this dataset has.
    target = empty_cache / "someone___tiny" / "default" / "0.0.0" / ("0" * 40)
    target.parent.mkdir(parents=True)
    shutil.copytree(built.parent, target)
    (target / "parquet-train.arrow").rename(target / "tiny-train.arrow")
    info = target / "dataset_info.json"
    info.write_text(info.read_text().replace('"dataset_name": "parquet"', '"dataset_name": "tiny"'))
    return empty_cache


UNREACHABLE = [
    ConnectionError("no route"),
    HfHubHTTPError.__new__(HfHubHTTPError),
    huggingface_hub.errors.OfflineModeIsEnabled("offline"),
]


@pytest.mark.parametrize("error", UNREACHABLE, ids=lambda error: type(error).__name__)
def test_unreachable_names_the_local_ways(monkeypatch, empty_cache: Path, error: Exception):
    asked = asking_raises(monkeypatch, error)
    with pytest.raises(DatasetError) as caught:
        open_documents("someone/absent:config:test")
    assert caught.value.message.startswith(
        "dataset `someone/absent`, configuration `config`, split `test`: the Hub cannot be reached ("
    )
    assert caught.value.message.endswith("and there is no cached copy")
    for way in (".jsonl", ".txt", ".parquet", "--dataset bundled", "--dataset self"):
        assert way in caught.value.hint
    # One question and no retries.
    assert asked == ["someone/absent"]
    assert caught.value.exit_code == 1


def test_silent_network_is_given_up(monkeypatch, empty_cache: Path):
    forever = threading.Event()

    def answer(self: object, name: str, **options: object) -> object:
        assert options["timeout"] == hub._REQUEST_SECONDS
        forever.wait(60)
        raise RuntimeError("waited for the answer")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", answer)
    monkeypatch.setattr(hub, "_PROBE_SECONDS", 0.1)
    try:
        with pytest.raises(DatasetError, match="no answer within"):
            open_documents("someone/absent")
    finally:
        forever.set()


def test_limits_stay_below_ten_seconds():
    assert hub._REQUEST_SECONDS < hub._PROBE_SECONDS <= 7


def test_the_library_goes_offline_only_for_the_cache(monkeypatch, empty_cache: Path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asking_raises(monkeypatch, ConnectionError("no route"))
    states: list[bool] = []

    def load(*arguments: object, **options: object) -> NoReturn:
        states.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DatasetError):
        open_documents("someone/absent")
    assert states == [True]
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("name", ["someone/tiny", "someone/tiny:default", "someone/tiny::train"])
def test_cached_copy_serves_without_the_hub(monkeypatch, cache: Path, name: str, offline: bool):
    asked = asking_raises(monkeypatch, ConnectionError("no route"))
    documents = open_documents(name, offline=offline)
    assert [documents[i] for i in range(len(documents))] == TEXTS
    assert documents.name == name
    assert len(documents.digest) == 64
    assert asked == ([] if offline else ["someone/tiny"])


def test_cached_copy_without_the_split_or_column(monkeypatch, cache: Path):
    with pytest.raises(DatasetError, match=r"the cached copy is of no use, got .*validation"):
        open_documents("someone/tiny::validation", offline=True)
    with pytest.raises(DatasetError, match=r"the cached copy is of no use, got .*other"):
        open_documents("someone/tiny:other", offline=True)
    with pytest.raises(DatasetError, match="no column `body`, got `text`, `label`"):
        open_documents("someone/tiny", text_column="body", offline=True)
    with pytest.raises(DatasetError, match="row 2, column `label`: must be a string, got a number"):
        open_documents("someone/tiny", text_column="label", offline=True)[2]


def test_unknown_dataset_is_not_taken_for_a_dead_network(monkeypatch, cache: Path):
    asking_raises(monkeypatch, RepositoryNotFoundError.__new__(RepositoryNotFoundError))
    with pytest.raises(DatasetError, match="`someone/tiny`: no such dataset on the Hub"):
        open_documents("someone/tiny")


@pytest.mark.parametrize("name", ["a--b", "x..y", "n" * 200])
def test_what_the_hub_would_refuse_as_a_name(empty_cache: Path, name: str):
    with pytest.raises(DatasetError, match="not a Hub name") as caught:
        open_documents(name)
    assert f"`{name}`" in caught.value.message


def test_reachable_hub_pins_the_revision(monkeypatch, empty_cache: Path):
    class Info:
        sha = "f" * 40

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **options: Info())
    calls: list[tuple[tuple, dict]] = []
    rows = datasets.Dataset.from_dict({"text": TEXTS})

    def load(*arguments, **options):
        calls.append((arguments, options))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    documents = open_documents("someone/tiny:config:test[:7]")
    assert calls == [(("someone/tiny", "config"), {"split": "test[:7]", "revision": "f" * 40})]
    assert documents[6] == TEXTS[6]
    assert documents.digest == hashlib.sha256(rows._fingerprint.encode()).hexdigest()


def test_failure_after_the_hub_answered(monkeypatch, empty_cache: Path):
    class Info:
        sha = "f" * 40

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **options: Info())

    def load(*arguments, **options):
        raise ValueError("Unknown split\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DatasetError) as caught:
        load_hub_dataset("someone/tiny", None, "train", offline=False, hint="the way out")
    assert caught.value.message == (
        "dataset `someone/tiny`, split `train`: cannot be loaded from the Hub, got Unknown split"
    )
    assert caught.value.hint == "the way out"
