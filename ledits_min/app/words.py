"""Words that a model with a vocabulary of whole words does not know, found out without torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ledits_min.errors import InputError, quoted
from ledits_min.weights.read.tokenizer_json import checked_tokenizer
from ledits_min.weights.words import refuse_unknown

PIECES = ("vocab.json", "merges.txt")  # where they lie, `weights.tokenizer` takes them
MAX_BYTES = 1_000_000  # a larger tokenizer is none of whole words; it is looked at when the model is loaded


def check_words(folder: Path | None, texts: Iterable[str], new: Iterable[str] = ()) -> None:
    """InputError, with the words that are known, as `TextEncoder.check` would say it after loading; and for a tokenizer
    that could grow without bound, which is never run.

    folder  that of the tokenizer; None, or one of word pieces, knows every word
    new     words that textual inversions bring
    """
    if folder is None or all((folder / name).is_file() for name in PIECES):
        return
    file = folder / "tokenizer.json"
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        return
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        model = described["model"]
        if model["type"] != "WordLevel":
            return
        vocabulary, unknown = set(model["vocab"]), model["unk_token"]
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(json.dumps(checked_tokenizer(described, quoted(file))))
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        for text in texts:
            for word in new:
                text = text.replace(word, " ")
            if unknown not in tokenizer.encode(text, add_special_tokens=False).tokens:
                continue
            refuse_unknown(text, tokenizer, vocabulary - special - {unknown})
    except InputError:
        raise
    except BaseException as error:  # no sound tokenizer: loading the model says what is wrong with it
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
