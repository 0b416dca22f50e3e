"""A tokenizer's files: which are taken, what is refused of them, and what is said of words that nobody knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ledits_min.app.words import check_words
from ledits_min.config import SD15_TEXT
from ledits_min.errors import InputError
from ledits_min.weights.clip_bpe import clip_merges, clip_vocabulary
from ledits_min.weights.read.folder import tokenizer_folder
from ledits_min.weights.read.survey import TINY
from ledits_min.weights.tokenizer import check_vocabulary, load_tokenizer
from ledits_min.weights.tokenizer import check_words as check_prompt

WORDS = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "a", "cat"])}
PROMPT = "a man with a red hat"


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    (tmp_path / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in clip_merges())]))
    return tmp_path


def add_words(folder: Path) -> None:
    """The embedded model's files, of whole words."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / "tokenizer" / name).read_bytes())


def ids(folder: Path | None) -> Any:
    return load_tokenizer(folder, SD15_TEXT)(PROMPT).input_ids


def test_pieces_are_those_of_clip(pieces: Path) -> None:
    assert ids(pieces) == ids(None)
    check_words(pieces, ["zeppelin"])


def test_pieces_come_before_whole_words(pieces: Path) -> None:
    described = json.loads((TINY / "tokenizer/tokenizer.json").read_text())
    (pieces / "tokenizer.json").write_text(json.dumps(described | {"added_tokens": []}))
    assert ids(pieces) == ids(None)
    check_words(pieces, ["zeppelin"])


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_the_pieces_is_no_tokenizer(pieces: Path, name: str) -> None:
    (pieces / name).unlink()
    with pytest.raises(InputError, match="holds no tokenizer; tokenizer.json, or vocab.json and merges.txt"):
        tokenizer_folder(pieces)
    with pytest.raises(InputError, match="no tokenizer there; vocab.json with merges.txt is wanted"):
        load_tokenizer(pieces, SD15_TEXT)
    add_words(pieces)
    assert tokenizer_folder(pieces) == pieces
    assert ids(pieces) == ids(TINY / "tokenizer") != ids(None)
    with pytest.raises(InputError, match="does not know 'zeppelin'"):
        check_words(pieces, ["zeppelin"])


def write_words(folder: Path, words: dict[str, int] = WORDS, **more: Any) -> Path:
    """A tokenizer of whole words; `more` is added to its description."""
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    described = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model, **more}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "unk_token": "<unk>"}))
    return folder


@pytest.mark.parametrize("kind", ["TemplateProcessing", "BertProcessing"])
def test_a_frame_of_tokens_that_are_none_is_refused(tmp_path: Path, kind: str) -> None:
    """They are in no vocabulary, and the text encoder has no row for them."""
    frame = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<bos>": {"id": "<bos>", "ids": [5000], "tokens": ["<bos>"]}}
    steps: dict[str, Any] = {
        "TemplateProcessing": {"single": frame, "pair": frame, "special_tokens": special},
        "BertProcessing": {"cls": ["<bos>", 1], "sep": ["<eos>", 5000]},
    }
    tokenizer = load_tokenizer(write_words(tmp_path, post_processor={"type": kind, **steps[kind]}), SD15_TEXT)
    check_vocabulary(tokenizer, 5001)
    with pytest.raises(InputError, match="numbers its tokens up to 5000, the text encoder knows 5000"):
        check_vocabulary(tokenizer, 5000)


@pytest.mark.parametrize("count", [1, 75])
def test_new_words_are_neither_unknown_nor_spelled_out(tmp_path: Path, count: int) -> None:
    tokenizer = load_tokenizer(write_words(tmp_path), replace(SD15_TEXT, vocab_size=6 + count), {"hat": count})
    check_prompt(tokenizer, "a cat hat", 77)
    with pytest.raises(InputError) as refused:
        check_prompt(tokenizer, "a dog hat", 77)
    assert str(refused.value) == "prompt 'a dog hat': this model does not know 'dog'; it knows: <bos>, <eos>, a, cat"


def test_what_is_known_is_listed_in_a_line(tmp_path: Path) -> None:
    words = WORDS | {f"word{number}\n": 6 + number for number in range(50)} | {"x" * n: 60 + n for n in range(1, 250)}
    tokenizer = load_tokenizer(write_words(tmp_path, words), SD15_TEXT)
    checks: list[Callable[[], None]] = [
        lambda: check_prompt(tokenizer, "dog", 75),
        lambda: check_words(tmp_path, ["dog"]),
    ]
    for check in checks:
        with pytest.raises(
            InputError, match=r"does not know 'dog'; it knows: .*a, cat, x, xx, .* and more$"
        ) as refused:
            check()
        assert str(refused.value).isprintable() and len(str(refused.value)) < 4000
