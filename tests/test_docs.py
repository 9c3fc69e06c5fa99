"""The generated pages are current, and they and the prose beside them name what there is."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from qmamba_cli.cli import EXIT_INTERRUPTED
from qmamba_cli.commands import COMMANDS
from qmamba_cli.errors import ArtifactError, DeviceError, QmambaError, UsageError
from qmamba_cli.modes import COLUMNS, MODES, VARIABLES

DOCS = Path(__file__).resolve().parents[1] / "docs"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", generator.PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert page(name) == generator.current(name), "run `python docs/generate.py`"


@pytest.mark.parametrize("name", generator.PAGES)
def test_generating_twice_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text(generator.current(name), encoding="utf-8")
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    assert generator.current(name) == page(name)


def test_a_stale_page_is_reported_and_then_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in generator.PAGES:
        (tmp_path / name).write_text(page(name), encoding="utf-8")
    stale = page("modes.md").replace("| `2-4` |", "| `2-5` |")
    assert stale != page("modes.md")
    (tmp_path / "modes.md").write_text(stale, encoding="utf-8")
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    assert generator.main() == 1
    assert capsys.readouterr().err == "docs/modes.md is not current: run `python docs/generate.py`\n"
    monkeypatch.setattr("sys.argv", ["generate.py"])
    assert generator.main() == 0
    assert (tmp_path / "modes.md").read_text(encoding="utf-8") == page("modes.md")


def test_a_page_without_its_marks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modes.md").write_text("# Numeric modes\n", encoding="utf-8")
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="generated parts"):
        generator.current("modes.md")


def test_help_pages_are_plain_and_narrow() -> None:
    pages = generator.help_pages()
    assert pages.keys() == {"qmamba", *(f"qmamba {command.__name__}" for command in COMMANDS)}
    for name, text in pages.items():
        assert text.startswith(f"Usage: {name} ")
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= generator.WIDTH


def test_every_command_and_option_has_a_description() -> None:
    for name, command in generator.commands().items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help and not parameter.hidden, (name, parameter.name)
            assert parameter.help.endswith("."), (name, parameter.name)


def test_exit_codes_are_documented() -> None:
    text = page("cli.md")
    codes = {error.exit_code for error in (QmambaError, UsageError, ArtifactError, DeviceError)}
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert documented == {0, *codes, EXIT_INTERRUPTED}


def test_the_modes_page_names_everything() -> None:
    text = page("modes.md")
    for name in (*MODES, *COLUMNS, *VARIABLES):
        assert f"`{name}`" in text, name
    prose = text.partition("What the values mean")[2].partition("\n## ")[0]
    for column, kind in COLUMNS.items():
        explained = prose.partition(f"- `{column}`:")[2].partition("\n- ")[0]
        for value in kind:
            # Both values of a pair may be explained by one sentence.
            assert f"`{value}`" in explained or column == "state", (column, value)


def test_commands_in_the_pages_exist() -> None:
    known = {name.rpartition(" ")[2] for name in generator.help_pages()}
    for name in DOCS.glob("*.md"):
        for command in re.findall(r"(?:`|\$ )qmamba ([a-z]+)", name.read_text(encoding="utf-8")):
            assert command in known, (name.name, command)
