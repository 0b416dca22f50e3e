"""A trained run becomes a model folder: fp16 weights in diffusers' layout, sample portraits, and the training's log."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ledits_min.files.configs import config_json
from ledits_min.weights.train_tiny.classifier import ORACLE, accuracy, load_classifier
from ledits_min.weights.train_tiny.diffusion import CONFIG as UNET_CONFIG
from ledits_min.weights.train_tiny.diffusion import SCHEDULE, load_unet
from ledits_min.weights.train_tiny.portraits import dataset_hash, draw, ideal_edit, load_split, sample_portrait
from ledits_min.weights.train_tiny.text import (
    BOS,
    EOS,
    PAD,
    UNKNOWN,
    build_tokenizer,
    load_text,
    reading_accuracy,
    text_config,
)
from ledits_min.weights.train_tiny.vae import CONFIG as VAE_CONFIG
from ledits_min.weights.train_tiny.vae import load_vae, psnr, reconstruct

TINY = Path(__file__).resolve().parent.parent / "tiny"

# The settings of the study's local edits (bench/study/tune.py): what is small and is added, or removed by a phrase.
# Hats, hair, shirts, backgrounds and what is removed in reverse want those of bench/study/edits.py's GLOBAL.
DEFAULTS = {
    "num_steps": 25,
    "skip": 4,
    "guidance_scale": 3.5,
    "concept_guidance_scale": 2.0,
    "threshold": 0.9,
    "warmup_steps": 1,
    "attention_level": 1,
    "attention_places": ["up"],
    "blend_threshold": 0.6,  # its maps of 8 x 8 are coarse, and 0.3 keeps nearly all of a picture
    "one_size": True,
}

_BARE = {"eyewear": "none", "hat": "none", "beard": "none"}
# seeds of neither split, and what is set on them
SAMPLES: tuple[tuple[str, dict[str, str]], ...] = (
    ("sample 28", _BARE),
    ("sample 17", _BARE),
    ("sample 26", _BARE),
    ("sample 34", _BARE),
    ("sample 33", {**_BARE, "beard": "beard"}),
    ("sample 15", {**_BARE, "eyewear": "sunglasses"}),
)
PARTS = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
NOTICE = """# The embedded model

A small model of Stable Diffusion's shape for 128 x 128 drawn portraits, trained from scratch by `weights/train_tiny`
(`python -m ledits_min.weights.train_tiny --help`). `train_log.json` says how, on what and with which result.
`oracle.safetensors` is the classifier that scores edits; it had no part in the training.

The pictures that it learned from, and those in `samples/`, are drawn by the style "Avataaars" (https://avataaars.com/)
by Pablo Stanley, free for personal and commercial use, as remixed by DiceBear (https://www.dicebear.com).
The faces are drawings of nobody. No portrait in `samples/` was trained on.
"""


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def halves(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: value.half().contiguous() for name, value in module.state_dict().items()}


def export_model(run: Path, folder: Path) -> None:
    """Write the averaged weights of a run as a diffusers folder with fp16 weights."""
    tokenizer, encoder = load_text(run)
    modules = {
        "unet": (load_unet(run), config_json(UNET_CONFIG)),
        "vae": (load_vae(run), config_json(VAE_CONFIG)),
        "text_encoder": (encoder, config_json(text_config(tokenizer))),
    }
    for name, (module, config) in modules.items():
        write_json(folder / name / "config.json", config)
        text = name == "text_encoder"
        file = "model.safetensors" if text else "diffusion_pytorch_model.safetensors"
        tensors = halves(module, "text_model." if text else "")
        save_file(tensors, folder / name / file, {"format": "pt"})
        (folder / name / file).chmod(0o644)
    export_tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", config_json(SCHEDULE))
    save_file(halves(load_classifier(run)), folder / ORACLE, {"format": "pt"})
    (folder / ORACLE).chmod(0o644)
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **PARTS})
    write_json(folder / "ledits.json", DEFAULTS)
    (folder / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    (folder / "samples").mkdir(exist_ok=True)
    for number, (seed, changes) in enumerate(SAMPLES, start=1):
        picture = draw(ideal_edit(sample_portrait(seed), changes), VAE_CONFIG.sample_size)
        Image.fromarray(picture).save(folder / "samples" / f"portrait{number}.png")


def export_tokenizer(folder: Path) -> None:
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": PAD}
    tokenizer = build_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.model_max_length, **special},
    )


def stage_summary(log: Path) -> dict[str, Any]:
    """Steps, seconds and about ten points of a stage's loss curve; steps that a resumed run repeated count once."""
    parsed = [json.loads(line) for line in log.read_text().splitlines()]
    lines = list({line["step"]: line for line in parsed}.values())
    stride = max(1, len(lines) // 10)
    curve = lines[stride - 1 :: stride]
    return {
        "steps": lines[-1]["step"],
        "seconds": lines[-1]["seconds"],
        "threads": " then ".join(map(str, dict.fromkeys(line["threads"] for line in lines))),
        "loss": {line["step"]: round(line["loss"], 5) for line in curve},
    }


def training_log(run: Path, seed: int) -> dict[str, Any]:
    """What a reader needs to judge or repeat the training, measured on the held-out split where it is a quality."""
    pixels, shown = load_split(run / "data", "test")
    train_count = len(load_split(run / "data", "train")[1])
    seen = accuracy(load_classifier(run), pixels, shown)
    packages = ("torch", "transformers", "safetensors", "dicebear-core", "dicebear-styles", "resvg-py")
    return {
        "seed": seed,
        "hardware": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "data": {"train": train_count, "test": len(pixels), "sha256": dataset_hash(run / "data")},
        "stages": {name: stage_summary(run / f"{name}.jsonl") for name in ("classifier", "vae", "text", "unet")},
        "held_out": {
            "vae_psnr_db": round(psnr(pixels, reconstruct(load_vae(run), pixels)), 2),
            "text_accuracy": round(reading_accuracy(run), 4),
            "classifier_accuracy": {name: round(value, 4) for name, value in seen.items()},
        },
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def export(run: Path, seed: int, folder: Path = TINY) -> None:
    with torch.no_grad():
        export_model(run, folder)
        write_json(folder / "train_log.json", training_log(run, seed))
