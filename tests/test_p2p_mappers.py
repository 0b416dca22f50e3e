"""Prompt-to-Prompt: which token of the source lends its attention to which token of the target."""

from __future__ import annotations

import random
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ledits_min.config import SD15_TEXT
from ledits_min.p2p import TokenMapper, Words, align, refine_mapper, replace_mapper, token_mapper
from ledits_min.text import TextEncoder
from ledits_min.weights.tokenizer import load_tokenizer

TINY = Path(__file__).parents[1] / "weights/tiny"
LENGTH = 24

# Prompts of up to five words; a word is one to three token ids, few enough to meet again.
a_word = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
a_prompt = st.lists(a_word, max_size=5)


def tokenizer_words(folder: Path | None, prompt: str) -> list[tuple[int, ...]]:
    encoder = TextEncoder(load_tokenizer(folder, SD15_TEXT), SimpleNamespace(config=SD15_TEXT))  # type: ignore[arg-type]
    return encoder.words(prompt)


def pairs(mapper: TokenMapper, share: float = 1.0) -> set[tuple[int, int]]:
    return {(int(i), int(n)) for i, n in (mapper.lend == share).nonzero()}


class TestWords:
    def test_clip_splits_rare_words_into_tokens(self) -> None:
        words = tokenizer_words(None, "a labradoodle, smiling")
        assert [len(word) for word in words] == [1, 2, 1, 1]  # the comma is a word

    def test_the_embedded_tokenizer_has_one_token_a_word_and_no_commas(self) -> None:
        words = tokenizer_words(TINY / "tokenizer", "Short black hair, smiling")
        assert [len(word) for word in words] == [1, 1, 1, 1]
        assert words == tokenizer_words(TINY / "tokenizer", "short black hair smiling")

    @pytest.mark.parametrize("folder", [None, TINY / "tokenizer"])
    def test_an_empty_prompt_has_none_and_a_long_one_is_cut(self, folder: Path | None) -> None:
        assert tokenizer_words(folder, "") == []
        assert len(tokenizer_words(folder, "hat " * 100)) == 75


class TestMappers:
    def test_replace_pairs_words_by_position(self) -> None:
        mapper = token_mapper([(5,), (6,), (7,)], [(5,), (8,), (7,)], 6)
        assert torch.equal(mapper.lend, torch.eye(6))
        assert not mapper.own.any()

    def test_replace_shares_a_word_out_over_more_tokens(self) -> None:
        """begin a cat sat end pad pad -> begin a lab ra sat end pad."""
        mapper = replace_mapper([(1,), (2,), (3,)], [(1,), (8, 9), (3,)], 7)
        assert pairs(mapper) == {(0, 0), (1, 1), (3, 4), (4, 5), (5, 6), (6, 6)}
        assert pairs(mapper, 0.5) == {(2, 2), (2, 3)}

    def test_replace_gathers_a_word_from_more_tokens(self) -> None:
        mapper = replace_mapper([(1,), (8, 9), (3,)], [(1,), (2,), (3,)], 7)
        assert pairs(mapper) == {(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (5, 4), (6, 5)}

    def test_refine_lends_what_both_have(self) -> None:
        """begin a car end pad pad -> begin a red car end pad."""
        mapper = token_mapper([(1,), (2,)], [(1,), (7,), (2,)], 6)
        assert pairs(mapper) == {(0, 0), (1, 1), (2, 3), (3, 4), (4, 5)}
        assert mapper.own.tolist() == [0, 0, 1, 0, 0, 0]

    def test_refine_of_a_longer_source_lends_no_word_to_padding(self) -> None:
        mapper = token_mapper([(1,), (2, 3), (4,)], [(1,)], 8)
        assert pairs(mapper) == {(0, 0), (1, 1), (5, 2), (6, 3), (7, 4)}
        assert mapper.own.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]

    @pytest.mark.parametrize("folder", [None, TINY / "tokenizer"])
    def test_both_tokenizers(self, folder: Path | None) -> None:
        source, target, longer = (
            tokenizer_words(folder, text)
            for text in ("a woman with black hair", "a woman with blond hair", "a woman with a hat and black hair")
        )
        assert torch.equal(token_mapper(source, target, 20).lend, torch.eye(20))
        mapper = token_mapper(source, longer, 20)
        assert pairs(mapper) >= {(0, 0), (1, 1), (2, 2), (3, 3), (4, 7), (5, 8), (6, 9)}
        assert mapper.own.nonzero().flatten().tolist() == [4, 5, 6]

    @given(a_prompt, a_prompt)
    def test_replacing_loses_no_attention(self, source: list[tuple[int, ...]], target: list[tuple[int, ...]]) -> None:
        count = min(len(source), len(target))
        mapper = replace_mapper(source[:count], target[:count], LENGTH)
        torch.testing.assert_close(mapper.lend.sum(dim=1), torch.ones(LENGTH))
        assert not mapper.own.any()

    @given(a_prompt, a_prompt)
    def test_refining_lends_whole_tokens_in_order(
        self, source: list[tuple[int, ...]], target: list[tuple[int, ...]]
    ) -> None:
        mapper = refine_mapper(source, target, LENGTH)
        assert set(mapper.lend.unique().tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(mapper.lend.sum(dim=0) + mapper.own, torch.ones(LENGTH))
        assert int(mapper.lend.sum(dim=1).max()) <= 1
        lenders = mapper.lend.nonzero()
        assert torch.equal(lenders[:, 1], lenders[:, 1].sort().values)

    @given(a_prompt)
    def test_equal_prompts_lend_everything(self, words: list[tuple[int, ...]]) -> None:
        for make in (replace_mapper, refine_mapper):
            mapper = make(words, words, LENGTH)
            assert torch.equal(mapper.lend, torch.eye(LENGTH))
            assert not mapper.own.any()

    def test_ties_are_broken_as_in_the_authors_code(self) -> None:
        source, target = "a man wearing a red shirt", "portrait of a woman"
        assert align(*([(word,) for word in prompt.split()] for prompt in (source, target))) == [(0, 2)]  # type: ignore[misc]
        chance, ties = random.Random(0), 0
        for _ in range(2000):
            vocabulary = chance.randint(1, 5)
            one, other = ([(chance.randint(1, vocabulary),) for _ in range(chance.randint(0, 9))] for _ in range(2))
            assert align(one, other) == needleman_wunsch(one, other), (one, other)
            ties += align(one, other) != needleman_wunsch(one, other, prefers=("up", "left", "diagonal"))
        assert ties > 100  # or the order of preference would not have been tried

    @given(a_prompt, a_prompt)
    def test_an_alignment_is_a_longest_common_subsequence(
        self, source: list[tuple[int, ...]], target: list[tuple[int, ...]]
    ) -> None:
        found = align(source, target)
        assert all(source[i] == target[n] for i, n in found)
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(found))
        # Every choice of words in one prompt, tried in the other.
        chosen = ([w for k, w in enumerate(source) if bits >> k & 1] for bits in range(2 ** len(source)))
        assert len(found) == max(len(words) for words in chosen if occurs(words, target))
        blocks = SequenceMatcher(None, source, target, autojunk=False).get_matching_blocks()
        assert len(found) >= sum(block.size for block in blocks)


def occurs(words: Sequence[tuple[int, ...]], within: Sequence[tuple[int, ...]]) -> bool:
    rest = iter(within)
    return all(word in rest for word in words)


def needleman_wunsch(
    source: Words, target: Words, prefers: Sequence[str] = ("left", "up", "diagonal")
) -> list[tuple[int, int]]:
    """The pairs of equal words in the alignment of the authors' code: match 1, gap 0, mismatch -1, traced backwards."""
    score = np.zeros((len(source) + 1, len(target) + 1), dtype=int)
    came_from: dict[tuple[int, int], str] = {}
    for i, n in np.ndindex(len(source), len(target)):
        diagonal = score[i, n] + (1 if source[i] == target[n] else -1)
        ways = {"left": score[i + 1, n], "up": score[i, n + 1], "diagonal": diagonal}
        score[i + 1, n + 1] = max(ways.values())
        came_from[i + 1, n + 1] = next(way for way in prefers if ways[way] == score[i + 1, n + 1])
    i, n, found = len(source), len(target), []
    while i and n:
        way = came_from[i, n]
        i, n = i - (way != "left"), n - (way != "up")
        if way == "diagonal" and source[i] == target[n]:
            found.append((i, n))
    return found[::-1]
