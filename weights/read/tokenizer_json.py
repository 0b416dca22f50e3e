"""What may stand in a tokenizer.json: nothing that lets a short text grow without bound, or a short file.

The format describes a pipeline: texts are normalised, split, turned into tokens and framed by special ones. Each step
may repeat or lengthen what comes in, so the steps are known ones and their products are bounded.
Format: huggingface/tokenizers, `Tokenizer.from_str`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ledits_min.errors import InputError, quoted, short

MAX_TOKEN = 256  # letters
MAX_ADDED = 4096
_MAX_VOCABULARY = 2**18
_MAX_STEPS = 16
_MAX_FRAME = 16  # pieces around a text, and ids of each

_NORMALIZERS = ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Replace", "Strip", "StripAccents")
_SPLITTERS = ("BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace",
              "WhitespaceSplit")  # fmt: skip
_FRAMES = ("BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing")
_DECODERS = ("BPEDecoder", "ByteLevel", "Metaspace", "WordPiece")
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
# Regular expressions of Replace that take at least one letter: one class, one escape, perhaps repeated.
_TAKES_A_LETTER = re.compile(r"(\\[sdwpPSDW](\{\w+\})?|\[(?:[^\]\\]|\\.)+\])\+?")

_MAY_RUN_LONG = re.compile(r"(?<!\\)\)[*+?{]|\\[1-9k]")  # a repeated group, a reference back


def checked_tokenizer(described: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The description without padding and truncation, which come with every text; InputError if it could grow."""
    steps = {
        "normalizer": (_NORMALIZERS, "normalizers"),
        "pre_tokenizer": (_SPLITTERS, "pretokenizers"),
        "post_processor": (_FRAMES, "processors"),
        "decoder": (_DECODERS, "decoders"),
    }
    for name, (known, several) in steps.items():
        for step in _steps(described.get(name), several, f"{source}: {name}"):
            _check_step(step, known, f"{source}: {name}")
    _check_model(described.get("model"), source)
    added = described.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_ADDED:
        raise InputError(f"{source}: added_tokens is no list of at most {MAX_ADDED}; fetch it again")
    return {**described, "padding": None, "truncation": None}


def _steps(step: Any, several: str, source: str) -> Sequence[Any]:
    """The step itself, or those of a Sequence."""
    if step is None:
        return ()
    if not isinstance(step, dict) or step.get("type") != "Sequence":
        return (step,)
    steps = step.get(several)
    if not isinstance(steps, list) or len(steps) > _MAX_STEPS:
        raise InputError(f"{source} is no list of at most {_MAX_STEPS} steps; fetch it again")
    return steps


def _check_step(step: Any, known: Sequence[str], source: str) -> None:
    kind = step.get("type") if isinstance(step, dict) else step
    if not isinstance(step, dict) or kind not in known:
        raise InputError(f"{source} {short(kind)} is not supported; the choices are {', '.join(known)}")
    pattern, content = step.get("pattern"), step.get("content")
    if kind == "Replace" and not _shortens(pattern, content):
        raise InputError(f"{source} replaces {short(pattern)} by {short(content)}, which could lengthen any text")
    expression = pattern.get("Regex") if kind == "Split" and isinstance(pattern, dict) else None
    if isinstance(expression, str) and (len(expression) > 512 or _MAY_RUN_LONG.search(expression)):
        raise InputError(f"{source} splits by {short(expression)}, which could take forever")
    if kind == "TemplateProcessing":
        tokens = step.get("special_tokens")
        frames = [step.get("single"), step.get("pair"), *_lists(tokens)]
        if not all(isinstance(frame, list) and len(frame) <= _MAX_FRAME for frame in frames):
            raise InputError(f"{source} frames a text by more than {_MAX_FRAME} tokens; fetch it again")


def _lists(tokens: Any) -> list[Any]:
    """ids and tokens of each special token in a template, of which there may be few."""
    if not isinstance(tokens, dict) or len(tokens) > _MAX_FRAME:
        return [None]
    entries = [token if isinstance(token, dict) else {} for token in tokens.values()]
    return [entry.get(name) for entry in entries for name in ("ids", "tokens")]


def _shortens(pattern: Any, content: Any) -> bool:
    """Whether what is put in place of a pattern is never longer than what it stood for."""
    if not isinstance(pattern, dict) or not isinstance(content, str):
        return False
    if isinstance(text := pattern.get("String"), str):
        return len(content.encode("utf-8", "replace")) <= len(text.encode("utf-8", "replace"))
    expression = pattern.get("Regex")
    return isinstance(expression, str) and len(content) <= 1 and _TAKES_A_LETTER.fullmatch(expression) is not None


def _check_model(model: Any, source: str) -> None:
    kind = model.get("type", "BPE") if isinstance(model, dict) else model
    if not isinstance(model, dict) or kind not in _MODELS:
        raise InputError(f"{source}: model {short(kind)} is not supported; the choices are {', '.join(_MODELS)}")
    if model.get("dropout"):
        raise InputError(f"{source}: dropout {short(model['dropout'])} makes other tokens of a text each time; drop it")
    for name in ("vocab", "merges"):
        if isinstance(table := model.get(name), dict | list) and len(table) > _MAX_VOCABULARY:
            raise InputError(f"{source}: {name} has {len(table)} entries; at most {_MAX_VOCABULARY} are wanted")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if isinstance(text := model.get(name), str) and len(text) > MAX_TOKEN:
            raise InputError(f"{source}: {name} {quoted(text, 60)} is longer than {MAX_TOKEN} letters; fetch it again")
