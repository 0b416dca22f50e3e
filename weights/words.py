"""Words that a model with a vocabulary of whole words does not know. Nothing here imports torch or transformers."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from ledits_min.errors import InputError, quoted

PRIVATE = 0xF0000  # a plane of characters that mean nothing: one stands for each vector of a new word


def refuse_unknown(prompt: str, tokenizer: Any, known: Collection[str]) -> NoReturn:
    """InputError that lists the prompt's unknown words, those that come near them, and those that are known.

    tokenizer  of the tokenizers library: its normalizer and pre-tokenizer cut the prompt into words
    """
    plain = tokenizer.normalizer.normalize_str(prompt) if tokenizer.normalizer else prompt
    splits = tokenizer.pre_tokenizer
    words = [word for word, _ in splits.pre_tokenize_str(plain)] if splits else [plain]
    strange = [word for word in words if word not in known and not _is_new(word)]
    sorted_words = sorted(word for word in known if word.isprintable() and not _is_new(word))
    near = [match for word in strange for match in difflib.get_close_matches(word, sorted_words, n=1, cutoff=0.7)]
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    raise InputError(
        f"prompt {quoted(prompt)}: this model does not know {quoted(', '.join(strange))}{hint}; "
        f"it knows: {_listed(sorted_words)}"
    )


def _is_new(word: str) -> bool:
    """Whether it is what the tokenizer makes of a new word."""
    return all(ord(letter) >= PRIVATE for letter in word)


def _listed(words: Sequence[str], room: int = 2000) -> str:
    listed = ", ".join(words)
    return listed if len(listed) <= room else f"{listed[:room].rpartition(', ')[0]} and more"
