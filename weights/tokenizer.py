"""A checkpoint's tokenizer from its own files, or CLIP's, which is shipped here."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from transformers.models.clip import CLIPTokenizer
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from ledits_min.config import TextConfig
from ledits_min.errors import InputError, quoted, short, warn
from ledits_min.weights.clip_bpe import END, clip_merges, clip_vocabulary

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(folder: Path | None, config: TextConfig) -> Any:
    """The tokenizer in `folder`: vocab.json with merges.txt, or tokenizer.json alone; None: CLIP's, shipped here.

    What stands behind the end of a prompt is what the folder's files say, else what the published models were trained
    with: the end token again in OpenAI's CLIP, token 0, which is "!", in OpenCLIP. The kind of gelu tells them apart.
    InputError where the folder holds neither, or files that are no tokenizer.
    """
    max_length = config.max_position_embeddings
    if folder is None:
        vocabulary, merges_of = clip_vocabulary(), list(clip_merges())
        pad = "!" if config.hidden_act == "gelu" else END
        return CLIPTokenizer(vocab=vocabulary, merges=merges_of, model_max_length=max_length, pad_token=pad)  # type: ignore[arg-type]
    special = _special_tokens(folder)
    tokenizer: Any
    vocab, merges, whole = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
    try:
        if vocab.is_file() and merges.is_file():
            lines = merges.read_text(encoding="utf-8").splitlines()
            pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
            words = json.loads(vocab.read_text(encoding="utf-8"))
            tokenizer = CLIPTokenizer(vocab=words, merges=pairs, model_max_length=max_length, **special)  # type: ignore[arg-type]
            return _tried_out(tokenizer, max_length)
        if whole.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(whole), model_max_length=max_length, **special)
            return _tried_out(tokenizer, max_length)
    except InputError:
        raise
    # The tokenizers library raises bare Exceptions for files it cannot use, and panics, which are not even that.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = quoted(error, 100) if str(error) else type(error).__name__
        raise InputError(f"{quoted(folder)}: its files are no tokenizer ({reason}); fetch them again") from None
    raise InputError(f"{quoted(folder)}: no tokenizer there; vocab.json with merges.txt is wanted, or tokenizer.json")


def _tried_out(tokenizer: Any, max_length: int) -> Any:
    """The tokenizer itself; what is wrong with its tables shows only when it meets words, known and unknown."""
    tokenizer(["a portrait", "\N{SNOWMAN} zyxwv", ""], padding="max_length", truncation=True, max_length=max_length)
    for name in _SPECIAL_TOKENS:
        getattr(tokenizer, f"{name}_id")
    return tokenizer


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos, eos, unk and pad token as the folder's own files name them; a token may be a string or an object."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            mapping = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{quoted(path)}: not readable as JSON ({type(error).__name__}); fetch it again") from None
        for key in _SPECIAL_TOKENS:
            token = mapping.get(key) if isinstance(mapping, dict) else None
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found[key] = text
    return found


def check_vocabulary(tokenizer: Any, known: int) -> None:
    """InputError where a tokenizer has more tokens than the text encoder knows."""
    largest = max(tokenizer.get_vocab().values(), default=0)
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
        backend, vocabulary = tokenizer.backend_tokenizer, tokenizer.get_vocab()
        plain = backend.normalizer.normalize_str(prompt) if backend.normalizer else prompt
        splits = backend.pre_tokenizer
        words = [word for word, _ in splits.pre_tokenize_str(plain)] if splits else [plain]
        strange = [word for word in words if word not in vocabulary]
        known = sorted(word for word in vocabulary if word not in tokenizer.all_special_tokens)
        near = [match for word in strange for match in difflib.get_close_matches(word, known, n=1, cutoff=0.7)]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise InputError(
            f"prompt {quoted(prompt)}: this model does not know {quoted(', '.join(strange))}{hint}; "
            f"it knows: {', '.join(known)}"
        )
    if len(ids) > room:
        dropped = short(tokenizer.decode(ids[room:]), 300)
        warn(f"the prompt is {len(ids)} tokens long and the model reads {room}; dropped: {dropped}")
