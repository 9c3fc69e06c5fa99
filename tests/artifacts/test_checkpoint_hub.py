"""Hub ids, against a small Hub on this machine: download, cache, refusals, silence and the real outage."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoint_models import add_demo_tokenizer, expected_tensors, huggingface_folder, mamba_ssm_folder
from huggingface_hub import constants

from qmamba_cli.artifacts import hub
from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves one folder as ``org/model`` and notes every request.

    Attributes:
        folder: what is served.
        status: None to serve, 0 to accept and never answer, else the status of every answer.
        requests: method and path of each request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status: int | None = None
        self.requests: list[str] = []
        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        files = {file.name: file for file in self.folder.iterdir()}
        if self.status is not None:
            return self.status, {}, b""
        if not path.startswith(("/api/models/org/model/", "/org/model/")) and path != "/api/models/org/model":
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        revision = re.search(r"/(?:revision|tree|resolve)/([^/]+)", path)
        if revision and revision[1] not in ("main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if "/resolve/" in path:
            content = files[path.rsplit("/", 1)[1]].read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, content
        if "/tree/" in path:
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in files.items()
            ]
            return 200, {}, json.dumps(rows).encode()
        info = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return 200, {}, json.dumps(info).encode()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                hub.requests.append(f"{self.command} {path}")
                if hub.status == 0:
                    hub.released.wait(30)
                    return
                status, headers, body = hub.answer(path)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "served").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    server = FakeHub(tmp_path / "served")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.close_session()
    yield server
    server.close()
    huggingface_hub.close_session()


def refusal(source: str, **options: bool) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **options)
    assert "a local folder with config.json and safetensors weights, or `demo`" in caught.value.hint
    return caught.value


def test_download_then_cache(fake_hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    model = huggingface_folder(fake_hub.folder, shard="20KB", vocab_size=8192)
    add_demo_tokenizer(fake_hub.folder)
    for name in ("README.md", "pytorch_model.bin", "model.py", "optimizer.pt"):
        (fake_hub.folder / name).write_text("not needed")
    capfd.readouterr()
    checkpoint = open_checkpoint("org/model")
    assert capfd.readouterr() == ("", "")
    assert (checkpoint.source, checkpoint.revision) == ("org/model", COMMIT)
    for name, value in expected_tensors(model).items():
        assert torch.equal(checkpoint.load(name), value), name
    assert set(checkpoint.tokenizer_files) == {"tokenizer.json", "tokenizer_config.json"}
    fetched = {request.rsplit("/", 1)[1] for request in fake_hub.requests if "/resolve/" in request}
    assert not fetched & {"README.md", "pytorch_model.bin", "model.py", "optimizer.pt"}

    before = len(fake_hub.requests)
    cached = open_checkpoint("org/model", offline=True)
    assert cached.digest == checkpoint.digest
    assert cached.tokenizer_files == checkpoint.tokenizer_files
    assert len(fake_hub.requests) == before

    fake_hub.status = 503
    assert open_checkpoint("org/model").digest == checkpoint.digest
    assert len(fake_hub.requests) == before + 1


def test_pickle_is_fetched_where_there_are_no_safetensors(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.folder.rmdir()
    mamba_ssm_folder(fake_hub.folder, weights="pytorch_model.bin")
    assert list(open_checkpoint("org/model@v1").weight_files) == ["pytorch_model.bin"]


def test_tokenizer_from_the_hub(fake_hub: FakeHub, tmp_path: Path) -> None:
    huggingface_folder(tmp_path / "local", vocab_size=8192)
    add_demo_tokenizer(fake_hub.folder)
    (fake_hub.folder / "model.safetensors").write_text("not needed")
    checkpoint = open_checkpoint(str(tmp_path / "local"), tokenizer="org/model")
    assert fake_hub.requests == []
    assert set(checkpoint.tokenizer_files) == {"tokenizer.json", "tokenizer_config.json"}
    assert not any("model.safetensors" in request for request in fake_hub.requests)
    offline = open_checkpoint(str(tmp_path / "local"), tokenizer="org/model", offline=True)
    assert offline.tokenizer_files == checkpoint.tokenizer_files


def test_definite_refusals(fake_hub: FakeHub) -> None:
    huggingface_folder(fake_hub.folder)
    assert "has no model `org/other`, or it is private" in refusal("org/other").message
    assert "`org/model` on the Hugging Face Hub has no revision `v9`" in refusal("org/model@v9").message
    assert len(fake_hub.requests) == 2


@pytest.mark.parametrize("status", [500, 503, 429])
def test_failing_hub_is_asked_once(fake_hub: FakeHub, status: int) -> None:
    fake_hub.status = status
    message = refusal("org/model").message
    assert "cannot get `org/model`: no local folder of that name, no cached copy" in message
    assert str(status) in message
    assert len(fake_hub.requests) == 1


def test_silent_hub_is_given_up(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_OPERATION_SECONDS", 30.0)
    monkeypatch.setattr(hub, "_ANSWER_SECONDS", 0.3)
    fake_hub.status = 0
    assert "no answer within 0.3 s" in refusal("org/model").message
    assert len(fake_hub.requests) == 1


def test_silent_connection_is_given_up_by_the_transport(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_OPERATION_SECONDS", 0.3)
    fake_hub.status = 0
    assert "Timeout" in refusal("org/model").message
    assert len(fake_hub.requests) == 1


def test_limits_keep_the_promise_of_ten_seconds() -> None:
    assert hub._OPERATION_SECONDS < hub._ANSWER_SECONDS < 10


def test_offline_without_a_cached_copy(fake_hub: FakeHub) -> None:
    message = refusal("org/model", offline=True).message
    assert "no cached copy, and the Hugging Face Hub cannot be asked, got `offline`" in message
    assert fake_hub.requests == []


def test_nothing_listens(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert "ConnectError" in refusal("org/model").message


def test_local_folder_wins_over_the_hub(fake_hub: FakeHub) -> None:
    huggingface_folder(Path("org/model"))
    assert open_checkpoint("org/model").revision is None
    assert fake_hub.requests == []


def test_cached_copy_without_its_weights(fake_hub: FakeHub) -> None:
    huggingface_folder(fake_hub.folder)
    open_checkpoint("org/model")
    for file in Path(constants.HF_HUB_CACHE).rglob("model.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no weights in `org/model`"):
        open_checkpoint("org/model", offline=True)


def test_download_that_breaks_off(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_folder(fake_hub.folder)
    answer = fake_hub.answer
    monkeypatch.setattr(
        fake_hub,
        "answer",
        lambda path: (403, {}, b"") if path.endswith("model.safetensors") else answer(path),
    )
    assert "cannot download `org/model` from the Hugging Face Hub" in refusal("org/model").message


def test_files_served_nowhere_are_not_retried(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The list of files comes, the files do not: huggingface_hub alone would retry for 23 seconds."""
    huggingface_folder(fake_hub.folder)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}/{revision}"
    )
    assert "cannot get `org/model`" in refusal("org/model").message
    assert not any("Retrying" in record.message for record in caplog.records)
    assert len(fake_hub.requests) == 1


def test_gated_model(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_folder(fake_hub.folder)
    answer = fake_hub.answer
    closed = (403, {"X-Error-Code": "GatedRepo"}, b"")
    monkeypatch.setattr(fake_hub, "answer", lambda path: closed if "/resolve/" in path else answer(path))
    assert "`org/model` on the Hugging Face Hub is gated" in refusal("org/model").message
