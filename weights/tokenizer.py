"""A checkpoint's tokenizer from its own files, or CLIP's, which is shipped here; and words that it learns besides."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.normalizers import Replace, Sequence
from transformers.models.clip import CLIPTokenizer
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from ledits_min.config import TextConfig
from ledits_min.errors import InputError, quoted, short, warn
from ledits_min.files.reader import read_bounded
from ledits_min.weights.clip_bpe import END, clip_merges, clip_vocabulary
from ledits_min.weights.read.folder import MAX_JSON_BYTES, read_json
from ledits_min.weights.read.tokenizer_json import MAX_ADDED, MAX_TOKEN, checked_tokenizer
from ledits_min.weights.words import PRIVATE, refuse_unknown

_SAMPLES = ["a portrait", "\N{SNOWMAN} zyxwv", ""]  # words known and unknown, and what stands around them
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(folder: Path | None, config: TextConfig, words: Mapping[str, int] | None = None) -> Any:
    """The tokenizer in `folder`: vocab.json with merges.txt, or tokenizer.json alone; None: CLIP's, shipped here.

    What stands behind the end of a prompt is what the folder's files say, else what the published models were trained
    with: the end token again in OpenAI's CLIP, token 0, which is "!", in OpenCLIP. The kind of gelu tells them apart.
    `words` are new ones, each with the number of tokens it stands for: the last rows of the text encoder's table.
    InputError where the folder holds neither, or files that are no tokenizer.
    """
    # The tokenizers library raises bare Exceptions for files it cannot use, and panics, which are not even that.
    try:
        tokenizer = _clip(config) if folder is None else _from_files(folder, config)
        if words:
            _learn(tokenizer, words, config.vocab_size - sum(words.values()))
        return _tried_out(tokenizer, config.max_position_embeddings)
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = quoted(error, 100) if str(error) else type(error).__name__
        raise InputError(f"{quoted(folder)}: its files are no tokenizer ({reason}); fetch them again") from None


def _clip(config: TextConfig) -> Any:
    pad = "!" if config.hidden_act == "gelu" else END
    vocabulary, merges, length = clip_vocabulary(), list(clip_merges()), config.max_position_embeddings
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, pad_token=pad)  # type: ignore[arg-type]


def _from_files(folder: Path, config: TextConfig) -> Any:
    whole, length = folder / "tokenizer.json", config.max_position_embeddings
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    described = read_json(whole) if whole.is_file() else {}
    special = _special_tokens(folder)
    tokenizer: Any
    if vocab.is_file() and merges.is_file():
        lines = read_bounded(merges, MAX_JSON_BYTES).decode("utf-8").splitlines()
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        tokenizer = CLIPTokenizer(vocab=read_json(vocab), merges=pairs, model_max_length=length, **special)  # type: ignore[arg-type]
    elif described:
        backend = Tokenizer.from_str(json.dumps(checked_tokenizer(described, quoted(whole))))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **special)
    else:
        raise InputError(
            f"{quoted(folder)}: no tokenizer there; vocab.json with merges.txt is wanted, or tokenizer.json"
        )
    _add(tokenizer, _added_tokens(folder, described), quoted(folder))
    return tokenizer


def _add(tokenizer: Any, tokens: Mapping[int, AddedToken], source: str) -> None:
    """Tokens by their numbers, as far as the tokenizer does not know them already."""
    for number, token in sorted(tokens.items()):
        known = tokenizer.get_vocab().get(token.content)
        if known is None:
            tokenizer.add_tokens([token])
            known = tokenizer.get_vocab().get(token.content)
        if known != number:
            raise InputError(
                f"{source}: the added token {quoted(token.content, 60)} should be number {number}, and is {known}; "
                "its files do not belong together, fetch them again"
            )


def _added_tokens(folder: Path, described: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Number -> token that was added to the vocabulary after training, from whichever of the three files says so."""
    entries: list[tuple[Any, Any]] = []
    if (path := folder / "added_tokens.json").is_file():
        entries += [(number, content) for content, number in read_json(path).items()]
    if (path := folder / "tokenizer_config.json").is_file():
        decoder = read_json(path).get("added_tokens_decoder") or {}
        entries += decoder.items() if isinstance(decoder, dict) else [(None, None)]
    listed = described.get("added_tokens") or []
    entries += [(one.get("id"), one) if isinstance(one, dict) else (None, None) for one in listed]
    found: dict[int, AddedToken] = {}
    for number, entry in entries:
        settings = entry if isinstance(entry, dict) else {"content": entry}
        content, digits = settings.get("content"), str(number)
        sound = digits.isdecimal() and len(digits) <= 9 and isinstance(content, str) and len(content) <= MAX_TOKEN
        if not sound or not content:
            raise InputError(
                f"{quoted(folder)}: an added token is {quoted(content, 60)}, number {quoted(number, 20)}; a text of at "
                f"most {MAX_TOKEN} letters and a whole number are wanted"
            )
        flags = {name: settings[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in settings}
        if not all(isinstance(flag, bool) for flag in flags.values()) or len(found) >= MAX_ADDED:
            raise InputError(f"{quoted(folder)}: its added tokens are not readable, or more than {MAX_ADDED}")
        token = AddedToken(content, special=settings.get("special") is True, **flags)
        if found.setdefault(int(digits), token).content != content:
            raise InputError(f"{quoted(folder)}: its files give number {digits} to two added tokens; fetch them again")
    return found


def _learn(tokenizer: Any, words: Mapping[str, int], first: int) -> None:
    """Teach it that a word, in whichever case, stands for tokens `first`, `first` + 1, ...

    Each vector is a token of its own, spelled as one private character; the word is replaced by them when a text is
    normalised, where it stands by itself. Of a word that was known before, a warning says so.
    """
    if len(tokenizer) != first:
        raise InputError(
            f"new words need a tokenizer that knows as many tokens as the text encoder, which has {first}; it knows "
            f"{len(tokenizer)}"
        )
    backend = tokenizer.backend_tokenizer
    steps = [backend.normalizer] if backend.normalizer else []
    known, whole = set(tokenizer.get_vocab()), getattr(backend.model, "end_of_word_suffix", None) or ""
    spelled, place = {}, 0
    for word, count in words.items():
        characters = [chr(PRIVATE + place + i) for i in range(count)]
        tokenizer.add_tokens([AddedToken(character, normalized=True) for character in characters])
        place += count
        seen = backend.normalizer.normalize_str(word) if backend.normalizer else word
        if f"{seen}{whole}" in known:
            warn(
                f"the embedding's word {quoted(word, 60)} is also an ordinary word; every {quoted(word, 60)} in a "
                "prompt is now the embedding; name it with FILE:WORD"
            )
        before = r"(?<!\w)" if re.match(r"\w", seen) else ""
        after = r"(?!\w)" if re.search(r"\w$", seen) else ""
        spelled[seen] = (f"{before}{re.escape(seen)}{after}", "".join(characters))
    for seen in sorted(spelled, key=len, reverse=True):  # a word inside another must not take its place
        steps.append(Replace(Regex(spelled[seen][0]), spelled[seen][1]))
    backend.normalizer = Sequence(steps)


def _tried_out(tokenizer: Any, max_length: int) -> Any:
    """The tokenizer itself; what is wrong with its tables shows only when it meets words, known and unknown."""
    tokenizer(_SAMPLES, padding="max_length", truncation=True, max_length=max_length)
    for name in _SPECIAL_TOKENS:
        getattr(tokenizer, f"{name}_id")
    return tokenizer


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos, eos, unk and pad token as the folder's own files name them; a token may be a string or an object."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        mapping = read_json(path) if path.is_file() else {}
        for key in _SPECIAL_TOKENS:
            token = mapping.get(key)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found[key] = text
                if len(text) > MAX_TOKEN:
                    raise InputError(f"{quoted(path)}: {key} has {len(text)} letters; at most {MAX_TOKEN} are wanted")
    return found


def check_vocabulary(tokenizer: Any, known: int) -> None:
    """InputError where a tokenizer has more tokens than the text encoder knows, or frames a text by others."""
    used = [number for ids in tokenizer(_SAMPLES).input_ids for number in ids]
    largest = max(*tokenizer.get_vocab().values(), *used, 0)
    if largest >= known:
        raise InputError(
            f"the tokenizer numbers its tokens up to {largest}, the text encoder knows {known}; "
            "use the tokenizer that belongs to it"
        )


def check_words(tokenizer: Any, prompt: str, room: int) -> None:
    """Warn of words that do not fit into `room` tokens; refuse words that a word-level tokenizer does not know."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    unknown = tokenizer.unk_token_id
    if unknown in ids and unknown != tokenizer.eos_token_id:  # CLIP's own byte-level one knows every word
        known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        refuse_unknown(prompt, tokenizer.backend_tokenizer, known)
    if len(ids) > room:
        dropped = short(tokenizer.decode(ids[room:]), 300)
        warn(f"the prompt is {len(ids)} tokens long and the model reads {room}; dropped: {dropped}")
