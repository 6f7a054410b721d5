"""Vocabularies: encode, decode, what is unknown, and the smallest pieces that fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nest_fn.train.ctc.pieces import FITTING, frames_needed, share_fitting, train_fitting_pieces, train_pieces
from nest_fn.train.ctc.tokens import Tokenizer, TokenList, characters_of, read_tokenizer, tokenizer_from
from nest_fn.train.errors import DataError, UsageError

DRAW = np.random.Generator(np.random.Philox(3))
WORDS = ["".join(DRAW.choice(list("kstrmn")) + DRAW.choice(list("aeiou")) for _ in range(3)) for _ in range(30)]
TEXTS = [" ".join(DRAW.choice(WORDS, 5)) for _ in range(80)]  # of 34 characters


def same_again(tokenizer: Tokenizer) -> None:
    again = tokenizer_from(tokenizer.kind, tokenizer.content)
    assert again == tokenizer and again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_characters() -> None:
    letters = characters_of(["ba", "cab"])
    assert letters.tokens == ("a", "b", "c") and letters.kind == "characters"
    assert letters.encode("cab") == [3, 1, 2] and letters.decode([3, 1, 2]) == "cab"
    assert letters.unknown("azbz!") == ["!", "z"]
    same_again(characters_of(TEXTS))


def test_a_list_divides_by_the_longest_token(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a\nab\nabc\nc\n \n")
    tokens = read_tokenizer(tmp_path / "t.txt")
    assert [tokens.token(number) for number in tokens.encode("abcab ca")] == ["abc", "ab", " ", "c", "a"]
    assert tokens.decode(tokens.encode("abcab ca")) == "abcab ca" and tokens.unknown("abd") == ["d"]
    same_again(tokens)


@pytest.mark.parametrize("text, told", [("a\na\n", "stands in it twice"), ("", "holds no token"), ("a\n\n", "empty")])
def test_lists_that_are_none(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(UsageError, match=told):
        read_tokenizer(tmp_path / "t.txt")
    with pytest.raises(UsageError, match="No such file"):
        read_tokenizer(tmp_path / "no.txt")


def test_frames_needed() -> None:
    """By brute force: the shortest path that CTC maps to the tokens."""
    from itertools import groupby, product

    for target in ([], [1], [1, 1], [1, 2, 1], [1, 1, 1], [2, 2, 1, 1]):
        paths = (path for width in range(8) for path in product((0, 1, 2), repeat=width))
        shortest = next(path for path in paths if [token for token, _ in groupby(path) if token] == target)
        assert frames_needed(target) == len(shortest)


def test_the_fewest_pieces_that_fit() -> None:
    pytest.importorskip("sentencepiece", reason="the optional package sentencepiece makes pieces")
    made = train_pieces(TEXTS, 40)
    assert made.size <= 40 and train_pieces(TEXTS, 40) == made
    assert made.decode(made.encode(TEXTS[5])) == TEXTS[5] and not made.unknown(TEXTS[5])
    assert made.unknown("kasi ß") == ["ß"]
    same_again(made)
    roomy = train_fitting_pieces(TEXTS, [len(text) * 2 for text in TEXTS])
    tight = train_fitting_pieces(TEXTS, [14] * len(TEXTS))
    assert roomy.size < tight.size and share_fitting(tight, TEXTS, [14] * len(TEXTS)) >= FITTING
    assert share_fitting(roomy, TEXTS, [14] * len(TEXTS)) < FITTING
    hopeless = train_fitting_pieces(TEXTS, [1] * len(TEXTS))  # told by the judgement of the transcripts
    assert share_fitting(hopeless, TEXTS, [1] * len(TEXTS)) == 0
    with pytest.raises(DataError, match="--pieces"):
        train_pieces(TEXTS, 3)


def test_models_in_files(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="the optional package sentencepiece reads its models")
    (tmp_path / "a.model").write_bytes(train_pieces(TEXTS, 40).content)
    assert read_tokenizer(tmp_path / "a.model") == train_pieces(TEXTS, 40)
    (tmp_path / "b.model").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="b.model"):
        read_tokenizer(tmp_path / "b.model")


def test_a_file_of_tokenizers(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the optional package tokenizers reads its JSON")
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "the": 1, "door": 2}, "unk_token": "[UNK]"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model, **empty}
    (tmp_path / "t.json").write_text(json.dumps(whole))
    made = read_tokenizer(tmp_path / "t.json")
    assert made.size == 3 and made.encode("the door") == [2, 3] and made.unknown("the sea") == ["sea"]
    assert made.decode([2, 3]) == "the door" and made.token(3) == "door"
    same_again(made)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UsageError, match="t.json"):
        read_tokenizer(tmp_path / "t.json")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"nest-fn\[text\].*--tokens characters"):
        train_pieces(TEXTS, 40)
    assert TokenList(("a",)).encode("a") == [1]
