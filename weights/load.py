"""From files to state dicts: survey the checkpoint, then map its tensors under the names of our modules.

Everything is decided from headers and configs first (survey.py); only then are tensors mapped, never
copied: they stay in the file until a layer needs them. No network is built here and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ledits_min.config import ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ledits_min.errors import InputError, quoted
from ledits_min.files.configs import config_json
from ledits_min.files.header import read_header
from ledits_min.weights import embedding as words
from ledits_min.weights import merge
from ledits_min.weights.read.identify import PARTS, Stored
from ledits_min.weights.read.prediction import looks_like_v
from ledits_min.weights.read.published import Config
from ledits_min.weights.read.shapes import expected_shapes
from ledits_min.weights.read.survey import Parts, Survey, settle, survey_whole, typed_configs

FINGERPRINT_BYTES = 65536
TENSORS_PER_MAPPING = 16
_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# What no layer computes in is read as the nearest dtype that holds it: both float8 kinds fit float16 exactly.
_READ_AS = {"F64": torch.float32, "F8_E4M3": torch.float16, "F8_E5M2": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """Everything a pipeline needs: state dicts under our modules' names, and what describes them.

    unet, vae, text   tensors in the file's dtype, memory-mapped; float64 is cast to float32, float8 to float16, and
                      weights that a LoRA changes to the dtype asked for
    tokenizer         a folder, or None for the CLIP vocabulary shipped here
    defaults          the checkpoint's own `ledits.json`, {} if it brings none
    fingerprint       sha256 over configs, headers, the first 64 KiB of every tensor, and LoRAs with their scales
    notes             one line for each choice and oddity a person may want to know
    text_2, ...       SDXL's second text encoder with its config and tokenizer; {}, None and None elsewhere
    words             new words, and how many tokens each stands for: the last rows of every text encoder's table
    skipped_layers    of SDXL's text encoders: how many more layers than the last are left unread
    zeros_for_empty_prompt   whether SDXL was trained to be told nothing at all where the prompt is empty
    """

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    text: dict[str, Tensor]
    unet_config: UNetConfig
    vae_config: VAEConfig
    text_config: TextConfig
    schedule_config: ScheduleConfig
    tokenizer: Path | None
    defaults: dict[str, Any]
    fingerprint: str
    notes: list[str]
    text_2: dict[str, Tensor] = field(default_factory=dict)
    text_2_config: TextConfig | None = None
    tokenizer_2: Path | None = None
    words: dict[str, int] = field(default_factory=dict)
    skipped_layers: int = 0
    zeros_for_empty_prompt: bool = False


def load_checkpoint(model: str | Path, *, dtype: torch.dtype = torch.float32, **parts: Unpack[Parts]) -> Checkpoint:
    """Load a checkpoint: "tiny", a single .safetensors file, a diffusers folder, or an org/name in the local cache.

    Weights that a LoRA changes come in `dtype`. Raises InputError for whatever does not fit, before any tensor is read.
    """
    return fetch(survey_whole(model, **parts), dtype)


def fetch(survey: Survey, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Map the surveyed tensors into memory, merge the LoRAs into them, and fingerprint the whole."""
    if survey.undecided is not None:
        spread = float(_read(survey.undecided, _open(survey.undecided.path)).float().std(unbiased=False))
        prediction_type, note = looks_like_v(spread)
        settle(survey, prediction_type)
        survey.notes.append(note)
    fingerprint = words.fingerprint(merge.fingerprint(_fingerprint(survey), survey.loras), survey.words)
    for part in survey.parts:
        _note_dtypes(survey, part)
    changed = {part: {n for lora in survey.loras for n in lora.updates.get(part, {})} for part in survey.parts}
    states = {
        part: _map_tensors(tensors, survey.configs[part], changed[part]) for part, tensors in survey.parts.items()
    }
    merge.merge(states, survey.loras, dtype)
    if survey.words:
        _add_words(survey, states)
    unet, vae, text = typed_configs(survey)
    text_2 = survey.configs.get("text_2")
    return Checkpoint(
        unet=states["unet"],
        vae=states["vae"],
        text=states["text"],
        unet_config=unet,
        vae_config=vae,
        text_config=text,
        schedule_config=survey.schedule,
        tokenizer=survey.tokenizer,
        defaults=survey.defaults,
        fingerprint=fingerprint,
        notes=survey.notes,
        text_2=states.get("text_2", {}),
        text_2_config=text_2 if isinstance(text_2, TextConfig) else None,
        tokenizer_2=survey.tokenizer_2,
        words={embedding.word: embedding.count for embedding in survey.words},
        skipped_layers=survey.skipped_layers,
        zeros_for_empty_prompt=text_2 is not None and survey.zeros_for_empty_prompt,
    )


def _add_words(survey: Survey, states: Mapping[str, dict[str, Tensor]]) -> None:
    """The vectors of new words as further rows of the text encoders' tables, and their configs with it."""
    for part, config in survey.configs.items():
        if not isinstance(config, TextConfig):
            continue
        table = states[part][words.TABLE]
        rows = [_read(word.vectors[part], _open(word.path)).reshape(word.count, -1) for word in survey.words]
        for word, vectors in zip(survey.words, rows, strict=True):
            if not bool(vectors.float().isfinite().all()):
                raise InputError(f"{quoted(word.path)}: its vectors hold NaN or infinity; use another file")
        states[part][words.TABLE] = grown = torch.cat([table, *(vectors.to(table.dtype) for vectors in rows)])
        survey.configs[part] = replace(config, vocab_size=len(grown))


def _note_dtypes(survey: Survey, part: str) -> None:
    dtypes = Counter(tensor.info.dtype for tensor in survey.parts[part].values())
    if len(dtypes) > 1:
        counts = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
        survey.notes.append(f"{part}: mixed dtypes ({counts})")
    for name, kind in _READ_AS.items():
        if name in dtypes:
            stored, cast = (str(dtype).removeprefix("torch.") for dtype in (_TORCH_DTYPES[name], kind))
            survey.notes.append(f"{part}: {dtypes[name]} {stored} tensors are cast to {cast}")


def _map_tensors(tensors: Mapping[str, Stored], config: Config, changed: Collection[str] = ()) -> dict[str, Tensor]:
    """Views into memory-mapped files, in module order; float64 and float8 are copied, 1x1 convolutions lose their 1s.

    A file is mapped anew for every few tensors. A mapping is dropped with its last tensor, so that a network which is
    cast to another dtype, tensor after tensor, never holds the whole file beside its own weights. Those that will be
    `changed` share no mapping with others, for the same reason.
    """
    wanted = expected_shapes(config)
    ordered = sorted(wanted, key=lambda name: name not in changed)
    result = {}
    for start in range(0, len(wanted), TENSORS_PER_MAPPING):
        names = ordered[start : start + TENSORS_PER_MAPPING]
        files = {path: _open(path) for path in {tensors[name].path for name in names}}
        for name in names:
            tensor = _read(tensors[name], files[tensors[name].path])
            result[name] = tensor.to(_READ_AS.get(tensors[name].info.dtype, tensor.dtype)).view(wanted[name])
    return result


def _read(stored: Stored, file: Any) -> Tensor:
    tensor: Tensor = file.get_tensor(stored.name)
    if stored.rows is not None:
        tensor = tensor[slice(*stored.rows)]
    return tensor.T.contiguous() if stored.transposed else tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise InputError(f"{quoted(path)} cannot be read ({quoted(error, 100)}); download it again") from error


def _fingerprint(survey: Survey) -> str:
    """sha256 over the configs, and for each file its header and the first 64 KiB of every tensor used.

    The bytes are read, not mapped, so that nothing stays resident; a NaN or infinity among them is refused.
    """
    parts = [part for part in PARTS if part in survey.parts]
    configs = [config_json(survey.configs[part]) for part in parts] + [config_json(survey.schedule)]
    configs += [{"zeros_for_empty_prompt": survey.zeros_for_empty_prompt}] if "text_2" in parts else []
    configs += [{"skipped_layers": survey.skipped_layers}] if survey.skipped_layers else []
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True).encode())
    used = [tensor for part in parts for tensor in survey.parts[part].values()]
    all_zero = True
    for path in dict.fromkeys(tensor.path for tensor in used):
        header = read_header(path)
        with open(path, "rb") as file:
            digest.update(file.read(header.data_start))
            for tensor in _in_file_order(used, path):
                file.seek(header.data_start + tensor.info.begin)
                start = bytearray(file.read(min(FINGERPRINT_BYTES, tensor.info.end - tensor.info.begin)))
                digest.update(start)
                values = torch.frombuffer(start, dtype=_TORCH_DTYPES[tensor.info.dtype])
                if not values.float().isfinite().all():
                    raise InputError(
                        f"{quoted(path)}: tensor {quoted(tensor.name, 80)} holds NaN or infinity; the file "
                        "is damaged or its merge failed, use another"
                    )
                all_zero = all_zero and start.count(0) == len(start)
    if all_zero:
        survey.notes.append("every weight looked at is zero: this checkpoint can only make noise")
    return digest.hexdigest()


def _in_file_order(tensors: Iterable[Stored], path: Path) -> list[Stored]:
    return sorted((tensor for tensor in tensors if tensor.path == path), key=lambda tensor: tensor.info.begin)
