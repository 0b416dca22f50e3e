"""Load a full-size Stable Diffusion 1.5 single file, beside diffusers' `from_single_file`, each in a fresh process.

The file holds random weights. Loading counts as done when every page of every weight has been read once: both sides
may map the file and would otherwise show the time of doing nothing. The page cache is warm for both. Peaks are
resident memory, mapped pages of the file included, over what the process held before its first import.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ledits_min.config import SD15_SCHEDULE, SD15_TEXT, SD15_UNET, SD15_VAE
from ledits_min.files.configs import config_json
from ledits_min.weights.clip_bpe import clip_merges, clip_vocabulary
from ledits_min.weights.names.ldm import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, unet_table, vae_table
from ledits_min.weights.read.shapes import text_shapes, unet_shapes, vae_shapes

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read as Linux tells it"
)

ROUNDS = 3
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PARAMETERS = 859_520_964 + 83_653_863 + 123_060_480  # unet, vae, text encoder
CASES = [("float32", "float32"), ("float16", "float32"), ("float16", "float16"), ("float32", "bfloat16")]

MEASURE = """
import json, sys, time
def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def finish(modules, start):
    for module in modules:
        for tensor in module.state_dict().values():
            tensor.flatten()[:: 4096 // tensor.element_size()].float().sum()
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "peak": peak, "imported": imported}))
before = resident("VmRSS")
file, configs, dtype = sys.argv[1:]
"""
OURS = """
import torch
from ledits_min.pipeline import LEdits
imported = resident("VmRSS") - before
start = time.perf_counter()
ledits = LEdits.from_pretrained(file, device="cpu", dtype=dtype)
finish([ledits.unet, ledits.vae, ledits.text.model], start)
"""
DIFFUSERS = """
import torch
from diffusers import StableDiffusionPipeline
imported = resident("VmRSS") - before
start = time.perf_counter()
pipe = StableDiffusionPipeline.from_single_file(
    file, config=configs, torch_dtype=getattr(torch, dtype), local_files_only=True, safety_checker=None)
finish([pipe.unet, pipe.vae, pipe.text_encoder], start)
"""


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} file, {case[1]} weights")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """(LDM file with random weights, its dtype, the dtype to compute in)."""
    stored, wanted = request.param
    path = tmp_path_factory.mktemp("checkpoint") / "sd15.safetensors"
    unet, vae = unet_shapes(SD15_UNET), vae_shapes(SD15_VAE)
    shapes = {UNET_PREFIX + theirs: unet[ours] for theirs, ours in unet_table(SD15_UNET).items()}
    for theirs, ours in vae_table(SD15_VAE).items():
        as_conv = ".attn_1." in theirs and len(vae[ours]) == 2
        shapes[VAE_PREFIX + theirs] = (*vae[ours], 1, 1) if as_conv else vae[ours]
    shapes |= {f"{TEXT_PREFIX}text_model.{name}": shape for name, shape in text_shapes(SD15_TEXT).items()}
    save_file({name: torch.rand(shape).mul_(0.02).to(DTYPES[stored]) for name, shape in shapes.items()}, path)
    yield path, stored, wanted
    path.unlink()


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of configs that diffusers would fetch from a network."""
    folder = tmp_path_factory.mktemp("configs")
    parts = {
        "unet": ("config.json", config_json(SD15_UNET), ["diffusers", "UNet2DConditionModel"]),
        "vae": ("config.json", config_json(SD15_VAE), ["diffusers", "AutoencoderKL"]),
        "text_encoder": ("config.json", config_json(SD15_TEXT), ["transformers", "CLIPTextModel"]),
        "scheduler": ("scheduler_config.json", config_json(SD15_SCHEDULE), ["diffusers", "DDIMScheduler"]),
        "tokenizer": ("vocab.json", clip_vocabulary(), ["transformers", "CLIPTokenizer"]),
    }
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0"}
    for name, (file, content, kind) in parts.items():
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps(content))
        index[name] = kind
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in clip_merges())])
    (folder / "tokenizer/merges.txt").write_text(merges)
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    absent = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
    (folder / "model_index.json").write_text(json.dumps(index | absent | {"requires_safety_checker": False}))
    return folder


@pytest.mark.parametrize("code", [OURS, DIFFUSERS], ids=["ours", "diffusers"])
def test_load(benchmark: Any, case: tuple[Path, str, str], configs: Path, code: str) -> None:
    path, stored, wanted = case
    measured: list[dict[str, float]] = []

    def load() -> None:
        command = [sys.executable, "-c", MEASURE + code, str(path), str(configs), wanted]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured.append(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(load, rounds=ROUNDS, warmup_rounds=1)
    measured = measured[1:]
    larger = PARAMETERS * max(dtype.itemsize for dtype in (DTYPES[stored], DTYPES[wanted]))
    benchmark.extra_info["load_seconds"] = sorted(round(run["seconds"], 2) for run in measured)
    benchmark.extra_info["peak_GB"] = round(max(run["peak"] for run in measured) / 1e9, 2)
    benchmark.extra_info["of_that_imports_GB"] = round(max(run["imported"] for run in measured) / 1e9, 2)
    benchmark.extra_info["weights_GB"] = round(larger / 1e9, 2)
    benchmark.extra_info["peak_to_weights"] = round(max(run["peak"] for run in measured) / larger, 2)
