"""Promises of the repository's own files: digests, data formats, pins, links, sizes."""

import hashlib
import json
import re
import shutil
import subprocess
import tomllib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qmamba_cli
from qmamba_cli.modes import MODES
from qmamba_cli.resources import demo_model_path
from qmamba_cli.tokenizer import TOKENIZER_FILES, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
CALIB_DATA = ROOT / "calib_data"
CARD = ROOT / "src/qmamba_cli/demo/mamba-5m/README.md"
BUNDLED = ("src/qmamba_cli/demo/", "calib_data/")
LARGEST = 300_000
PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npy"}


@cache
def repository_files() -> tuple[Path, ...]:
    """Files of the repository, committed or about to be."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines_of(name: str) -> list[dict[str, str]]:
    content = (CALIB_DATA / name).read_bytes()
    assert content.endswith(b"\n")
    assert b"\r" not in content
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


@pytest.mark.parametrize("name", ["calibration.jsonl", "lastword.jsonl"])
def test_calibration_data_has_the_digest_on_record(name):
    sections = re.split(r"^## ", (CALIB_DATA / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [section for section in sections if section.startswith(f"{name}\n")]
    assert re.findall(r"^sha256: ([0-9a-f]{64})$", section, flags=re.MULTILINE) == [sha256(CALIB_DATA / name)]


def test_model_card_has_the_digest_of_every_file():
    recorded = dict(
        re.findall(r"^\| `([\w.]+)` \| `([0-9a-f]{64})` \|$", CARD.read_text("utf-8"), re.MULTILINE)
    )
    files = {path.name: sha256(path) for path in CARD.parent.iterdir() if path != CARD}
    assert "model.safetensors" in files
    assert recorded == files


def test_lastword_passages_have_lambadas_format():
    rows = lines_of("lastword.jsonl")
    texts = [row["text"] for row in rows]
    assert len(texts) >= 200
    assert len(set(texts)) == len(texts)
    for number, row in enumerate(rows, 1):
        text = row["text"]
        words = text.split(" ")
        assert set(row) == {"text"}, number
        assert text.isascii(), number
        assert text == " ".join(text.split()), f"line {number}: white space"
        assert 40 <= len(words) <= 110, f"line {number}: {len(words)} words"
        assert words[-1].isalpha(), f"line {number}: last word `{words[-1]}`"


def test_lastword_targets_mostly_occur_in_the_passage():
    def occurs(text: str) -> bool:
        *context, last = re.findall(r"[a-z]+", text.lower())
        return last in context

    texts = [row["text"] for row in lines_of("lastword.jsonl")]
    assert sum(map(occurs, texts)) >= 0.8 * len(texts)


def test_calibration_text_serves_the_defaults_of_calibrate():
    folder = demo_model_path()
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    tokenizer = Tokenizer.from_files({name: (folder / name).read_bytes() for name in names})
    rows = lines_of("calibration.jsonl")
    assert {frozenset(row) for row in rows} == {frozenset({"text"})}
    lengths = [len(tokenizer.encode(row["text"], special_tokens=False)) for row in rows]
    assert len([length for length in lengths if length >= 512]) >= 512


def test_version_lives_in_one_place():
    assert version("qmamba-cli") == qmamba_cli.__version__
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in pyproject["project"]
    literal = re.compile(rf"""["']{re.escape(qmamba_cli.__version__)}["']""")
    sources = [
        path for path in (ROOT / "src").rglob("*.py") if literal.search(path.read_text(encoding="utf-8"))
    ]
    assert [relative(path) for path in sources] == ["src/qmamba_cli/__init__.py"]


def test_changelog_describes_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    assert headings[:2] == ["Unreleased", qmamba_cli.__version__]


def pins() -> dict[str, str]:
    rows = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [row.split("==") for row in rows if row and not row.startswith("#")]
    assert [row for row in exact if len(row) != 2] == []
    return {canonicalize_name(name): pin for name, pin in exact}


def test_every_dependency_has_an_exact_pin_in_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = pins()
    assert len(wanted) > 10
    for requirement in map(Requirement, wanted):
        pin = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} and {requirement.name}=={pin}"


def test_pins_name_no_build_of_one_machine():
    assert {name: pin for name, pin in pins().items() if Version(pin).local} == {}


def test_ci_calls_make_check_and_that_the_tests():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    assert "make check" in script.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (check,) = re.findall(r"^check:(.*)$", makefile, flags=re.MULTILINE)
    assert check.split() == ["lint", "test"]


def test_no_large_file_outside_the_bundled_data():
    large = [
        relative(path)
        for path in repository_files()
        if path.stat().st_size > LARGEST and not relative(path).startswith(BUNDLED)
    ]
    assert large == []


def test_no_pickles():
    def is_pickle(path: Path) -> bool:
        with path.open("rb") as file:
            # Protocol 2 and later begin with this opcode and the protocol's number.
            head = file.read(2)
        return path.suffix in PICKLES or (len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5)

    assert [relative(path) for path in repository_files() if is_pickle(path)] == []


def test_commit_hooks_are_local_and_pass():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert set(hooks) == {"ruff", "ruff-format", "large-files", "no-pickles", "no-environment"}
    pattern = re.compile(hooks["no-environment"]["entry"])
    files, exclude = (re.compile(hooks["no-environment"][key]) for key in ("files", "exclude"))
    seen = [path for path in repository_files() if files.search(relative(path))]
    allowed = [path for path in seen if exclude.search(relative(path))]
    assert [relative(path) for path in allowed] == ["src/qmamba_cli/cli.py"]
    assert pattern.search(allowed[0].read_text(encoding="utf-8"))
    found = [path for path in seen if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == allowed


def markdown_files() -> list[Path]:
    return sorted(path for path in repository_files() if path.suffix == ".md")


def test_links_between_pages_lead_somewhere():
    pages = markdown_files()
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md"} <= set(map(relative, pages))
    broken = []
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"[a-z]+:|#", target) and not (page.parent / target.partition("#")[0]).exists():
                broken.append(f"{relative(page)}: {target}")
    assert broken == []


def test_readme_shows_every_mode_and_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in readme.splitlines()}
    rows = set(re.findall(r"^\| ([\w-]+) \|", readme, flags=re.MULTILINE))
    assert set(MODES) <= rows


def test_no_path_of_one_machine_is_written_down():
    pattern = re.compile(r"(?<![\w.~])/(?:home|root|Users|work)/\w")
    me = Path(__file__).name
    texts = [
        path
        for path in repository_files()
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".json", ".cu", ".cuh"}
        and not relative(path).startswith(BUNDLED[0] + "mamba-5m/tokenizer")
        and path.name != me
    ]
    assert [relative(path) for path in texts if pattern.search(path.read_text(encoding="utf-8"))] == []
