"""Textual inversions [2208.01618]: files that bring a new word, as one or more vectors for the text encoder's table.

    emb_params (N, D)                   SD 1.x and 2.x, as the A1111 web UI and kohya write them
    <token> (D,) or (N, D)              the same, as diffusers writes it; the tensor is named after the word
    clip_l (N, 768), clip_g (N, 1280)   SDXL, one tensor per text encoder
    bundle_emb.WORD.(any of these)      inside a LoRA (OneTrainer)

The word stands for N tokens. Their vectors become rows behind the table's own; the tokenizer learns which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ledits_min.config import TextConfig
from ledits_min.errors import InputError, quoted
from ledits_min.files.header import read_header
from ledits_min.weights.read.identify import Stored, stored
from ledits_min.weights.read.shapes import FLOAT_DTYPES

EmbeddingSource = str | Path | tuple[str | Path, str]
TABLE = "embeddings.token_embedding.weight"  # our name of the tensor that gets the rows
MAX_VECTORS = 75  # what a prompt has room for
MAX_WORD = 64
_BUNDLE = "bundle_emb."
_ALONE = ("emb_params", "*", "string_to_param.*")
_PARTS = {"clip_l": "text", "clip_g": "text_2"}


@dataclass(frozen=True)
class Embedding:
    """A word and where its vectors lie: `vectors` maps "text" and SDXL's "text_2" to a tensor (N, D) or (D,)."""

    path: Path
    word: str
    vectors: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many tokens the word stands for."""
        return next(_rows(tensor) for tensor in self.vectors.values())

    def __str__(self) -> str:
        """One line for people."""
        vectors = "1 vector" if self.count == 1 else f"{self.count} vectors"
        return f"embedding: {quoted(self.path)} is the word {quoted(self.word)}, {vectors}"


def embedding_pairs(embedding: EmbeddingSource | Sequence[EmbeddingSource]) -> list[tuple[str | Path, str | None]]:
    """[(source, word or None)] from what a caller passed: a path, a (path, word) pair, or a list of either."""
    given: Any = embedding
    alone = isinstance(given, str | Path) or _is_pair(given) or not isinstance(given, Iterable)
    items = [given] if alone else [*given]
    pairs: list[tuple[str | Path, str | None]] = []
    for item in items:
        path, word = item if _is_pair(item) else (item, None)
        if not isinstance(path, str | Path):
            raise InputError(f"embedding holds {quoted(item, 80)}; a path or a (path, word) pair is wanted")
        pairs.append((path, word))
    return pairs


def survey_embedding(path: Path, word: str | None) -> Embedding:
    """What a file brings, from its header; the word is the one given, else diffusers' name of it, else the file's."""
    tensors = stored(path, read_header(path))
    own = next(iter(tensors)) if len(tensors) == 1 and not set(tensors) & {*_ALONE, *_PARTS} else path.stem
    return _embedding(path, own if word is None else word, tensors)


def bundled(tensors: Mapping[str, Stored], source: str) -> tuple[tuple[Embedding, ...], dict[str, Stored]]:
    """(the words inside a LoRA's file, its other tensors)."""
    found: dict[str, dict[str, Stored]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if not name.startswith(_BUNDLE):
            rest[name] = tensor
            continue
        inner = name.removeprefix(_BUNDLE)
        # The word may hold dots: what stands behind it is one of a few names.
        kind = next((kind for kind in (*_ALONE[::-1], *_PARTS) if inner.endswith(f".{kind}")), None)
        if kind is None:
            raise InputError(f"{source}: {quoted(name, 80)} is no embedding that is known here; use another LoRA")
        found.setdefault(inner.removesuffix(f".{kind}"), {})[kind] = tensor
    return tuple(_embedding(next(iter(f.values())).path, word, f) for word, f in found.items()), rest


def check_words(words: Sequence[Embedding], configs: Mapping[str, Any], source: str) -> None:
    """Every word fits every text encoder of the checkpoint, and none is given twice; InputError if not."""
    widths = {part: text.hidden_size for part, text in configs.items() if isinstance(text, TextConfig)}
    seen: set[str] = set()
    for embedding in words:
        name = f"{quoted(embedding.path)}: the word {quoted(embedding.word)}"
        if embedding.word.lower() in seen:
            raise InputError(f"{name} is given twice; write FILE:WORD to call one otherwise")
        seen.add(embedding.word.lower())
        found = {part: tensor.info.shape[-1] for part, tensor in embedding.vectors.items()}
        if found != widths:
            made, wanted = (" and ".join(map(str, sizes.values())) for sizes in (found, widths))
            raise InputError(
                f"{name} is {made} wide, the text encoder of {source} {wanted}; it was made for another family"
            )


def fingerprint(base: str, words: Sequence[Embedding]) -> str:
    """The fingerprint of a checkpoint that knows these words: sha256 over its own, the files and the words."""
    for embedding in words:
        with open(embedding.path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        base = hashlib.sha256(f"{base} {content} {embedding.word}".encode()).hexdigest()
    return base


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str | None)


def _embedding(path: Path, word: str, tensors: Mapping[str, Stored]) -> Embedding:
    source = quoted(path)
    if set(tensors) == set(_PARTS):
        vectors = {part: tensors[name] for name, part in _PARTS.items()}
    elif len(tensors) == 1 and not set(tensors) & set(_PARTS):
        vectors = {"text": next(iter(tensors.values()))}
    else:
        shown = ", ".join(quoted(name, 60) for name in sorted(tensors)[:3])
        raise InputError(
            f"{source} is no textual inversion: emb_params, one tensor named after the word, or clip_l and clip_g are "
            f"wanted, and it holds {len(tensors)} tensors ({shown})"
        )
    for tensor in vectors.values():
        shape = tensor.info.shape
        if tensor.info.dtype not in FLOAT_DTYPES or len(shape) not in (1, 2) or not 1 <= _rows(tensor) <= MAX_VECTORS:
            raise InputError(
                f"{source}: {quoted(tensor.name, 80)} is {tensor.info.dtype} {list(shape)}; 1 to {MAX_VECTORS} vectors "
                "of floats are wanted"
            )
    if len({_rows(tensor) for tensor in vectors.values()}) > 1:
        raise InputError(f"{source}: its vectors differ in number between both text encoders; use another file")
    if not 1 <= len(word) <= MAX_WORD or not word.isprintable() or word != " ".join(word.split()):
        raise InputError(
            f"{source} would be the word {quoted(word, 80)}; 1 to {MAX_WORD} letters are wanted, with no space but "
            "single ones inside: pass FILE:WORD"
        )
    return Embedding(path, word, vectors)


def _rows(tensor: Stored) -> int:
    return tensor.info.shape[0] if len(tensor.info.shape) == 2 else 1
