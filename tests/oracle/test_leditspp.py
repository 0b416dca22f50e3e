"""LEDITS++ as three options of the loop, against diffusers' two pipelines with their faults switched off.

Theirs are run as they are but for: the number of a concept's tokens (a tokenizer of transformers 5 gives the padded
length), the last step (its noise is found with the second order and applied with the first), the residuals that SDXL's
drops, and the noise, which is ours. Ours visits their timesteps, and does not bound the second-order term here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.pipelines.ledits_pp import pipeline_leditspp_stable_diffusion as sd
from diffusers.pipelines.ledits_pp import pipeline_leditspp_stable_diffusion_xl as sdxl
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
from transformers.models.clip import CLIPTextModel

from ledits_min import Concept, LEdits
from ledits_min.config import CROSS_DOWN, CROSS_UP, EditDefaults, ScheduleConfig
from ledits_min.engine.presets import preset_defaults
from ledits_min.files.configs import config_json
from ledits_min.schedule import Schedule, make_schedule
from ledits_min.weights.clip_bpe import clip_merges, clip_vocabulary

Error = Callable[[Tensor, Tensor], float]

STEPS, SKIP, SIDE = 6, 0.5, 128
CONCEPTS = ("sunglasses", "a small hat")
MASKS = {
    "noise": {"use_cross_attn_mask": False, "use_intersect_mask": False},
    "attention": {"use_cross_attn_mask": True, "use_intersect_mask": False},
    "both": {"use_cross_attn_mask": True, "use_intersect_mask": True},
}


def picture() -> Image.Image:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    channels = [np.sin(columns / 9.0), np.cos(rows / 7.0), np.sin((rows + columns) / 11.0)]
    return Image.fromarray(((np.stack(channels, axis=-1) + 1.0) * 127.5).astype(np.uint8))


def tokenizer(pad: str) -> CLIPTokenizer:
    words: Any = clip_vocabulary()
    merges: Any = list(clip_merges())
    return CLIPTokenizer(vocab=words, merges=merges, model_max_length=77, pad_token=pad)


def their_scheduler() -> DPMSolverMultistepScheduler:
    scheduler: DPMSolverMultistepScheduler = DPMSolverMultistepScheduler.from_config(
        config_json(ScheduleConfig()), algorithm_type="sde-dpmsolver++", solver_type="midpoint", solver_order=2,
        timestep_spacing="leading", steps_offset=1, final_sigmas_type="sigma_min",
    )  # fmt: skip
    return scheduler


def their_pipeline(folder: Path, family: str) -> Any:
    here: dict[str, Any] = {"local_files_only": True, "torch_dtype": torch.float32}
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", **here).eval(),
        "vae": AutoencoderKL.from_pretrained(folder / "vae", **here).eval(),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", **here).eval(),
        "tokenizer": tokenizer("<|endoftext|>"),
        "scheduler": their_scheduler(),
    }
    if family != "SDXL":
        nobody = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline: Any = sd.LEditsPPPipelineStableDiffusion(**parts, **nobody)
    else:
        second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **here).eval()
        pipeline = sdxl.LEditsPPPipelineStableDiffusionXL(**parts, text_encoder_2=second, tokenizer_2=tokenizer("!"))
    pipeline.set_progress_bar_config(disable=True)
    encode = pipeline.encode_prompt

    def with_own_tokens(*args: Any, **more: Any) -> Any:
        """The last of what comes back is how many tokens each concept has."""
        *found, _ = encode(*args, **more)
        prompts = more.get("editing_prompt") or []
        return *found, [len(pipeline.tokenizer(text).input_ids) - 2 for text in prompts]

    pipeline.encode_prompt = with_own_tokens
    return pipeline


def alike_at_the_end(compute_noise: Callable[..., Any]) -> Callable[..., Any]:
    """The last step's noise, found with the order that it is applied with: the first, as there are few steps."""

    def compute(scheduler: Any, *args: Any) -> Any:
        if scheduler.step_index == len(scheduler.timesteps) - 1:
            scheduler.lower_order_nums = 0
        return compute_noise(scheduler, *args)

    return compute


def their_levels() -> Schedule:
    """The levels that theirs visits, the cleanest `STEPS` of int(STEPS (1 + skip)), and the cleanest of all behind."""
    scheduler = their_scheduler()
    scheduler.set_timesteps(int(STEPS * (1 + SKIP)))
    timesteps = scheduler.timesteps[-STEPS:]
    whole = make_schedule(ScheduleConfig(), 10)
    alpha_bar_t = whole.alphas_cumprod[timesteps]
    return replace(
        whole, timesteps=timesteps, t_prev=torch.cat([timesteps[1:], torch.tensor([-1])]), alpha_bar_t=alpha_bar_t,
        alpha_bar_prev=torch.cat([alpha_bar_t[1:], whole.alphas_cumprod[:1]]),
    )  # fmt: skip


def unbounded(schedule: Schedule) -> list[float]:
    snr, snr_prev = (level / (1.0 - level) for level in (schedule.alpha_bar_t, schedule.alpha_bar_prev))
    h = 0.5 * (snr_prev / snr).log()
    middle = snr[1:-1].sqrt() * h[1:-1] / (2.0 * h[:-2])
    return [0.0, *middle.tolist(), 0.0]


@pytest.mark.parametrize("is_sdxl", [False, True])
def test_the_preset_has_the_numbers_of_their_signatures(is_sdxl: bool) -> None:
    pipeline: Any = sdxl.LEditsPPPipelineStableDiffusionXL if is_sdxl else sd.LEditsPPPipelineStableDiffusion
    theirs: dict[str, Any] = {}
    for function in (pipeline.__call__, pipeline.invert):
        theirs |= {name: parameter.default for name, parameter in signature(function).parameters.items()}
    ours = preset_defaults("leditspp", EditDefaults(), False, is_sdxl)
    total = int(theirs["num_inversion_steps"] * (1 + theirs["skip"]))
    assert (ours.num_steps, ours.skip) == (total, total - theirs["num_inversion_steps"])
    assert ours.concept_guidance_scale == theirs["edit_guidance_scale"]
    assert ours.source_guidance_scale == theirs["source_guidance_scale"]
    assert (ours.threshold, ours.warmup_steps) == (theirs["edit_threshold"], theirs["edit_warmup_steps"])
    flags = MASKS[ours.mask]
    assert flags["use_intersect_mask"] == theirs["use_intersect_mask"]
    assert flags["use_cross_attn_mask"] == (theirs["use_cross_attn_mask"] or theirs["use_intersect_mask"])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", ["SD 1.x", "SDXL"])
@torch.no_grad()
def test_the_edit_is_that_of_diffusers(
    checkpoints: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Error, family: str, mask: str
) -> None:
    if family == "SDXL":
        checkpoints.write_family_folder(tmp_path / "model", family)
    else:
        down, up = (CROSS_DOWN,) * 3, (CROSS_UP,) * 3
        unet = replace(checkpoints.REDUCED_UNET, down_block_types=down, up_block_types=up)
        checkpoints.write_folder(tmp_path / "model", unet=unet)
    monkeypatch.setattr("ledits_min.inversion.make_schedule", lambda *_: their_levels())
    monkeypatch.setattr(Schedule, "second_order_weights", unbounded)
    noise = torch.randn(STEPS, 1, 4, SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(0))

    with LEdits.from_pretrained(tmp_path / "model", device="cpu", dtype="float32") as ledits:
        concepts = [Concept(text, 5.0 + n, 0.8, n, reverse=n == 1, mask=mask) for n, text in enumerate(CONCEPTS)]
        _, result = ledits.invert_and_edit(
            picture(), num_steps=STEPS, skip=0, noise=noise, solver_order=2, concepts=concepts, progress=False,
            output_size="model", size=SIDE,
        )  # fmt: skip

    pipeline, module = their_pipeline(tmp_path / "model", family), sdxl if family == "SDXL" else sd
    drawn = iter(noise.flip(0))  # theirs begins with the cleanest copy
    monkeypatch.setattr(module, "randn_tensor", lambda **_: next(drawn))
    monkeypatch.setattr(module, "compute_noise", alike_at_the_end(module.compute_noise))
    more = {"num_zero_noise_steps": 0} if family == "SDXL" else {}
    pipeline.invert(picture(), num_inversion_steps=STEPS, skip=SKIP, height=SIDE, width=SIDE, **more)
    wanted = pipeline(
        editing_prompt=list(CONCEPTS), edit_guidance_scale=[5.0, 6.0], edit_threshold=[0.8, 0.8],
        edit_warmup_steps=[0, 1], reverse_editing_direction=[False, True], output_type="latent", **MASKS[mask],
    ).images  # fmt: skip
    assert error(result.latents, wanted) <= 2e-5
    assert error(result.latents, pipeline.init_latents) > 0.1
