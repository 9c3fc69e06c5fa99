"""Errors as people read them: what, got, expected, and a next step."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qmamba_cli.errors import (
    ArtifactError,
    CheckpointError,
    DatasetError,
    DeviceError,
    QmambaError,
    UsageError,
)

if TYPE_CHECKING:
    pass

# The next step where an error names none.
_NEXT_STEPS: Mapping[type[QmambaError], str] = {
    ArtifactError: "copy the artifact again, or make it again with `qmamba calibrate` and `qmamba export`",
    CheckpointError: "name another checkpoint, or `demo`, the bundled model",
    DatasetError: "correct the text, or use the bundled one: `--dataset bundled`, `--task lastword`",
    DeviceError: "use the CPU: `--backend cpu`, or `--device cpu` of `qmamba calibrate`",
}
# How the parser of options says what it wanted.
_WANTED = "Input should be "
_BARE_OPTION = re.compile(r"(?<![\w`-])--?[a-zA-Z][\w-]*(?![\w`-])")


def problem_of(error: BaseException, arguments: Sequence[str]) -> QmambaError:
    """What went wrong in this program's manner, with a next step: the error's own or that of its kind.

    Args:
        error: one of this program's errors, a `MemoryError`, or a complaint of the parser of options.
        arguments: the command line after the program's name.
    """
    if isinstance(error, MemoryError):
        return QmambaError("out of memory", hint="try a smaller `--batch-size` or `--seqlen`")
    problem = error if isinstance(error, QmambaError) else _usage_error(error, arguments)
    if not problem.hint:
        command = " ".join(["qmamba", *arguments[:1]])
        problem.hint = _NEXT_STEPS.get(type(problem), f"`{command} --help` lists the options")
    return problem


def _usage_error(error: Any, arguments: Sequence[str]) -> UsageError:
    context = getattr(error, "ctx", None)
    command = "qmamba" if context is None else context.command_path
    text = error.format_message().strip().rstrip(".").replace("'", "`")
    options: Sequence[str] = getattr(getattr(error, "param", None), "opts", ())
    if _WANTED in text and options:
        wanted = text.partition(_WANTED)[2].partition(",")[0]
        text = f"invalid value of `{options[0]}`, got `{_given(options, arguments)}`, expected {wanted}"
    text = _BARE_OPTION.sub(r"`\g<0>`", text)
    return UsageError(text[:1].lower() + text[1:], hint=f"`{command} --help` lists the options")


def _given(options: Sequence[str], arguments: Sequence[str]) -> str:
    """What the command line says behind one of an option's names; the last word where it is given twice."""
    given = ""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in options:
            given = value if equals else following
    return given
