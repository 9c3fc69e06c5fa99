"""Text to token ids and back, from the tokenizer's own files and the light `tokenizers` library.

The files are data: no code that comes with a tokenizer is ever run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer

from qmamba_cli.errors import CheckpointError, DatasetError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
# Everything `Tokenizer.from_files` reads; only the first must be there.
TOKENIZER_FILES = (TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE)

# transformers writes int(1e30) where a tokenizer has no limit of its own.
_NO_LIMIT = 10**18
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What the class of the published Mamba tokenizers supplies in transformers where the files name nothing.
_NEOX_CLASSES = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast")
_NEOX_TOKENS: Mapping[str, object] = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
_ADDED_TOKEN_OPTIONS = ("lstrip", "rstrip", "single_word", "normalized")
_REPLACEMENT = "\ufffd"
_HINT = "use a model folder saved by transformers with a fast tokenizer (`tokenizer.json`)"


class Tokenizer:
    """A fast tokenizer as transformers would load it from the same files.

    Args:
        backend: the parsed `tokenizer.json`.
        bos_id: beginning of text, or None.
        eos_id: end of text, or None.
        model_max_length: longest input in tokens the tokenizer declares, or None.
    """

    def __init__(
        self,
        backend: BackendTokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        model_max_length: int | None = None,
    ) -> None:
        # A file may carry the padding and truncation of its training run; transformers switches both off.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.model_max_length = model_max_length

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """Build a tokenizer from the content of its files, keyed by file name.

        Args:
            files: `tokenizer.json`, and `tokenizer_config.json` and `special_tokens_map.json` where the
                model has them. Other keys are ignored.

        Raises:
            CheckpointError: `tokenizer.json` is missing, or a file cannot be read.
        """
        content = files.get(TOKENIZER_FILE)
        if content is None:
            found = ", ".join(f"`{name}`" for name in sorted(files)) or "no files"
            raise CheckpointError(f"tokenizer: got {found}, expected `{TOKENIZER_FILE}`", hint=_HINT)
        try:
            backend = BackendTokenizer.from_str(content.decode("utf-8"))
        # The backend raises plain Exception for whatever it cannot parse.
        except Exception as error:
            raise CheckpointError(
                f"tokenizer: `{TOKENIZER_FILE}` cannot be read, got {_first_line(error)}", hint=_HINT
            ) from None
        config = _read_object(files, CONFIG_FILE)
        named = _special_tokens(config, _read_object(files, SPECIAL_TOKENS_FILE))
        # As in transformers, a token that is named special is found in any text, whatever the merges say.
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens([token for token in named.values() if token.content not in known])
        ids = {name: backend.token_to_id(token.content) for name, token in named.items()}
        limit = config.get("model_max_length")
        return cls(
            backend,
            bos_id=ids.get("bos_token"),
            eos_id=ids.get("eos_token"),
            model_max_length=int(limit) if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT else None,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model may pad its vocabulary beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def prefix_id(self) -> int | None:
        """The token that stands for an empty context: bos, else eos, else None."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def adds_special_tokens(self) -> bool:
        """Whether `encode` puts special tokens around a text unless told not to."""
        return bool(self._backend.num_special_tokens_to_add(False))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; a special token spelled out in it becomes that token, as in transformers.
            special_tokens: add the tokenizer's default special tokens (none for GPT-NeoX), as transformers
                and lm-eval do; False for running text.

        Raises:
            DatasetError: the text is no Unicode text (it holds half of a surrogate pair).
        """
        return self.encode_batch([text], special_tokens=special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """`encode` for several texts, in parallel.

        Raises:
            DatasetError: a text is no Unicode text.
        """
        for number, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise DatasetError(f"text {number}: got a lone surrogate, expected Unicode text") from None
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=special_tokens)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def to_transformers(self) -> Any:
        """The same tokenizer as a `transformers.PreTrainedTokenizerFast`, for libraries that want one."""
        from transformers import PreTrainedTokenizerFast

        named = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return PreTrainedTokenizerFast(
            tokenizer_object=BackendTokenizer.from_str(self._backend.to_str()),
            clean_up_tokenization_spaces=False,
            **{role: self._backend.id_to_token(token) for role, token in named.items() if token is not None},
        )

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder that is fed one token at a time."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)


class StreamDecoder:
    """Decodes tokens one by one; the pieces joined equal `Tokenizer.decode` of all of them.

    A character whose bytes are spread over several tokens is held back until it is whole; `flush` gives
    what is left at the end. Byte-level vocabularies (GPT-NeoX) keep the equality for any tokens at all;
    vocabularies with byte fallback keep it for tokens that are valid UTF-8 together.

    Args:
        tokenizer: the tokenizer of the ids.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Some decoders treat the first token apart, so pending tokens are decoded behind settled ones.
        self._settled: list[int] = []
        self._settled_text = ""
        self._pending: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._pending.append(token_id)
        text = self._pending_text()
        # Replacement characters at the end may be a character that is not whole yet.
        certain = text.rstrip(_REPLACEMENT)
        piece = certain[self._emitted :]
        self._emitted = max(self._emitted, len(certain))
        if certain and certain == text:
            self._settle()
        return piece

    def flush(self) -> str:
        """The text still held back; the decoder is then ready for a new sequence."""
        piece = self._pending_text()[self._emitted :]
        self._settled, self._settled_text, self._pending, self._emitted = [], "", [], 0
        return piece

    def _settle(self) -> None:
        self._settled, self._pending, self._emitted = self._pending, [], 0
        # Alone, these tokens may have lost a leading space; the text behind them counts from there.
        self._settled_text = self._decode(self._settled)

    def _pending_text(self) -> str:
        return self._decode(self._settled + self._pending)[len(self._settled_text) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _read_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no such file."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"tokenizer: `{name}` cannot be read, got {_first_line(error)}, expected a JSON object"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"tokenizer: `{name}` cannot be used, got a JSON {type(value).__name__}, expected an object"
        )
    return value


def _special_tokens(config: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The special tokens by role, from both files as transformers weighs them."""
    defaults = _NEOX_TOKENS if config.get("tokenizer_class") in _NEOX_CLASSES else {}
    # special_tokens_map.json is the older file and has the last word, unless the configuration lists its
    # added tokens itself.
    sources = (defaults, config) if "added_tokens_decoder" in config else (defaults, config, special)
    tokens = {}
    for role in _SPECIAL_TOKENS:
        token = None
        for source in sources:
            token = _special_token(source[role]) if role in source else token
        if token is not None:
            tokens[role] = token
    return tokens


def _special_token(value: object) -> AddedToken | None:
    """A special token written as a string or as an object with ``content``; None for anything else."""
    options: dict[str, bool] = {}
    if isinstance(value, dict):
        options = {name: bool(value[name]) for name in _ADDED_TOKEN_OPTIONS if name in value}
        value = value.get("content")
    return AddedToken(value, special=True, **options) if isinstance(value, str) and value else None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"`{lines[0]}`" if lines else f"`{type(error).__name__}`"
