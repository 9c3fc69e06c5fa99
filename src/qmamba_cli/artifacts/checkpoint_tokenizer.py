"""Tokenizer files of a source checkpoint, brought into the form of the tokenizers library."""

import json
from pathlib import Path

from qmamba_cli.errors import CheckpointError

TOKENIZER_JSON = "tokenizer.json"
# Kept beside tokenizer.json where the checkpoint has them.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES = (TOKENIZER_JSON, *_COMPANIONS)
# Any of these shows a tokenizer in an older form that transformers can convert.
_OLDER_FORMS = ("vocab.json", "vocab.txt", "*.model")
_HINT = "name a folder or a Hub id that has one with `--tokenizer`"


def read_tokenizer(folder: Path, source: str, vocab_size: int) -> dict[str, bytes]:
    """Tokenizer files by name: tokenizer.json first, then the companions the folder has.

    A tokenizer in an older form is converted by transformers; no code of the folder is run.

    Args:
        folder: where the tokenizer lies.
        source: how messages name it.
        vocab_size: rows of the model's embedding, which must have one for every token.

    Raises:
        CheckpointError: there is no tokenizer, it is damaged, or it has more tokens than the model.
    """
    companions = {name: _read(folder / name, source) for name in _COMPANIONS if (folder / name).is_file()}
    if (folder / TOKENIZER_JSON).is_file():
        content = _read(folder / TOKENIZER_JSON, source)
    elif any(any(folder.glob(pattern)) for pattern in _OLDER_FORMS):
        content = _convert(folder, source)
    else:
        raise CheckpointError(f"no tokenizer in `{source}`, expected `{TOKENIZER_JSON}`", hint=_HINT)
    _check(content, source, vocab_size)
    for name, companion in companions.items():
        try:
            json.loads(companion)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"`{name}` of `{source}` is no JSON, got `{error}`, expected a JSON object", hint=_HINT
            ) from None
    return {TOKENIZER_JSON: content, **companions}


def _read(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"`{path.name}` of `{source}` cannot be read, got `{error.strerror}`, expected a tokenizer file"
        ) from None


def _convert(folder: Path, source: str) -> bytes:
    """tokenizer.json of a tokenizer in an older form."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        content: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        # Each of transformers' tokenizer classes fails in its own way.
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"the tokenizer of `{source}` cannot be converted, got `{type(error).__name__}: {first_line}`, "
            f"expected `{TOKENIZER_JSON}` or a form that transformers converts",
            hint=_HINT,
        ) from None
    return content.encode()


def _check(content: bytes, source: str, vocab_size: int) -> None:
    """Refuse a tokenizer that cannot be loaded or whose ids the model has no rows for."""
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True).values()
    except Exception as error:
        # The tokenizers library raises bare Exception.
        raise CheckpointError(
            f"`{TOKENIZER_JSON}` of `{source}` is damaged, got `{error}`, expected a tokenizer", hint=_HINT
        ) from None
    largest = max(ids, default=-1)
    if largest < 0:
        raise CheckpointError(f"the tokenizer of `{source}` has no tokens, expected at least one", hint=_HINT)
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of `{source}` does not fit the model, got token id {largest}, "
            f"expected ids below the {vocab_size} rows of the embedding",
            hint="name the tokenizer the model was trained with with `--tokenizer`",
        )
