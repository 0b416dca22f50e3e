"""`LEdits`: load a checkpoint, invert a picture, edit it. The only file that knows all the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ledits_min.config import EditDefaults, ScheduleConfig
from ledits_min.edit import levels
from ledits_min.engine.beside import check_attention, edit_beside, source_row
from ledits_min.engine.networks import build_networks, resolve_device, resolve_dtype
from ledits_min.engine.ops import EditPlan
from ledits_min.engine.prepare import ImageLike, Prepared, encode_pictures, open_pictures, told_contexts
from ledits_min.engine.progress import Callback
from ledits_min.engine.request import Guidance, Start, check_noise, check_output_size, check_prompt, check_seeds
from ledits_min.engine.runner import Edited, Runner
from ledits_min.errors import InputError, check_number, check_whole
from ledits_min.files.configs import read_config
from ledits_min.files.inversion import Inversion, InversionSettings, check_settings
from ledits_min.files.picture import fit_size, lay_change, to_images
from ledits_min.inversion import draw_noise
from ledits_min.p2p import PromptToPrompt, check_prompts
from ledits_min.schedule import Schedule, make_schedule
from ledits_min.sega import Concept
from ledits_min.text import Context, TextEncoder, TextEncoderPair
from ledits_min.unet import UNet
from ledits_min.vae import VAE
from ledits_min.weights.embedding import EmbeddingSource
from ledits_min.weights.load import Checkpoint, load_checkpoint
from ledits_min.weights.lora import LoraSource


@dataclass(frozen=True)
class Result:
    """What an edit gives back.

    images   B PIL images, RGB
    latents  float32 (B, C, h, w), scaled, on the CPU
    masks    K float32 tensors (B, h, w) in [0, 1], on the CPU: the share of channels, and of the steps in which the
             concept acted, that its mask covered; zero for a concept that never acted
    trace    with trace=True one dict a step: t, alpha_bar, sigma, eps_rms {branch: value}, mask_fraction [K],
             gamma_rms, x_rms
    """

    images: list[Image.Image]
    latents: Tensor = field(repr=False)
    masks: list[Tensor] = field(repr=False)
    trace: list[dict[str, Any]] = field(default_factory=list, repr=False)


class LEdits:
    """A checkpoint ready to edit real pictures. Make one with `LEdits.from_pretrained`."""

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text: TextEncoder | TextEncoderPair,
        schedule: ScheduleConfig,
        defaults: EditDefaults,
        fingerprint: str,
        notes: Sequence[str] = (),
        embedded: bool = False,
    ) -> None:
        self.unet, self.vae, self.text, self.schedule = unet, vae, text, schedule
        self.defaults, self.fingerprint, self.notes, self.embedded = defaults, fingerprint, tuple(notes), embedded
        self.compiled = False  # whether torch.compile runs the UNet, which rounds differently
        self.runner = Runner(unet, vae, schedule.prediction_type, text.length)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tiny",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        prediction_type: str | None = None,
        lora: LoraSource | Sequence[LoraSource] = (),
        ema: bool = False,
        embedding: EmbeddingSource | Sequence[EmbeddingSource] = (),
        clip_skip: int | None = None,
        compile: bool = False,
    ) -> LEdits:
        """Load the embedded model ("tiny"), a .safetensors file, a diffusers folder, or an org/name[@revision] that is
        in the local Hugging Face cache. Never touches a network.

        device "auto" is CUDA where there is one; dtype "auto" is float16 there, bfloat16 on a CPU that computes in it,
        else float32. `vae`, `text_encoder` and `tokenizer` replace the checkpoint's own parts. `prediction_type` is
        "epsilon" ("eps") or "v_prediction" ("v"). `lora` holds paths or (path, scale) pairs, merged in that order.
        `ema` takes the averaged UNet of a single file that brings both. `embedding` holds textual inversions: paths or
        (path, word) pairs. `clip_skip` reads the text from an earlier layer, 1 being the last, as A1111 counts.
        `compile` runs the UNet through torch.compile: a minute or more for every batch size at first, faster then.
        InputError names anything that does not fit.
        """
        chosen_device = resolve_device(device)
        chosen_dtype = resolve_dtype(dtype, chosen_device)
        checkpoint = load_checkpoint(
            model, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, prediction_type=prediction_type,
            lora=lora, ema=ema, embedding=embedding, clip_skip=clip_skip, dtype=chosen_dtype,
        )  # fmt: skip
        ledits = cls.from_checkpoint(checkpoint, chosen_device, chosen_dtype, embedded=str(model) == "tiny")
        if compile:
            ledits.unet.compile(dynamic=False)  # a batch size at a time: the few there are come again and again
            ledits.compiled = True
        return ledits

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, embedded: bool = False
    ) -> LEdits:
        """Build the networks around a checkpoint's tensors, which they take over."""
        networks = build_networks(checkpoint, device, dtype)
        return cls(
            unet=networks.unet,
            vae=networks.vae,
            text=networks.text,
            schedule=checkpoint.schedule_config,
            defaults=read_config(EditDefaults, checkpoint.defaults, "ledits.json"),
            fingerprint=checkpoint.fingerprint,
            notes=checkpoint.notes,
            embedded=embedded,
        )

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def to(self, device: str | torch.device, dtype: str | torch.dtype | None = None) -> LEdits:
        """Move the networks; `dtype` as in `from_pretrained`, None: as it is. What a narrower one rounds stays rounded.

        Returns itself. InputError where there is no such device.
        """
        self._check_open()
        place = resolve_device(device)
        before, after = self.dtype, self.dtype if dtype is None else resolve_dtype(dtype, place)
        # An autoencoder that is kept wider than the UNet is so for a reason: SDXL's overflows float16.
        own = next(self.vae.parameters()).dtype
        self.unet.to(place, after)
        self.vae.to(place, after if own == before else own)
        self.text.to(place, after)
        return self

    def close(self) -> None:
        """Free the networks' memory, whoever still refers to them; the editor cannot be used any more."""
        for network in (self.unet, self.vae, self.text):
            network.to(torch.device("meta"))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> LEdits:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.device.type == "meta":
            raise InputError("this LEdits is closed; make another with LEdits.from_pretrained")

    @property
    def native_size(self) -> int:
        """The longer side, in pixels, that the model was trained at."""
        return self.unet.config.sample_size * self.vae.config.factor

    @torch.no_grad()
    def invert(
        self,
        image: ImageLike | Sequence[ImageLike],
        source: str = "",
        source_guidance_scale: float | None = None,
        num_steps: int | None = None,
        skip: int | None = None,
        eta: float = 1.0,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        size: int | tuple[int, int] | None = None,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> Inversion:
        """Find the noise maps that lead back to the picture: the first half of Algorithm 1.

        image   one picture or a list that shares one latent size: PIL image, path, or uint8 array (H, W, 3)
        skip    how many of the noisiest steps are left out; None: num_steps * 36 // 100
        eta     0 .. 1; 1 is DDPM
        seed    0 .. 2^63 - 1, one number or one an image
        noise   float32 (num_steps - skip, B, C, h, w), item i is n_t of timesteps[skip + i]; replaces the seed
        size    longer side in pixels, or (width, height); None: the model's native size for the longer side
        callback  called with a `Progress` after every call of the UNet; Stopped where it returns true
        """
        ready = self._prepare(image, source, source_guidance_scale, num_steps, skip, eta, seed, noise, size)
        settings, schedule = ready.settings, make_schedule(self.schedule, ready.settings.num_steps)
        contexts = self._contexts(["", source], ready.sizes, ready.x_0)
        x_T, residuals = self.runner.invert(
            contexts, ready.x_0, ready.noise, schedule, settings.skip, eta, source, settings.source_guidance_scale,
            progress, callback,
        )  # fmt: skip
        return ready.inversion(x_T, residuals)

    def _prepare(
        self,
        image: ImageLike | Sequence[ImageLike],
        source: str,
        source_guidance_scale: float | None,
        num_steps: int | None,
        skip: int | None,
        eta: float,
        seed: int | Sequence[int],
        noise: Tensor | None,
        size: int | tuple[int, int] | None,
    ) -> Prepared:
        """Everything that an inversion starts from, checked."""
        self._check_open()
        pictures = open_pictures(image)
        seeds = check_seeds(seed, len(pictures)) if noise is None else ()
        settings = self.inversion_settings(source, source_guidance_scale, num_steps, skip, eta, seeds)
        steps = settings.num_steps - settings.skip
        x_0 = encode_pictures(self.runner, pictures, size, self.native_size, self.embedded)
        if noise is None:
            noise = draw_noise(seeds, steps, tuple(x_0.shape[1:]))
        check_noise(noise, (steps, *x_0.shape))
        return Prepared(pictures, settings, x_0, noise.to(x_0))

    def inversion_settings(
        self,
        source: str = "",
        source_guidance_scale: float | None = None,
        num_steps: int | None = None,
        skip: int | None = None,
        eta: float = 1.0,
        seeds: tuple[int, ...] = (),
    ) -> InversionSettings:
        """What `invert` would note down, every default resolved; it refuses what `invert` refuses."""
        num_steps, skip = self._steps(num_steps, skip)
        scale = self.defaults.source_guidance_scale if source_guidance_scale is None else source_guidance_scale
        settings = InversionSettings(
            self.fingerprint, self.schedule, num_steps, skip, eta, check_prompt("source", source), scale, seeds
        )
        check_settings(settings, "invert")
        return settings

    @torch.no_grad()
    def edit(
        self,
        inversion: Inversion,
        target: str = "",
        guidance_scale: float | None = None,
        negative: str = "",
        concepts: Sequence[Concept] = (),
        momentum_scale: float = 0.0,
        momentum_beta: float = 0.6,
        progress: bool = True,
        trace: bool = False,
        output_size: str = "input",
        attention: PromptToPrompt | None = None,
        callback: Callback | None = None,
    ) -> Result:
        """Denoise the inverted picture again under a target prompt, concepts, or both: the second half of Algorithm 1.

        negative      replaces the empty prompt in eps_uncond
        concepts      what to add or remove, see `Concept`
        momentum_*    SEGA's momentum, 0 <= value < 1; off by default, since LEDITS has none
        output_size   "input": the change, laid over the original pixels at the original size;
                      "model": the model's own picture at the size it worked at
        attention     Prompt-to-Prompt: the attention maps of the inversion's source prompt, lent to the target
        callback      called with a `Progress` after every step; Stopped where it returns true
        """
        self._check_open()
        settings = inversion.settings
        if settings.fingerprint != self.fingerprint:
            raise InputError(
                "this inversion was made with another model, or with other parts or LoRAs; edit it with the same ones, "
                "or invert again"
            )
        check_settings(settings, "inversion")
        check_output_size(output_size)
        check_attention(attention)
        guidance = self._guidance(target, guidance_scale, negative, concepts, momentum_scale, momentum_beta)
        schedule = make_schedule(settings.schedule, settings.num_steps)
        start = Start(inversion.x_T, inversion.residuals, schedule, settings.skip, settings.eta)
        sizes = inversion.original_sizes
        if attention is None:
            edited = self._denoise("editing", start, guidance, sizes, progress, trace, callback)
        else:
            check_prompts(settings.source, target, negative)
            edited = self._denoise_beside(attention, start, guidance, settings, sizes, progress, trace, callback)
        return self._result(edited, inversion, guidance, output_size)

    @torch.no_grad()
    def invert_and_edit(
        self,
        image: ImageLike | Sequence[ImageLike],
        source: str = "",
        source_guidance_scale: float | None = None,
        num_steps: int | None = None,
        skip: int | None = None,
        eta: float = 1.0,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        size: int | tuple[int, int] | None = None,
        *,
        target: str = "",
        guidance_scale: float | None = None,
        negative: str = "",
        concepts: Sequence[Concept] = (),
        momentum_scale: float = 0.0,
        momentum_beta: float = 0.6,
        progress: bool = True,
        trace: bool = False,
        output_size: str = "input",
        attention: PromptToPrompt | None = None,
        callback: Callback | None = None,
    ) -> tuple[Inversion, Result]:
        """`invert` and `edit` for whoever edits a picture once: the same in fewer calls of the UNet.

        Arguments as there; `callback` is called after every step. Both share the UNet's calls, and what both would ask
        is asked once, as long as the edit retraces the inversion. Batches have other sizes than in two calls, which
        rounds differently. Prompt-to-Prompt, in its plain loop, shares nothing: with `attention` one runs after the
        other, and each calls back as it does alone.
        """
        check_output_size(output_size)
        check_attention(attention)
        guidance = self._guidance(target, guidance_scale, negative, concepts, momentum_scale, momentum_beta)
        if attention is not None:
            check_prompts(check_prompt("source", source), target, negative)
            inversion = self.invert(
                image, source, source_guidance_scale, num_steps, skip, eta, seed, noise, size, progress, callback
            )
            return inversion, self.edit(
                inversion, target, guidance_scale, negative, concepts, momentum_scale, momentum_beta,
                progress, trace, output_size, attention, callback,
            )  # fmt: skip
        ready = self._prepare(image, source, source_guidance_scale, num_steps, skip, eta, seed, noise, size)
        settings, schedule = ready.settings, make_schedule(self.schedule, ready.settings.num_steps)
        guidance.warn_of_idle(len(ready.noise), stacklevel=3)
        texts = ["", source, *guidance.texts]
        contexts = self._contexts(texts, ready.sizes, ready.x_0)
        plan = _edit_plan(guidance, schedule, settings.skip, eta)
        x_T, residuals, edited = self.runner.invert_and_edit(
            contexts, plan, ready.x_0, ready.noise, schedule, settings.skip, eta, source,
            settings.source_guidance_scale, progress, trace, callback,
        )  # fmt: skip
        inversion = ready.inversion(x_T, residuals)
        return inversion, self._result(edited, inversion, guidance, output_size)

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        *,
        concepts: Sequence[Concept] = (),
        negative: str = "",
        guidance_scale: float = 7.5,
        num_steps: int = 50,
        eta: float = 0.0,
        seed: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        momentum_scale: float = 0.0,
        momentum_beta: float = 0.6,
        progress: bool = True,
        trace: bool = False,
        callback: Callback | None = None,
    ) -> Result:
        """Make pictures from a prompt, with SEGA's concepts: what the guidance does where no real picture is involved.

        The same loop as an edit. It starts from noise at the first timestep, and its residuals sigma_t z_t are drawn
        instead of found by inversion (eta = 0, DDIM, has none). One picture a seed; `size` as in `invert`, square by
        default.
        """
        self._check_open()
        guidance = self._guidance(prompt, guidance_scale, negative, concepts, momentum_scale, momentum_beta)
        seeds = check_seeds(seed, len(seed) if isinstance(seed, list | tuple) else 1)
        check_whole("num_steps", num_steps, 1, self.schedule.num_train_timesteps // 2)
        check_number("eta", eta, 0.0, 1.0)
        factor = self.vae.config.factor
        width, height = fit_size((self.native_size, self.native_size), size, self.native_size, factor)
        shape = (self.unet.config.in_channels, height // factor, width // factor)
        schedule = make_schedule(self.schedule, num_steps)
        # Item 0 starts the trajectory, the others are z_t.
        noise = draw_noise(seeds, num_steps + 1, shape)
        residuals = schedule.sigmas(eta).float().view(-1, 1, 1, 1, 1) * noise[1:]
        start = Start(noise[0], residuals, schedule, 0, eta)
        edited = self._denoise("generating", start, guidance, [(width, height)], progress, trace, callback)
        return self._result(edited, None, guidance, "model")

    def _guidance(
        self,
        target: str,
        guidance_scale: float | None,
        negative: str,
        concepts: Sequence[Concept],
        momentum_scale: float,
        momentum_beta: float,
    ) -> Guidance:
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        return Guidance.of(target, scale, negative, concepts, momentum_scale, momentum_beta, self.defaults)

    def _denoise(
        self,
        phase: str,
        start: Start,
        guidance: Guidance,
        sizes: Sequence[tuple[int, int]],
        progress: bool,
        trace: bool,
        callback: Callback | None,
    ) -> Edited:
        guidance.warn_of_idle(len(start.residuals), stacklevel=4)
        contexts, start = self._contexts(guidance.texts, sizes, start.x_T), start.to(self.device)
        plan = _edit_plan(guidance, start.schedule, start.skip, start.eta)
        return self.runner.edit(phase, contexts, plan, start, progress, trace, callback)

    def _denoise_beside(
        self,
        attention: PromptToPrompt,
        start: Start,
        guidance: Guidance,
        settings: InversionSettings,
        sizes: Sequence[tuple[int, int]],
        progress: bool,
        trace: bool,
        callback: Callback | None,
    ) -> Edited:
        """`_denoise` with Prompt-to-Prompt's row for the source beside the edit."""
        guidance.warn_of_idle(len(start.residuals), stacklevel=4)
        texts = ["", settings.source, *guidance.texts]
        contexts, start = self._contexts(texts, sizes, start.x_T), start.to(self.device)
        row = source_row(
            attention, self.text, contexts, settings.source, settings.source_guidance_scale, guidance.target,
            settings.num_steps, start.x_T,
        )  # fmt: skip
        plan = _edit_plan(guidance, start.schedule, start.skip, start.eta)
        return edit_beside(row, self.runner, contexts, plan, start, progress, trace, callback)

    def _steps(self, num_steps: int | None, skip: int | None) -> tuple[int, int]:
        """The defaults' skip belongs to the defaults' step count; any other count gets the paper's 36 %."""
        check_whole("num_steps", num_steps, 1, self.schedule.num_train_timesteps // 2, optional=True)
        count = self.defaults.num_steps if num_steps is None else num_steps
        if skip is None:
            skip = self.defaults.skip if count == self.defaults.num_steps else count * 36 // 100
        check_whole(f"skip (with {count} steps)", skip, 0, count - 1)
        return count, skip

    def _contexts(self, texts: Sequence[str], sizes: Sequence[tuple[int, int]], latents: Tensor) -> dict[str, Context]:
        return told_contexts(self.text, self.unet.config, self.vae.config.factor, texts, sizes, latents)

    def _result(self, edited: Edited, inversion: Inversion | None, guidance: Guidance, output_size: str) -> Result:
        """Pictures, and a mask for concepts that are idle too; without an inversion at the model's own size."""
        latents, covered, trace = edited
        found = iter(covered)
        nothing = torch.zeros_like(latents[:, 0]).cpu()
        masks = [nothing if term.is_noop(base=guidance.negative) else next(found) for term in guidance.terms]
        after = self.runner.decode(latents)
        if inversion is None or output_size == "model":
            images = to_images(after)
        else:
            before = self.runner.decode(inversion.latents.to(self.device))
            originals = [Image.fromarray(original.numpy()) for original in inversion.originals]
            images = [lay_change(*pair) for pair in zip(originals, before, after, strict=True)]
        return Result(images, latents.cpu(), masks, trace)


def _edit_plan(guidance: Guidance, schedule: Schedule, skip: int, eta: float) -> EditPlan:
    sigmas = schedule.sigmas(eta)
    table = [levels(schedule, sigmas, step) for step in range(skip, schedule.num_steps)]
    return EditPlan(
        table, guidance.live, guidance.target, guidance.guidance_scale, guidance.negative,
        guidance.momentum_scale, guidance.momentum_beta,
    )  # fmt: skip
