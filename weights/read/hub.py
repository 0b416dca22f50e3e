"""Find a Hugging Face model in the local cache; nothing here can reach a network.

The cache keeps one folder per repository, models--ORG--NAME. In it refs/REVISION holds a commit, and snapshots/COMMIT
the repository's files, as links to blobs/. Only its place is asked of the library (HF_HUB_CACHE, HF_HOME, ...).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from huggingface_hub import constants

from ledits_min.errors import InputError, quoted
from ledits_min.weights.read.folder import FOLDERS, STEMS

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?:@(?P<revision>\w[\w./-]{0,127}))?", re.ASCII)
_FILE = re.compile(rf"(?P<model>{_ID.pattern})/(?P<file>(?:[\w. -]+/)*[\w. -]+\.safetensors)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{4,64}")
_ALWAYS = ("*.json", "tokenizer*/*")  # in these patterns * is any text, / too
# What a repository calls its one file, where nobody says which is meant.
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
EMBEDDING_FILES = ("learned_embeds.safetensors",)


def is_hub_id(model: str | Path) -> bool:
    """Whether `model` reads as org/name or org/name@revision. What exists as a path is a path: ask that first."""
    return isinstance(model, str) and _ID.fullmatch(model) is not None and ".." not in model


def cached_model(model: str, supplied: Collection[str] = ()) -> Path:
    """The snapshot folder of org/name[@revision], with weights for every part that is not `supplied` from elsewhere.

    Raises InputError with the command that fetches what is read.
    """
    parts = [part for part in ("unet", "vae", "text") if part not in supplied]
    # A family may have a second text encoder, in text_encoder_2/.
    folders = {**FOLDERS, "text": f"{FOLDERS['text']}*"}
    wanted = [*_ALWAYS, *(_weights(f"{folders[part]}/", part) for part in parts)]
    snapshot = _snapshot(model, wanted)
    if "text_2" not in supplied and (snapshot / FOLDERS["text_2"]).is_dir():
        parts.append("text_2")  # SDXL's; the patterns above fetch it with the first one
    if absent := [part for part in parts if not _has_weights(snapshot / FOLDERS[part])]:
        single = ""
        if not (snapshot / "model_index.json").is_file():
            single = "if the repository is one file, `hf download` it by name and pass the path that is printed; else "
        raise InputError(
            f"{quoted(model)} is in the Hugging Face cache without the {' and '.join(absent)} as .safetensors; "
            f"{single}run: {_command(model, wanted)}"
        )
    return snapshot


def cached_file(source: str, names: Sequence[str]) -> Path | None:
    """The one file that org/name[@revision] or org/name[@revision]/FILE.safetensors means; None if it is no id.

    Without FILE it is one of `names`, or the only .safetensors at the top. InputError with the command to run if not.
    """
    match = _FILE.fullmatch(source)
    model = match["model"] if match else source
    if not is_hub_id(model) or ".." in source:
        return None
    if match:
        snapshot = _snapshot(model, [match["file"]])
        if (path := snapshot / match["file"]).is_file():
            return path
        raise InputError(f"{quoted(source)} is not in the Hugging Face cache; run: {_command(model, [match['file']])}")
    wanted = ("*.safetensors", "adapter_config.json")
    snapshot = _snapshot(model, wanted)
    files = sorted(path for path in snapshot.iterdir() if path.suffix == ".safetensors" and path.is_file())
    chosen = [path for path in files if path.name in names] or files
    if len(chosen) == 1:
        return chosen[0]
    if files:
        shown = ", ".join(path.name for path in files[:4])
        raise InputError(f"{quoted(source)} holds several files ({shown}, ...); write {model}/{files[0].name}")
    raise InputError(f"{quoted(source)} is in the cache without a .safetensors file; run: {_command(model, wanted)}")


def cached_part(model: str, part: str) -> Path:
    """The snapshot folder of org/name[@revision] to take one part from: its files are at the top or in a folder."""
    folder = f"{FOLDERS[part]}/"
    return _snapshot(model, ["*.json", _weights("", part), _weights(folder, part)])


def _weights(folder: str, part: str) -> str:
    """The pattern of a part's weights: which precisions a repository has, and in how many shards, only it knows."""
    return f"{folder}{STEMS[part]}*.safetensors"


def _snapshot(model: str, wanted: Iterable[str]) -> Path:
    name, revision = _split(model)
    cache = Path(os.path.expanduser(constants.HF_HUB_CACHE))
    if str(cache).startswith("~"):  # nothing says where this user's home is
        raise InputError(
            f"{quoted(model)} is no file or folder here, and without a home directory there is no Hugging Face cache "
            "to look into; set HF_HOME to the folder that holds it"
        )
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / _commit(folder, revision or "main")
    if not snapshot.is_dir():
        raise InputError(
            f"{quoted(model)} is no file or folder here and not in the Hugging Face cache {quoted(cache)}; nothing is "
            f"ever downloaded by this program, so run: {_command(model, wanted)}"
        )
    return snapshot


def _command(model: str, wanted: Iterable[str]) -> str:
    name, revision = _split(model)
    at = [] if revision is None else ["--revision", revision]
    included = [word for pattern in wanted for word in ("--include", pattern)]
    return shlex.join(["hf", "download", name, *at, *included, "--exclude", "*.non_ema*"])


def _split(model: str) -> tuple[str, str | None]:
    match = _ID.fullmatch(model)
    assert match is not None
    return match["id"], match["revision"]


def _commit(folder: Path, revision: str) -> str:
    """A branch or tag as the commit it stood for when it was fetched; a commit as itself."""
    try:
        commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return revision
    return commit if _COMMIT.fullmatch(commit) else revision


def _has_weights(folder: Path) -> bool:
    """Links whose blob was never fetched do not count."""
    return folder.is_dir() and any(path.suffix == ".safetensors" and path.is_file() for path in folder.iterdir())
