"""Output tokens of a recogniser: characters, a list of tokens, a SentencePiece model, or a ``tokenizers`` file.

Token numbers are those of the CTC output: 0 is the blank, ``i + 1`` the vocabulary's entry ``i``. A vocabulary is a
value: its kind and its bytes make it anew, and are stored with the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from nest_fn.extras import load_extra
from nest_fn.files.inputs import read_plain
from nest_fn.files.quoting import shown
from nest_fn.train.errors import CheckpointError, UsageError

BLANK = 0


class Tokenizer(Protocol):
    """Maps texts to token numbers and back."""

    @property
    def kind(self) -> str:
        """``characters``, ``list``, ``sentencepiece`` or ``tokenizers``."""

    @property
    def size(self) -> int:
        """Number of tokens, without the blank."""

    @property
    def content(self) -> bytes:
        """The vocabulary, from which ``tokenizer_from`` makes an equal one."""

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text; what is unknown has the number of the unknown token, or none."""

    def unknown(self, text: str) -> list[str]:
        """Parts of a text that no token stands for, each once."""

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of token numbers without blanks and repeats."""

    def token(self, number: int) -> str:
        """One token as text."""


@dataclass(frozen=True)
class TokenList:
    """Tokens of one or more characters; a text is divided from left to right, always by the longest token."""

    tokens: tuple[str, ...]
    kind: str = "list"

    @property
    def size(self) -> int:
        """Number of tokens, without the blank."""
        return len(self.tokens)

    @property
    def content(self) -> bytes:
        """One token a line, in UTF-8."""
        return "".join(f"{token}\n" for token in self.tokens).encode()

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text; characters that begin no token are skipped."""
        return [number for number, _ in self._divided(text) if number != BLANK]

    def unknown(self, text: str) -> list[str]:
        """Characters that begin no token."""
        return sorted({part for number, part in self._divided(text) if number == BLANK})

    def decode(self, numbers: Sequence[int]) -> str:
        """The tokens, joined."""
        return "".join(self.token(number) for number in numbers)

    def token(self, number: int) -> str:
        """One token as text."""
        return self.tokens[number - 1]

    @cached_property
    def _number(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens, start=1)}

    @cached_property
    def _lengths(self) -> list[int]:
        """Lengths that tokens have, the longest first."""
        return sorted(set(map(len, self.tokens)), reverse=True)

    def _divided(self, text: str) -> list[tuple[int, str]]:
        """Numbers and parts of a text; 0 for a character that begins no token."""
        parts, place = [], 0
        while place < len(text):
            left = len(text) - place
            pieces = (text[place : place + length] for length in self._lengths if length <= left)
            part = next((piece for piece in pieces if piece in self._number), text[place])
            parts.append((self._number.get(part, BLANK), part))
            place += len(part)
        return parts


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model (arXiv 1808.06226), from its serialised bytes."""

    content: bytes
    kind: str = "sentencepiece"

    @property
    def size(self) -> int:
        """Number of pieces, the unknown one included."""
        return int(self._model.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text."""
        return [number + 1 for number in self._model.encode(text)]

    def unknown(self, text: str) -> list[str]:
        """Parts of a text for which the model has only its unknown piece."""
        pieces, place = self._model.encode(text, out_type=str), self._model.unk_id()
        return sorted({piece for piece in pieces if self._model.piece_to_id(piece) == place})

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of token numbers."""
        return str(self._model.decode([number - 1 for number in numbers]))

    def token(self, number: int) -> str:
        """One piece; ``▁`` begins a word."""
        return str(self._model.id_to_piece(number - 1))

    @cached_property
    def _model(self) -> Any:
        try:
            return optional("sentencepiece").SentencePieceProcessor(model_proto=self.content)
        except RuntimeError as error:
            raise UsageError(f"tokenizer: no SentencePiece model: {first_line(error)}") from error


@dataclass(frozen=True)
class JsonTokenizer:
    """A tokenizer of the package ``tokenizers``, from its JSON."""

    content: bytes
    kind: str = "tokenizers"

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without special tokens."""
        return [number + 1 for number in self._tokenizer.encode(text, add_special_tokens=False).ids]

    def unknown(self, text: str) -> list[str]:
        """Parts of a text for which the tokenizer has only its unknown token."""
        made = self._tokenizer.encode(text, add_special_tokens=False)
        return sorted({text[slice(*place)] for number, place in zip(made.ids, made.offsets, strict=True)
                       if number == self._unknown_id})  # fmt: skip

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of token numbers."""
        return str(self._tokenizer.decode([number - 1 for number in numbers]))

    def token(self, number: int) -> str:
        """One token as the vocabulary spells it."""
        return str(self._tokenizer.id_to_token(number - 1))

    @cached_property
    def _unknown_id(self) -> int | None:
        name = json.loads(self.content).get("model", {}).get("unk_token")
        return None if name is None else self._tokenizer.token_to_id(name)

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            return optional("tokenizers").Tokenizer.from_str(self.content.decode("utf-8"))
        except Exception as error:  # the package raises Exception itself
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"tokenizer: no JSON of the package tokenizers: {first_line(error)}") from error


def characters_of(texts: Sequence[str]) -> TokenList:
    """All characters of the texts, sorted, as tokens."""
    return TokenList(tuple(sorted(set("".join(texts)))), "characters")


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary in a file: ``.json`` of tokenizers, ``.model`` of SentencePiece, else text, one token a line.

    Raises ``UsageError`` if the file cannot be read or is none of these.
    """
    try:
        content = read_plain(path)
    except OSError as error:
        raise UsageError(f"tokens {path}: {error.strerror or error}; give a file with one token a line, a SentencePiece"
                         " .model or a tokenizers .json.") from error  # fmt: skip
    suffix = Path(path).suffix
    if suffix not in (".json", ".model"):
        return _read_list(path, content)
    made: Tokenizer = JsonTokenizer(content) if suffix == ".json" else SentencePiece(content)
    try:
        if made.size < 1:
            raise UsageError("holds no token")
    except UsageError as error:
        raise UsageError(f"tokens {path}: {error}") from error
    return made


def tokenizer_from(kind: str, content: bytes) -> Tokenizer:
    """The vocabulary of the given kind that ``Tokenizer.content`` gave. Raises ``CheckpointError``."""
    if kind == "sentencepiece":
        return SentencePiece(content)
    if kind == "tokenizers":
        return JsonTokenizer(content)
    if kind in ("characters", "list"):
        return TokenList(tuple(content.decode().removesuffix("\n").split("\n")), kind)
    raise CheckpointError(f"tokenizer: of kind {shown(kind)}, which this version does not know.")


def _read_list(path: str | Path, content: bytes) -> TokenList:
    try:
        tokens = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"tokens {path}: is not UTF-8 text (byte {error.start}); save it so.") from error
    invalid = [token for token, count in Counter(tokens).items() if count > 1 or not token]
    if invalid or not tokens:
        why = f"{shown(invalid[0])} stands in it twice or is empty" if invalid else "holds no token"
        raise UsageError(f"tokens {path}: {why}; want one token a line, each once.")
    return TokenList(tuple(tokens))


def optional(package: str) -> Any:
    """An optional package that makes tokens. Raises ``UsageError`` that names its extra, and the tokens without it."""
    try:
        return load_extra(package)
    except ImportError as error:
        raise UsageError(f"tokenizer: {error}, or choose --tokens characters") from error


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, cut to a readable length."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
