"""The CLIP vocabulary for checkpoints that bring none: a single file never does.

`bpe_simple_vocab_16e6.txt.gz` is OpenAI's own file (MIT, see CLIP_LICENSE); the rule that turns it into token
numbers is that of openai/CLIP, clip/simple_tokenizer.py.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

CLIP_BPE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
START, END = "<|startoftext|>", "<|endoftext|>"
_NUM_MERGES = 49152 - 256 - 2  # the file holds more; CLIP was trained on a vocabulary cut to this length


def byte_symbols() -> list[str]:
    """One printable character for each of the 256 bytes, in the order in which CLIP numbers them.

    Printable Latin-1 bytes stand for themselves and come first; the n-th of the others is chr(256 + n).
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]


@cache
def clip_merges() -> tuple[tuple[str, str], ...]:
    """The 48894 merges in order of rank, each a pair of symbols to join."""
    lines = gzip.decompress(CLIP_BPE.read_bytes()).decode("utf-8").split("\n")[1 : _NUM_MERGES + 1]
    return tuple((first, second) for first, second in (line.split() for line in lines))


def clip_vocabulary() -> dict[str, int]:
    """Token -> number, 49408 of them.

    vocabulary = 256 symbols, 256 symbols that end a word, one token per merge, <|startoftext|>, <|endoftext|>
    """
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, clip_merges()), START, END]
    return {token: number for number, token in enumerate(tokens)}
