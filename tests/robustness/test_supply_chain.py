"""Inputs are data: no code of theirs runs, nothing is asked of a network, nothing is written elsewhere."""

import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from calibrations import small_text
from command_line import done, edit_json, environment, model_folder, qmamba, tree

from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.errors import CheckpointError

# Runs the command line with every attempt at a connection, a program or a change of a file elsewhere fatal.
GUARD = """
import os, sys
allowed = tuple(os.path.realpath(path) for path in sys.argv.pop(1).split(os.pathsep))
names = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
refused = (
    *("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname", "urllib.Request"),
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn", "ftplib.connect"),
)
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
def stop(event, arguments):
    os.write(2, f"GUARD: {event} {arguments!r}\\n".encode())
    os._exit(99)
def hook(event, arguments):
    if event in refused:
        # Libraries ask these what machine it is.
        program = os.path.basename(str(arguments[0]))
        if event == "subprocess.Popen" and program in ("uname", "lscpu", "ldconfig"):
            return
        stop(event, arguments)
    if event in names and not (event == "open" and not (arguments[2] or 0) & writing):
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path) != "/dev/null":
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith(tuple(f"{folder}{os.sep}" for folder in allowed)) and real not in allowed:
                stop(event, arguments)
sys.addaudithook(hook)
from qmamba_cli.cli import main
main()
"""


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def plain_pickle(path: Path, value: object) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def zipped_pickle(path: Path, value: object) -> None:
    """The form that `torch.save` has written since 1.6."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("save", [plain_pickle, zipped_pickle, lambda path, value: torch.save(value, path)])
@pytest.mark.parametrize("place", ["alone", "value", "key", "nested"])
def test_a_pickle_with_code_is_never_run(tmp_path: Path, save: Any, place: str) -> None:
    model, marker = model_folder(tmp_path / "model"), tmp_path / "executed"
    (model / "model.safetensors").unlink()
    trap = Trap(marker)
    weights: Any = {
        "alone": trap,
        "value": {"x": trap},
        "key": {"x": 1, "y": [trap]},
        "nested": [{"a": (trap,)}],
    }
    save(model / "pytorch_model.bin", weights[place])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(model)).load("backbone.embeddings.weight")
    assert not marker.exists()
    assert "could run code" in caught.value.message or "cannot be read" in caught.value.message
    pickle.loads(pickle.dumps(trap))
    assert marker.exists(), "the trap works where it is sprung"


def test_pickles_beside_safetensors_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder(tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        plain_pickle(model / name, Trap(tmp_path / "executed"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    checkpoint = open_checkpoint(str(model))
    assert checkpoint.load("backbone.embeddings.weight").numel()


def test_a_pickle_named_safetensors_is_refused(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    plain_pickle(model / "model.safetensors", Trap(tmp_path / "executed"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(str(model))
    assert not (tmp_path / "executed").exists()


def with_remote_code(model: Path, marker: Path) -> None:
    """What transformers runs with `trust_remote_code`, in every place it looks for it."""
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "__init__", "setup", "conftest"):
        (model / f"{name}.py").write_text(code)
    edit_json(
        model / "config.json",
        trust_remote_code=True,
        auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    )
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% include '/etc/passwd' %}"
    edit_json(
        model / "tokenizer_config.json",
        trust_remote_code=True,
        auto_map={"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]},
        chat_template=template,
    )


@pytest.mark.slow
def test_code_beside_a_model_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the checkpoint, and not of an artifact that carries its files."""
    marker = tmp_path / "executed"
    model = model_folder(tmp_path / "model")
    with_remote_code(model, marker)
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    work = tmp_path / "work"
    work.mkdir()
    done("calibrate", model, "--dataset", small_text(), *_small(), cwd=work)
    done("export", "--out", "ckpt.safetensors", cwd=work)
    done("export", "--out", "folder", "--format", "folder", cwd=work)
    with_remote_code_in_folder(work / "folder", marker)
    for checkpoint in ("ckpt.safetensors", "folder"):
        done("run", "--checkpoint", checkpoint, "--task", "lastword", "--limit", 1, cwd=work)
        done("run", "--checkpoint", checkpoint, "--prompt", "The", "--max-new-tokens", 2, cwd=work)
        done("inspect", checkpoint, cwd=work)
        verified = qmamba("verify", checkpoint, cwd=work)
        # The folder's config.json was edited, which is found and changes nothing else.
        assert verified.code == (3 if checkpoint == "folder" else 0), verified.err
    assert not marker.exists()
    assert not [name for name in sys.modules if name.endswith("_evil")]


def with_remote_code_in_folder(folder: Path, marker: Path) -> None:
    for name in ("modeling_evil", "tokenization_evil", "__init__"):
        (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    edit_json(folder / "config.json", trust_remote_code=True, auto_map={"AutoConfig": "modeling_evil.C"})


def _small() -> tuple[object, ...]:
    return "--samples", 2, "--seqlen", 16, "--batch-size", 2


def _no_network(*arguments: object, **_: object) -> NoReturn:
    pytest.fail(f"a connection was attempted: {arguments}")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, _no_network)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, _no_network)


ABSENT = "someone/absent-model"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "command",
    [
        ("calibrate", ABSENT),
        ("calibrate", "demo", "--tokenizer", ABSENT),
        ("calibrate", "demo", "--dataset", "someone/absent-text"),
        ("export", "--out", "x", "--model", ABSENT),
        ("run", "--mode", "fp", "--model", ABSENT, "--task", "lastword"),
        ("run", "--mode", "fp", "--model", "demo", "--task", "lambada_openai"),
    ],
)
def test_offline_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    import datasets
    import huggingface_hub.constants

    # Empty caches: what is asked for cannot be had, so that it would be fetched if it could.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    if command[0] == "export":
        done("calibrate", "demo", *_small(), "--dataset", small_text(), cwd=tmp_path)
    outcome = qmamba(*command, "--offline", cwd=tmp_path)
    assert outcome.code == 1
    assert "offline" in outcome.err
    assert "Traceback" not in outcome.err


def guarded(
    *arguments: object, cwd: Path, home: Path, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """The command line in a process that may write below ``cwd`` and in ``home/tmp`` and connect nowhere."""
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    places = {"HOME": home, "TMPDIR": home / "tmp", "XDG_CACHE_HOME": home / ".cache", "HF_HOME": home / "hf"}
    allowed = os.pathsep.join((str(cwd), str(home / "tmp")))
    return subprocess.run(
        [sys.executable, "-c", GUARD, allowed, *map(str, arguments)],
        cwd=cwd,
        env=environment(
            OMP_NUM_THREADS="1",
            PYTHONDONTWRITEBYTECODE="1",
            **{name: str(place) for name, place in places.items()},
            **variables,
        ),
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=180,
    )


@pytest.mark.slow
def test_the_stages_write_where_they_were_told_and_connect_nowhere(tmp_path: Path) -> None:
    """Calibrate, export and run; the home, the temporary folder and the inputs are as they were."""
    model, work, home = model_folder(tmp_path / "model"), tmp_path / "work", tmp_path / "home"
    work.mkdir()
    before = tree(model)
    sources = ("--dataset", small_text(), *_small())
    for command in (
        ("calibrate", model, *sources),
        ("export", "--out", "ckpt.safetensors"),
        ("run", "--task", "lastword", "--limit", 1, "--output", "results.json"),
    ):
        ended = guarded(*command, cwd=work, home=home)
        assert ended.returncode == 0, ended.stderr[-2000:]
    assert set(tree(home)) == {"tmp"}
    assert tree(model) == before
    made = {path.name for path in work.iterdir()}
    assert made == {"qmamba-artifacts", "ckpt.safetensors", "results.json"}
    assert json.loads((work / "results.json").read_text())


@pytest.mark.slow
def test_the_hubs_own_switch_asks_nobody(tmp_path: Path) -> None:
    """Without --offline, with huggingface_hub's variable: that library reads it, and so nothing is asked."""
    (tmp_path / "work").mkdir()
    ended = guarded("calibrate", ABSENT, cwd=tmp_path / "work", home=tmp_path / "home", HF_HUB_OFFLINE="1")
    assert "GUARD" not in ended.stderr
    assert ended.returncode == 1
    assert "cannot be asked" in ended.stderr
