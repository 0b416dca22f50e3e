"""How each value of the command line is read: numbers, sizes, prompts, concepts, LoRAs."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Any

from ledits_min.config import MASKS
from ledits_min.errors import quoted

_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d{1,20}", re.ASCII)
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?", re.ASCII)
_SIZE = re.compile(r"(\d{1,6})(?:x(\d{1,6}))?", re.ASCII)

Parse = Callable[[str], Any]
P2P_KEYS = ("cross", "self")
PRESETS = ("leditspp", "fast")
SOLVERS = ("ddpm", "dpm++")  # of order 1 and 2


def parse_concept(text: str, reverse: bool) -> dict[str, Any]:
    """The fields of a `Concept` from "sunglasses" or "sunglasses:scale=10,threshold=0.9,warmup=2,cooldown=40,weight=1,
    mask=both".

    What follows the last colon is options where it holds key=value pairs; a pair that is wrong is an error.
    """
    words, colon, tail = text.rpartition(":")
    fields: dict[str, Any] = {"reverse": reverse}
    if not colon or "=" not in tail:
        words, tail = text, ""
    for pair in tail.split(",") if tail else []:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key not in CONCEPT_KEYS or not equals:
            raise argparse.ArgumentTypeError(
                f"{quoted(pair.strip() or tail, 60)} is no concept option; they are {', '.join(CONCEPT_KEYS)} "
                "(a text with = after its last colon needs options behind it, as in 'E: m=1:scale=7')"
            )
        name, convert = CONCEPT_KEYS[key]
        if name in fields:
            raise argparse.ArgumentTypeError(f"{key} is given twice in {quoted(text, 80)}; give it once")
        try:
            fields[name] = convert(value)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{key} in {quoted(text, 80)}: {error}") from None
    if not words.strip():
        raise argparse.ArgumentTypeError(f"{quoted(text, 80)} names no concept; write it before the colon")
    return {"text": parse_prompt(words.strip()), **fields}


def parse_p2p(text: str) -> dict[str, Any]:
    """The fields of a `PromptToPrompt` from "cross=0.6,self=0.2,reweight=smiling:2,blend=hat,blend_threshold=0.3", any
    of them, or none; `reweight` and `blend` as often as there are words.
    """
    fields: dict[str, Any] = {}
    for pair in text.split(",") if text else []:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key == "reweight":
            word, colon, factor = value.rpartition(":")
            if not word.strip() or not colon or word in fields.get(key, {}):
                raise argparse.ArgumentTypeError(f"{quoted(pair.strip(), 60)} is not reweight=WORD:N, each word once")
            fields[key] = {**fields.get(key, {}), parse_prompt(word.strip()): parse_number(factor)}
            continue
        if key == "blend":
            if not value or value in fields.get(key, ()):
                raise argparse.ArgumentTypeError(f"{quoted(pair.strip(), 60)} is not blend=WORD, each word once")
            fields[key] = (*fields.get(key, ()), parse_prompt(value))
            continue
        if key not in (*P2P_KEYS, "blend_threshold") or not equals or key in fields:
            raise argparse.ArgumentTypeError(
                f"{quoted(pair.strip() or text, 60)} is not cross=N, self=N, reweight=WORD:N, blend=WORD or "
                "blend_threshold=N, each once (a picture comes before --p2p)"
            )
        fields[key] = parse_number(value)
    if "blend_threshold" in fields and "blend" not in fields:
        raise argparse.ArgumentTypeError("blend_threshold has no effect without blend=WORD; pass that too")
    return fields


def parse_lora(text: str) -> tuple[str, float]:
    """(path, scale) from "style.safetensors" or "style.safetensors:0.8"; a number after the last colon is the scale."""
    path, colon, scale = text.rpartition(":")
    if not colon or not _NUMBER.fullmatch(scale):
        path, scale = text, "1"
    if not path:
        raise argparse.ArgumentTypeError(f"{quoted(text, 80)} names no file; write it before the colon")
    return parse_path(path), parse_number(scale)


def parse_path(text: str) -> str:
    """With the home folder for a leading ~, which a shell leaves alone in --option=~/x."""
    return os.path.expanduser(text) if text.startswith("~") else text


def parse_device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{quoted(text, 60)} is none of auto, cpu, cuda, cuda:N and mps")
    return text


def parse_embedding(text: str) -> tuple[str, str | None]:
    """(path, word) from "style.safetensors" or "style.safetensors:word"; None: the word that the file names."""
    path, colon, word = text.rpartition(":")
    if not colon or "/" in word:
        path, word = text, ""
    if not path:
        raise argparse.ArgumentTypeError(f"{quoted(text, 80)} names no file; write it before the colon")
    return path, word or None


def parse_list(parse: Parse) -> Callable[[str], tuple[Any, ...]]:
    """The reader of one or more values with commas between them, from the reader of one."""

    def parse_all(text: str) -> tuple[Any, ...]:
        values = tuple(parse(item.strip()) for item in text.split(","))
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"a value is given twice in {quoted(text, 80)}; give each once")
        return values

    return parse_all


def parse_number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{quoted(text, 60)} is not a number")
    return float(text)


def parse_whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{quoted(text, 60)} is not a whole number")
    return int(text)


def parse_mask(text: str) -> str:
    if text not in MASKS:
        raise argparse.ArgumentTypeError(f"{quoted(text, 60)} is none of {', '.join(MASKS)}")
    return text


def parse_size(text: str) -> int | tuple[int, int]:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{quoted(text, 60)} is neither a longer side (512) nor WxH (512x384)")
    width, height = match.groups()
    return int(width) if height is None else (int(width), int(height))


def parse_prompt(text: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"{quoted(text, 60)} is not UTF-8 text")
    return text


CONCEPT_KEYS: dict[str, tuple[str, Parse]] = {
    "scale": ("guidance_scale", parse_number),
    "threshold": ("threshold", parse_number),
    "warmup": ("warmup_steps", parse_whole),
    "cooldown": ("cooldown_steps", parse_whole),
    "weight": ("weight", parse_number),
    "mask": ("mask", parse_mask),
}
