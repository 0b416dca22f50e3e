"""From files to state dicts: survey the checkpoint, then map its tensors under the names of our modules.

Everything is decided from headers and configs first (survey.py); only then are tensors mapped, never
copied: they stay in the file until a layer needs them. No network is built here and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ledits_min.config import InputError, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ledits_min.weights.family import PARTS, Stored
from ledits_min.weights.folder import tokenizer_folder
from ledits_min.weights.header import quoted, read_header
from ledits_min.weights.shapes import Config, expected_shapes
from ledits_min.weights.survey import (
    Survey,
    check_complete,
    prediction_type_named,
    survey_checkpoint,
    take_part,
    typed_configs,
)

FINGERPRINT_BYTES = 65536
TENSORS_PER_MAPPING = 16
_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """Everything a pipeline needs: three state dicts under our modules' names, and what describes them.

    unet, vae, text   tensors in the file's dtype, memory-mapped (float64 is cast to float32)
    tokenizer         a folder, or None for the CLIP vocabulary shipped here
    defaults          the checkpoint's own `ledits.json`, {} if it brings none
    fingerprint       sha256 over configs, headers and the first 64 KiB of every tensor
    notes             one line for each choice and oddity a person may want to know
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


def load_checkpoint(
    model: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
) -> Checkpoint:
    """Load a Stable Diffusion 1.x checkpoint: "tiny", a single .safetensors file, or a diffusers folder.

    `vae` and `text_encoder` (a file or a folder) replace or supply a part, `tokenizer` is a folder,
    `prediction_type` is "epsilon" or "v_prediction" (or eps, v). Raises InputError for whatever does not
    fit, before any tensor is read.
    """
    supplied = {part: Path(path) for part, path in (("vae", vae), ("text", text_encoder)) if path is not None}
    survey = survey_checkpoint(model, supplied)
    for part, path in supplied.items():
        take_part(survey, part, path)
    if tokenizer is not None:
        survey.tokenizer = tokenizer_folder(Path(tokenizer))
    if prediction_type is not None:
        survey.schedule = replace(survey.schedule, prediction_type=prediction_type_named(prediction_type))
    check_complete(survey)
    return fetch(survey)


def fetch(survey: Survey) -> Checkpoint:
    """Map the surveyed tensors into memory and fingerprint them."""
    fingerprint = _fingerprint(survey)
    unet, vae, text = typed_configs(survey)
    for part in PARTS:
        _note_dtypes(survey, part)
    return Checkpoint(
        unet=_map_tensors(survey.parts["unet"], unet),
        vae=_map_tensors(survey.parts["vae"], vae),
        text=_map_tensors(survey.parts["text"], text),
        unet_config=unet,
        vae_config=vae,
        text_config=text,
        schedule_config=survey.schedule,
        tokenizer=survey.tokenizer,
        defaults=survey.defaults,
        fingerprint=fingerprint,
        notes=survey.notes,
    )


def _note_dtypes(survey: Survey, part: str) -> None:
    dtypes = Counter(tensor.info.dtype for tensor in survey.parts[part].values())
    if len(dtypes) > 1:
        counts = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
        survey.notes.append(f"{part}: mixed dtypes ({counts})")
    if "F64" in dtypes:
        survey.notes.append(f"{part}: {dtypes['F64']} float64 tensors are cast to float32")


def _map_tensors(tensors: Mapping[str, Stored], config: Config) -> dict[str, Tensor]:
    """Views into memory-mapped files, in module order; only float64 is copied, and 1x1 convolutions lose their 1s.

    A file is mapped anew for every few tensors. A mapping is dropped with its last tensor, so that a network which is
    cast to another dtype, tensor after tensor, never holds the whole file beside its own weights.
    """
    wanted = expected_shapes(config)
    result = {}
    for start in range(0, len(wanted), TENSORS_PER_MAPPING):
        names = list(wanted)[start : start + TENSORS_PER_MAPPING]
        files = {path: _open(path) for path in {tensors[name].path for name in names}}
        for name in names:
            path, key, info = tensors[name]
            tensor: Tensor = files[path].get_tensor(key)
            result[name] = (tensor.float() if info.dtype == "F64" else tensor).view(wanted[name])
    return result


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise InputError(f"{quoted(path)} cannot be read ({quoted(error, 100)}); download it again") from error


def _fingerprint(survey: Survey) -> str:
    """sha256 over the configs, and for each file its header and the first 64 KiB of every tensor used.

    The bytes are read, not mapped, so that nothing stays resident; a NaN or infinity among them is refused.
    """
    configs = [survey.configs[part].to_json() for part in PARTS] + [survey.schedule.to_json()]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True).encode())
    used = [tensor for part in PARTS for tensor in survey.parts[part].values()]
    all_zero = True
    for path in dict.fromkeys(tensor.path for tensor in used):
        header = read_header(path)
        with open(path, "rb") as file:
            digest.update(file.read(header.data_start))
            for tensor in _in_file_order(used, path):
                file.seek(header.data_start + tensor.info.begin)
                start = bytearray(file.read(min(FINGERPRINT_BYTES, tensor.info.end - tensor.info.begin)))
                digest.update(start)
                if not torch.frombuffer(start, dtype=_TORCH_DTYPES[tensor.info.dtype]).isfinite().all():
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
