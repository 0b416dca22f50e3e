"""The whole edit of SD 2.x and SDXL, eps and v, in both dialects, against a float64 loop on diffusers' modules.

The loop is written from the papers' equations and shares no line with ledits_min; only the picture is read with it.
diffusers and transformers read the folder by themselves. The single file holds the same random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
from transformers.models.clip import CLIPTextModel

from ledits_min import Concept, Inversion, LEdits, PromptToPrompt
from ledits_min.config import MASKS, ScheduleConfig
from ledits_min.files.picture import to_tensor
from ledits_min.weights.clip_bpe import clip_merges, clip_vocabulary
from ledits_min.weights.load import fetch
from ledits_min.weights.read.survey import check_complete, survey_file

Error = Callable[[Tensor, Tensor], float]

STEPS, SKIP, ETA = 9, 2, 0.8
SOURCE, TARGET, NEGATIVE = "a cat", "a dog!", ""
SOURCE_SCALE, TARGET_SCALE = 2.5, 4.0
CONCEPTS = (
    Concept("sunglasses", guidance_scale=3.0, threshold=0.8, warmup_steps=1),
    Concept("hat", guidance_scale=2.0, threshold=0.6, warmup_steps=2, reverse=True),
)
OWN_SIZE, WORKED_AT = (100, 75), (64, 48)
CASES = [("SD 2.x", "epsilon"), ("SD 2.x", "v_prediction"), ("SDXL", "epsilon"), ("SDXL", "v_prediction")]


def picture() -> Image.Image:
    rows, columns = np.mgrid[0 : OWN_SIZE[1], 0 : OWN_SIZE[0]]
    channels = [np.sin(columns / 9.0), np.cos(rows / 7.0), np.sin((rows + columns) / 11.0)]
    return Image.fromarray(((np.stack(channels, axis=-1) + 1.0) * 127.5).astype(np.uint8))


def our_model(checkpoints: ModuleType, place: Path, family: str, prediction_type: str, dialect: str) -> LEdits:
    if dialect == "folder":
        return LEdits.from_pretrained(place / "model", device="cpu", dtype="float32")
    path = place / "x.safetensors"
    checkpoints.write_family_ldm(path, family, metadata={"modelspec.prediction_type": prediction_type})
    # A single file brings no configs, and the reduced ones are nobody's: the door itself takes published sizes only.
    survey = survey_file(path, configs=checkpoints.REDUCED[family])
    check_complete(survey)
    return LEdits.from_checkpoint(fetch(survey), torch.device("cpu"), torch.float32)


class Reference:
    """LEDITS and SEGA on diffusers' and transformers' own classes in float64."""

    def __init__(self, folder: Path, prediction_type: str) -> None:
        here: dict[str, Any] = {"local_files_only": True, "torch_dtype": torch.float64}
        self.prediction_type = prediction_type
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", **here).eval()
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", **here).eval()
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder", **here).eval()
        self.text_2 = None
        if (folder / "text_encoder_2").is_dir():
            self.text_2 = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **here).eval()
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        self.scheduler.set_timesteps(STEPS)
        self.timesteps = [int(t) for t in self.scheduler.timesteps][SKIP:]

    @staticmethod
    def ids(text: str, pad: str) -> Tensor:
        merges: Any = list(clip_merges())
        words: Any = clip_vocabulary()
        tokenizer = CLIPTokenizer(vocab=words, merges=merges, model_max_length=77, pad_token=pad)
        ids: Tensor = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids

    def told(self, text: str) -> dict[str, Any]:
        """What the UNet is told of a text, as keywords of its forward."""
        if self.text_2 is None:
            return {"encoder_hidden_states": self.text(self.ids(text, "!")).last_hidden_state}
        one = self.text(self.ids(text, "<|endoftext|>"), output_hidden_states=True).hidden_states[-2]
        two = self.text_2(self.ids(text, "!"), output_hidden_states=True)
        tokens, pooled = torch.cat([one, two.hidden_states[-2]], dim=-1), two.text_embeds
        if not text:
            tokens, pooled = torch.zeros_like(tokens), torch.zeros_like(pooled)
        (own_width, own_height), (width, height) = OWN_SIZE, WORKED_AT
        sizes = torch.tensor([[own_height, own_width, 0, 0, height, width]])
        return {"encoder_hidden_states": tokens, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}

    def eps(self, x: Tensor, t: int, text: str) -> Tensor:
        output: Tensor = self.unet(x, t, **self.told(text)).sample
        if self.prediction_type == "v_prediction":
            alpha_bar = float(self.scheduler.alphas_cumprod[t])
            return alpha_bar**0.5 * output + (1 - alpha_bar) ** 0.5 * x
        return output

    def mean(self, x: Tensor, t: int, eps: Tensor) -> Tensor:
        sample: Tensor = self.scheduler.step(eps, t, x, eta=ETA, variance_noise=torch.zeros_like(x)).prev_sample
        return sample

    def edit(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        x_0 = self.vae.encode(image).latent_dist.mode() * self.vae.config.scaling_factor
        xs = [
            self.scheduler.add_noise(x_0, n, torch.tensor([t])) for t, n in zip(self.timesteps, noise, strict=True)
        ] + [x_0]
        x = xs[0]
        for i, t in enumerate(self.timesteps):
            empty = self.eps(xs[i], t, "")
            eps = empty + SOURCE_SCALE * (self.eps(xs[i], t, SOURCE) - empty)
            residual = xs[i + 1] - self.mean(xs[i], t, eps)
            uncond = self.eps(x, t, NEGATIVE)
            gamma = torch.stack([torch.zeros_like(x), *(self.term(x, t, i, c, uncond) for c in CONCEPTS)]).sum(0)
            guided = uncond + TARGET_SCALE * (self.eps(x, t, TARGET) - uncond) + gamma
            x = self.mean(x, t, guided) + residual
        return x, self.vae.decode(x / self.vae.config.scaling_factor).sample

    def term(self, x: Tensor, t: int, step: int, concept: Concept, uncond: Tensor) -> Tensor:
        assert concept.guidance_scale is not None and concept.threshold is not None
        if step < (concept.warmup_steps or 0):
            return torch.zeros_like(x)
        psi = (
            concept.guidance_scale * (self.eps(x, t, concept.text) - uncond) * (-1 if concept.reverse else 1)
        ).numpy()
        for channel in psi[0]:
            channel[np.abs(channel) < np.quantile(np.abs(channel), concept.threshold)] = 0.0
        return torch.from_numpy(psi)


@pytest.mark.parametrize("dialect", ["folder", "ldm"])
@pytest.mark.parametrize(("family", "prediction_type"), CASES)
@torch.no_grad()
def test_whole_edit(
    checkpoints: ModuleType, tmp_path: Path, error: Error, family: str, prediction_type: str, dialect: str
) -> None:
    schedule = ScheduleConfig(prediction_type=prediction_type)
    checkpoints.write_family_folder(tmp_path / "model", family, schedule)
    ledits = our_model(checkpoints, tmp_path, family, prediction_type, dialect)
    noise = torch.randn(STEPS - SKIP, 1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    begin: dict[str, Any] = {"num_steps": STEPS, "skip": SKIP, "eta": ETA, "noise": noise, "progress": False}
    inversion = ledits.invert(picture(), SOURCE, SOURCE_SCALE, **begin)
    result = ledits.edit(inversion, TARGET, TARGET_SCALE, NEGATIVE, CONCEPTS, progress=False, output_size="model")
    _, in_one_pass = ledits.invert_and_edit(
        picture(), SOURCE, SOURCE_SCALE, **begin, target=TARGET, guidance_scale=TARGET_SCALE, negative=NEGATIVE,
        concepts=CONCEPTS, output_size="model",
    )  # fmt: skip

    image = to_tensor([picture()], WORKED_AT).double()
    latents, decoded = Reference(tmp_path / "model", prediction_type).edit(image, noise.double())
    assert result.latents.shape == latents.shape and result.images[0].size == WORKED_AT
    assert error(result.latents, latents) <= 1e-3
    assert error(in_one_pass.latents, latents) <= 1e-3
    pixels = torch.from_numpy(np.array(result.images[0])).permute(2, 0, 1)
    wanted = ((decoded[0].clamp(-1.0, 1.0) + 1.0) * 127.5).round()
    assert (pixels - wanted).abs().max() <= 1


@torch.no_grad()
def test_sdxl_is_told_the_pictures_own_size(checkpoints: ModuleType, tmp_path: Path, error: Error) -> None:
    """Were the sizes left out on both sides above, agreement would prove nothing."""
    checkpoints.write_family_folder(tmp_path / "model", "SDXL")
    ledits = LEdits.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    quick: dict[str, Any] = {"source": SOURCE, "num_steps": 4, "skip": 0, "progress": False, "size": WORKED_AT}
    inversion = ledits.invert(picture(), **quick)
    other = replace(inversion, originals=(torch.zeros(48, 64, 3, dtype=torch.uint8),))
    edits = [ledits.edit(each, TARGET, progress=False, output_size="model").latents for each in (inversion, other)]
    assert error(edits[1], edits[0]) > 1e-3


@pytest.mark.parametrize("attention", [None, PromptToPrompt()])
def test_sdxl_is_told_each_pictures_own_size_in_a_batch(
    checkpoints: ModuleType, tmp_path: Path, error: Error, attention: PromptToPrompt | None
) -> None:
    checkpoints.write_family_folder(tmp_path / "model", "SDXL")
    ledits = LEdits.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    pictures = [picture(), picture().resize(WORKED_AT), picture().resize((200, 50))]
    quick: dict[str, Any] = {"source": SOURCE, "num_steps": 4, "skip": 0, "progress": False, "size": WORKED_AT}
    wish: dict[str, Any] = {"target": TARGET, "attention": attention, "progress": False, "output_size": "model"}
    batch = ledits.invert(pictures, seed=[3, 4, 3], **quick)
    together = ledits.edit(batch, **wish).latents
    for i, (each, seed) in enumerate(zip(pictures, [3, 4, 3], strict=True)):
        alone = ledits.invert(each, seed=seed, **quick)
        assert error(batch.residuals[:, i], alone.residuals[:, 0]) < 1e-5
        assert error(together[i], ledits.edit(alone, **wish).latents[0]) < 1e-4
    _, at_once = ledits.invert_and_edit(pictures, seed=[3, 4, 3], **{**quick, **wish})
    assert error(at_once.latents, together) < 1e-4
    others = replace(batch, originals=batch.originals[:1] * 3)
    assert error(ledits.edit(others, **wish).latents[2], together[2]) > 1e-3, "the sizes do nothing"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_autoencoder_of_sdxl_stays_float32(checkpoints: ModuleType, tmp_path: Path, dtype: str) -> None:
    for family, wanted in (("SDXL", torch.float32), ("SD 2.x", getattr(torch, dtype))):
        folder = tmp_path / family
        checkpoints.write_family_folder(folder, family)
        ledits = LEdits.from_pretrained(folder, device="cpu", dtype=dtype)
        assert ledits.dtype == getattr(torch, dtype) and ledits.vae.quant_conv.weight.dtype == wanted
        inversion = ledits.invert(picture(), SOURCE, num_steps=3, skip=0, progress=False)
        assert ledits.edit(inversion, TARGET, progress=False).latents.isfinite().all()


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("family", "prediction_type"), CASES)
def test_what_is_not_edited_comes_back(
    checkpoints: ModuleType, tmp_path: Path, family: str, prediction_type: str, order: int, engine: str
) -> None:
    """Every residual is kept, also the last ones, whichever masks are cut: the concepts have next to no strength.

    Random weights amplify rounding, so the error is compared with the largest of what was added up.
    """
    checkpoints.write_family_folder(tmp_path / "model", family, ScheduleConfig(prediction_type=prediction_type))
    (tmp_path / "model/ledits.json").write_text('{"attention_level": 1}')
    ledits = LEdits.from_pretrained(tmp_path / "model", device="cpu", dtype="float32", engine=engine)
    pictures = [picture(), picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    inversion = ledits.invert(
        pictures, SOURCE, SOURCE_SCALE, num_steps=6, skip=0, seed=[0, 1], solver_order=order, progress=False
    )
    concepts = [Concept("sunglasses", 1e-30, 0.8, 0, mask=mask) for mask in MASKS]

    def apart(inversion: Inversion) -> float:
        result = ledits.edit(inversion, SOURCE, SOURCE_SCALE, concepts=concepts, progress=False)
        assert all(mask.mean() > 0.01 for mask in result.masks)
        return float((result.latents - inversion.latents).abs().max() / inversion.residuals.abs().max())

    assert apart(inversion) < 5e-4
    without = inversion.residuals.clone()
    without[-1] = 0.0
    assert apart(replace(inversion, residuals=without)) > 5e-3


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("family", "prediction_type"), CASES)
def test_local_blend(
    checkpoints: ModuleType, tmp_path: Path, error: Error, family: str, prediction_type: str, order: int
) -> None:
    """Both engines do the same, and what no threshold lets through comes back as it was."""
    checkpoints.write_family_folder(tmp_path / "model", family, ScheduleConfig(prediction_type=prediction_type))
    (tmp_path / "model/ledits.json").write_text('{"attention_level": 1}')
    pictures = [picture(), picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    quick: dict[str, Any] = {"source": SOURCE, "num_steps": 5, "skip": 1, "seed": [0, 1], "solver_order": order}
    found: dict[str, list[Tensor]] = {}
    for engine in ("fast", "plain"):
        ledits = LEdits.from_pretrained(tmp_path / "model", device="cpu", dtype="float32", engine=engine)
        inversion = ledits.invert(pictures, **quick, progress=False)
        found[engine] = [
            ledits.edit(inversion, TARGET, TARGET_SCALE, attention=attention, progress=False).latents
            for attention in (
                PromptToPrompt(blend=("cat", "dog"), blend_threshold=0.9),
                PromptToPrompt(),
                PromptToPrompt(blend="cat", blend_threshold=1.0),
            )
        ]
        blended, free, nowhere = found[engine]
        assert error(nowhere, inversion.latents) < 2e-3  # random weights amplify rounding: no edit at all has 4e-4
        assert error(blended, free) > 0.1 and error(blended, inversion.latents) > 0.1
    for one, other, bound in zip(found["fast"], found["plain"], (1e-4, 1e-4, 2e-3), strict=True):
        assert error(one, other) < bound


def test_generate_and_prompt_to_prompt_run_on_sdxl(checkpoints: ModuleType, tmp_path: Path) -> None:
    checkpoints.write_family_folder(tmp_path / "model", "SDXL")
    ledits = LEdits.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    assert ledits.generate("a cat", num_steps=2, seed=[0, 1], progress=False).images[1].size == (64, 64)
    inversion = ledits.invert(picture(), "a cat", num_steps=3, skip=0, progress=False)
    result = ledits.edit(inversion, "a dog", attention=PromptToPrompt(), progress=False)
    assert result.latents.isfinite().all()
