"""The shipped CLIP vocabulary is OpenAI's file, and gives the token numbers that CLIP was trained with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from transformers.models.clip import CLIPTokenizer

from ledits_min.weights.clip_bpe import CLIP_BPE, END, START, byte_symbols, clip_merges, clip_vocabulary

SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def test_the_file_is_the_published_one_and_brings_its_licence() -> None:
    assert hashlib.sha256(CLIP_BPE.read_bytes()).hexdigest() == SHA256
    licence = Path(CLIP_BPE).with_name("CLIP_LICENSE").read_text()
    assert "Copyright (c) 2021 OpenAI" in licence and "shall be included in all" in licence


def test_sizes_and_order() -> None:
    vocabulary, merges = clip_vocabulary(), clip_merges()
    assert len(vocabulary) == 49408 and sorted(vocabulary.values()) == list(range(49408))
    assert len(merges) == 48894 and merges[0] == ("i", "n")
    assert vocabulary["!"] == 0 and vocabulary["!</w>"] == 256 and vocabulary["in"] == 512
    assert (vocabulary[START], vocabulary[END]) == (49406, 49407)


def test_every_merge_joins_known_tokens_into_a_known_one() -> None:
    vocabulary = clip_vocabulary()
    for first, second in clip_merges():
        assert first in vocabulary and second in vocabulary
        assert vocabulary[first + second] > max(vocabulary[first], vocabulary[second])


def test_byte_symbols_are_256_different_printable_characters() -> None:
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert all(len(symbol) == 1 and symbol.isprintable() for symbol in symbols)


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("", []),
        ("hello world!", [3306, 1002, 256]),  # the example of OpenAI's own test
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("a photo of an astronaut riding a horse on mars", [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496]),
    ],
)
def test_known_prompts(prompt: str, tokens: list[int]) -> None:
    tokenizer = CLIPTokenizer(vocab=clip_vocabulary(), merges=list(clip_merges()), model_max_length=77)
    assert tokenizer(prompt).input_ids == [49406, *tokens, 49407]
