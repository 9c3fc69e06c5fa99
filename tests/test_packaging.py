"""What the wheel and the sdist hold, and that an installed wheel works outside the source tree."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import qmamba_cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/qmamba_cli"
DATA = {"README.md", "calibration.jsonl", "lastword.jsonl"}
IN_CHECKOUT = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")
pytestmark = IN_CHECKOUT


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(target: str, source: Path, out: Path) -> Path:
    """Build without isolation, so without a network."""
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out, cwd=source)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq")
    run(*pip, "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_every_file_of_the_package(wheel):
    packed = contents(wheel)
    sources = {
        str(path.relative_to(ROOT / "src")): path
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"qmamba_cli/py.typed", "qmamba_cli/demo/mamba-5m/model.safetensors"} <= set(sources)
    assert not set(sources) - set(packed)
    assert [name for name, path in sources.items() if packed[name] != path.read_bytes()] == []


def test_wheel_holds_the_data_and_nothing_foreign(wheel):
    packed = contents(wheel)
    data = {name.removeprefix("qmamba_cli/calib_data/") for name in packed if "calib_data" in name}
    assert data == DATA
    for name in DATA:
        assert packed[f"qmamba_cli/calib_data/{name}"] == (ROOT / "calib_data" / name).read_bytes()
    tops = {name.partition("/")[0] for name in packed}
    assert tops == {"qmamba_cli", f"qmamba_cli-{qmamba_cli.__version__}.dist-info"}


def test_wheel_metadata(wheel):
    packed = contents(wheel)
    folder = f"qmamba_cli-{qmamba_cli.__version__}.dist-info"
    metadata = message_from_bytes(packed[f"{folder}/METADATA"])
    assert metadata["Name"] == "qmamba-cli"
    assert metadata["Version"] == qmamba_cli.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{folder}/licenses/LICENSE" in packed
    assert "qmamba = qmamba_cli.cli:main" in packed[f"{folder}/entry_points.txt"].decode()
    plain = [row for row in metadata.get_all("Requires-Dist", []) if "extra ==" not in row]
    assert not [row for row in plain if "cupy" in row or "cuda" in row]
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras >= {"cuda12", "cuda13", "lm-eval", "dev"}


def test_two_builds_are_equal(wheel, tmp_path):
    assert build("wheel", ROOT, tmp_path).read_bytes() == wheel.read_bytes()


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    assert {"Makefile", "constraints.txt", "CHANGELOG.md", "LICENSE", "tests"} <= {
        path.name for path in tree.iterdir()
    }
    assert not list(tree.rglob("*.pyc"))
    rebuilt = build("wheel", tree, tmp_path / "wheel")
    assert contents(rebuilt) == contents(wheel)


def test_installed_wheel_finds_what_it_ships(installed, tmp_path):
    code = (
        "from qmamba_cli.resources import calib_data_path, demo_model_path as demo;"
        "print(demo()); print(calib_data_path('calibration.jsonl')); print(calib_data_path('lastword.jsonl'))"
    )
    lines = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert len(lines) == 3
    assert [line for line in lines if not Path(line).is_relative_to(installed / "qmamba_cli")] == []


def test_installed_wheel_runs_from_any_folder(installed, tmp_path):
    command = (sys.executable, "-m", "qmamba_cli", "calibrate", "demo", "--dry-run", "--json")
    out = run(*command, "--samples", "4", cwd=tmp_path, PYTHONPATH=str(installed))
    assert json.loads(out)["samples"] == 4
    assert list(tmp_path.iterdir()) == []
