"""The files of a diffusers folder: which one holds a part's weights, and its JSON configs.

Where a folder offers a part several times, the first of this list is taken and the choice is noted:
  NAME.safetensors, NAME.fp32.safetensors, NAME.fp16.safetensors, NAME.bf16..., NAME.non_ema...
each as one file or as an index of shards (NAME.safetensors.index.json, NAME.safetensors.index.fp16.json).
The full-precision file comes first because every other one can be made from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ledits_min.errors import InputError, quoted
from ledits_min.files.header import PICKLE_ADVICE, PICKLE_SUFFIXES, read_header
from ledits_min.files.reader import read_bounded
from ledits_min.weights.read.identify import Stored, stored

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text": "model", "text_2": "model"}
FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder", "text_2": "text_encoder_2"}
VARIANTS = ("", "fp32", "fp16", "bf16", "non_ema")
# JSON takes up to twenty times its size in memory. A published tokenizer.json of CLIP has 3.6 MB.
MAX_JSON_BYTES = 8_000_000


@contextmanager
def readable() -> Iterator[None]:
    """What the system refuses to look at, such as a name that is too long, is bad input: InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{quoted(error.filename)} cannot be read: {error.strerror}; check the path") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError for anything else."""
    raw = read_bounded(path, MAX_JSON_BYTES)
    if raw.startswith(b"version https://git-lfs"):
        raise InputError(f"{quoted(path)} is a git-lfs pointer; run `git lfs pull` in its repository")
    try:
        parsed = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{quoted(path)} is not JSON ({quoted(error, 80)}); download it again") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{quoted(path)} does not hold a JSON object; download it again")
    return parsed


def part_tensors(folder: Path, part: str) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor of one part's folder, from the preferred variant, and notes on the choice."""
    if not folder.is_dir():
        raise InputError(f"{quoted(folder)} is missing; take the folder whole, or pass {option(part)}")
    candidates = [path for variant in VARIANTS for path in _variant(folder, STEMS[part], variant) if path.is_file()]
    if not candidates:
        _refuse_missing(folder, part)
    chosen = candidates[0]
    notes = []
    if len(candidates) > 1:
        others = ", ".join(path.name for path in candidates[1:])
        notes.append(f"{part}: {chosen.name} is used; also there: {others}")
    elif chosen.name not in (f"{STEMS[part]}.safetensors", f"{STEMS[part]}.safetensors.index.json"):
        notes.append(f"{part}: {chosen.name} is used")
    if chosen.suffix == ".json":
        return _shards(chosen), notes
    return stored(chosen, read_header(chosen)), notes


def tokenizer_folder(folder: Path) -> Path:
    """`folder` if a tokenizer can be built from it: tokenizer.json alone, or vocab.json and merges.txt."""
    if (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return folder
    raise InputError(
        f"{quoted(folder)} holds no tokenizer; tokenizer.json, or vocab.json and merges.txt, are wanted there"
    )


def option(part: str) -> str:
    """How a missing part is supplied."""
    options = {
        "vae": "--vae FILE (vae= in Python)",
        "text": "--text-encoder FILE (text_encoder= in Python)",
        "text_2": "--text-encoder MODEL (text_encoder= in Python), a folder or file that has both text encoders",
    }
    return options.get(part, "a complete checkpoint")


def _variant(folder: Path, stem: str, variant: str) -> tuple[Path, Path]:
    dotted = f".{variant}" if variant else ""
    return folder / f"{stem}{dotted}.safetensors", folder / f"{stem}.safetensors.index{dotted}.json"


def _shards(index: Path) -> dict[str, Stored]:
    """The tensors of all files that an index lists; each must hold what the index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{quoted(index)} has no weight_map of file names; download it again")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        # A shard lies beside its index: a name with a separator would reach outside the folder.
        if Path(name).name != name or "\\" in name:
            raise InputError(f"{quoted(index)} lists {quoted(name, 80)}, which is not a plain file name")
        shard = stored(index.parent / name, read_header(index.parent / name))
        tensors |= {key: tensor for key, tensor in shard.items() if weight_map.get(key) == name}
    if absent := sorted(set(weight_map) - set(tensors)):
        raise InputError(
            f"{quoted(index)} lists {len(absent)} tensors that its files do not hold "
            f"({quoted(absent[0], 80)}, ...); download them again"
        )
    return tensors


def _refuse_missing(folder: Path, part: str) -> None:
    wanted = f"{STEMS[part]}.safetensors"
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise InputError(
            f"{quoted(folder)} holds no {wanted}, only {quoted(pickles[0], 80)}, a pickle; {PICKLE_ADVICE}"
        )
    raise InputError(f"{quoted(folder)} holds no {wanted}; take the folder whole")
