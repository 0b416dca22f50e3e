"""`LEdits`: load a checkpoint, invert a picture, edit it. The only file that knows all the parts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ledits_min import edit as algorithm
from ledits_min import p2p
from ledits_min.archive import Inversion, InversionSettings, check_settings
from ledits_min.config import EditDefaults, InputError, RunError, ScheduleConfig, check_number, check_whole
from ledits_min.image import fit_size, lay_change, open_image, to_images, to_tensor
from ledits_min.inversion import draw_noise, eps_from_v
from ledits_min.networks import build_networks, resolve_device, resolve_dtype
from ledits_min.ops import EditPlan
from ledits_min.progress import Callback, Progress, progress_bar, tell
from ledits_min.record import Recorder
from ledits_min.request import Guidance, Start, check_noise, check_prompt, check_seeds
from ledits_min.runner import Runner
from ledits_min.schedule import Schedule, make_schedule
from ledits_min.sega import Concept
from ledits_min.text import Context, TextEncoder, TextEncoderPair
from ledits_min.unet import AttentionControl, UNet, sinusoids
from ledits_min.vae import VAE
from ledits_min.weights.load import Checkpoint, load_checkpoint
from ledits_min.weights.lora import LoraSource

ImageLike = Image.Image | str | Path | np.ndarray[Any, Any]

EMBEDDED_MIN_PSNR = 25.0  # below it a picture is outside what the embedded model's VAE has learned


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
    latents: Tensor
    masks: list[Tensor]
    trace: list[dict[str, Any]] = field(default_factory=list)


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
        compile: bool = False,
    ) -> LEdits:
        """Load the embedded model ("tiny"), a .safetensors file, a diffusers folder, or an org/name[@revision] that is
        in the local Hugging Face cache. Never touches a network.

        device "auto" is CUDA where there is one; dtype "auto" is float16 there, bfloat16 on a CPU that computes in it,
        else float32. `vae`, `text_encoder` and `tokenizer` replace the checkpoint's own parts. `prediction_type` is
        "epsilon" ("eps") or "v_prediction" ("v"). `lora` holds paths or (path, scale) pairs, merged in that order.
        `ema` takes the averaged UNet of a single file that brings both. `compile` runs the UNet through torch.compile:
        a minute or more for every batch size at first, faster then. InputError names anything that does not fit.
        """
        chosen_device = resolve_device(device)
        chosen_dtype = resolve_dtype(dtype, chosen_device)
        checkpoint = load_checkpoint(
            model, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, prediction_type=prediction_type,
            lora=lora, ema=ema, dtype=chosen_dtype,
        )  # fmt: skip
        ledits = cls.from_checkpoint(checkpoint, chosen_device, chosen_dtype, embedded=str(model) == "tiny")
        if compile:
            ledits.unet.compile(dynamic=False)  # a batch size at a time: the few there are come again and again
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
            defaults=EditDefaults.from_json(checkpoint.defaults, "ledits.json"),
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
        self._check_open()
        pictures = self._open(image)
        seeds = check_seeds(seed, len(pictures)) if noise is None else ()
        settings = self.inversion_settings(source, source_guidance_scale, num_steps, skip, eta, seeds)
        num_steps, skip, scale = settings.num_steps, settings.skip, settings.source_guidance_scale
        schedule = make_schedule(self.schedule, num_steps)
        x_0 = self._encode(pictures, size)
        contexts = self._contexts(["", source], [picture.size for picture in pictures], x_0)
        if noise is None:
            noise = draw_noise(seeds, num_steps - skip, tuple(x_0.shape[1:]))
        check_noise(noise, (num_steps - skip, *x_0.shape))
        x_T, residuals = self.runner.invert(
            contexts, x_0, noise.to(x_0), schedule, skip, eta, source, scale, progress, callback
        )  # fmt: skip
        originals = tuple(torch.from_numpy(np.array(picture)) for picture in pictures)
        return Inversion(x_T.cpu(), residuals.cpu(), x_0.cpu(), originals, settings)

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
        attention: p2p.PromptToPrompt | None = None,
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
        if output_size not in ("input", "model"):
            raise InputError(f"output_size is {output_size!r}; 'input' or 'model' is wanted")
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        guidance = Guidance.of(target, scale, negative, concepts, momentum_scale, momentum_beta, self.defaults)
        schedule = make_schedule(settings.schedule, settings.num_steps)
        start = Start(inversion.x_T, inversion.residuals, schedule, settings.skip, settings.eta)
        sizes = inversion.original_sizes
        row = None if attention is None else self._source_row(attention, inversion, target, negative)
        latents, masks, steps = self._denoise("editing", start, guidance, sizes, row, progress, trace, callback)
        return Result(self._pictures(inversion, latents, output_size), latents.cpu(), masks, steps)

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
        guidance = Guidance.of(
            prompt, guidance_scale, negative, concepts, momentum_scale, momentum_beta, self.defaults
        )  # fmt: skip
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
        latents, masks, steps = self._denoise(
            "generating", start, guidance, [(width, height)], None, progress, trace, callback
        )  # fmt: skip
        return Result(to_images(self.runner.decode(latents)), latents.cpu(), masks, steps)

    def _denoise(
        self,
        phase: str,
        start: Start,
        guidance: Guidance,
        sizes: Sequence[tuple[int, int]],
        row: p2p.SourceRow | None,
        progress: bool,
        trace: bool,
        callback: Callback | None,
    ) -> tuple[Tensor, list[Tensor], list[dict[str, Any]]]:
        """The latents on the device, one mask a concept, and the trace; RunError for a result that is not finite."""
        guidance.warn_of_idle(len(start.residuals), stacklevel=3)
        contexts = self._contexts(guidance.texts, sizes, start.x_T)
        start = replace(start, x_T=start.x_T.to(self.device), residuals=start.residuals.to(self.device))
        if row is None:
            schedule, sigmas = start.schedule, start.schedule.sigmas(start.eta)
            levels = [algorithm.levels(schedule, sigmas, step) for step in range(start.skip, schedule.num_steps)]
            plan = EditPlan(
                levels, guidance.live, guidance.target, guidance.guidance_scale, guidance.negative,
                guidance.momentum_scale, guidance.momentum_beta,
            )  # fmt: skip
            latents, covered, steps = self.runner.edit(
                phase, contexts, plan, start.x_T, start.residuals, schedule, start.skip, start.eta,
                progress, trace, callback,
            )  # fmt: skip
        else:
            latents, covered, steps = self._denoise_beside(
                row, phase, start, guidance, contexts, progress, trace, callback
            )  # fmt: skip
        found = iter(covered)
        nothing = torch.zeros_like(start.x_T[:, 0]).cpu()
        masks = [nothing if term.is_noop(base=guidance.negative) else next(found) for term in guidance.terms]
        return latents, masks, steps

    def _denoise_beside(
        self,
        row: p2p.SourceRow,
        phase: str,
        start: Start,
        guidance: Guidance,
        contexts: dict[str, Context],
        progress: bool,
        trace: bool,
        callback: Callback | None,
    ) -> tuple[Tensor, list[Tensor], list[dict[str, Any]]]:
        """`_denoise` with Prompt-to-Prompt's source row beside the edit, in the plain loop."""
        schedule, total = start.schedule, len(start.residuals)
        recorder = Recorder(guidance.live, guidance.negative, guidance.target, schedule, start.skip, start.eta, trace)
        with progress_bar(phase, total, "step", progress) as bar, self.runner.memory_named(phase, start.x_T):

            def on_step(step: algorithm.Step) -> None:
                recorder.record(step)
                bar.update()
                entry = recorder.trace[-1] if trace else None
                tell(callback, Progress(phase, step.index + 1, total, step.x_prev.clone(), entry))

            latents = p2p.edit(
                self._eps_model(schedule), contexts, start.x_T, start.residuals, schedule, start.skip, start.eta,
                guidance.target, guidance.guidance_scale, guidance.negative, guidance.live,
                guidance.momentum_scale, guidance.momentum_beta, on_step, row=row,
            )  # fmt: skip
        _refuse_non_finite(torch.stack(recorder.finite), schedule, start.skip, phase)
        return latents, recorder.masks(start.x_T), recorder.trace

    def _steps(self, num_steps: int | None, skip: int | None) -> tuple[int, int]:
        """The defaults' skip belongs to the defaults' step count; any other count gets the paper's 36 %."""
        check_whole("num_steps", num_steps, 1, self.schedule.num_train_timesteps // 2, optional=True)
        count = self.defaults.num_steps if num_steps is None else num_steps
        if skip is None:
            skip = self.defaults.skip if count == self.defaults.num_steps else count * 36 // 100
        check_whole(f"skip (with {count} steps)", skip, 0, count - 1)
        return count, skip

    def _open(self, image: ImageLike | Sequence[ImageLike]) -> list[Image.Image]:
        notices: list[str] = []
        sources = list(image) if isinstance(image, list | tuple) else [image]
        if not sources:
            raise InputError("no image was given; pass one picture or a list of at least one")
        pictures = [open_image(source, notices=notices) for source in sources]  # type: ignore[arg-type]
        for notice in notices:
            warnings.warn(notice, stacklevel=4)
        return pictures

    def _encode(self, pictures: list[Image.Image], size: int | tuple[int, int] | None) -> Tensor:
        """Scaled latents of all pictures, float32 (B, C, h, w) on the device."""
        sizes = {fit_size(picture.size, size, self.native_size, self.vae.config.factor) for picture in pictures}
        if len(sizes) > 1:
            listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
            raise InputError(f"the pictures would have different sizes ({listed}); pass size=(width, height)")
        tensor = to_tensor(pictures, sizes.pop()).to(self.device)
        x_0 = self.runner.encode(tensor)
        if self.embedded:
            error = (self.runner.decode(x_0).clamp(-1.0, 1.0) - tensor).square().mean(dim=(1, 2, 3)).max()
            psnr = 10.0 * float(torch.log10(4.0 / error))
            if psnr < EMBEDDED_MIN_PSNR:
                warnings.warn(
                    f"the embedded model was trained on drawn portraits and cannot even copy this picture well "
                    f"({psnr:.0f} dB); for photographs pass a Stable Diffusion checkpoint with --model",
                    stacklevel=4,
                )
        return x_0

    def _contexts(
        self, texts: Sequence[str], sizes: Sequence[tuple[int, int]], latents: Tensor
    ) -> dict[str, Context]:
        """What the UNet is told of each text; SDXL's is told the sizes too, a row an image where they differ.

        added = [pooled text, waves of (H, W of the original; 0, 0: nothing cropped; H, W worked at)]
        [2307.01952, section 2.2]; `sizes` (width, height) are those of the pictures' own pixels.
        """
        # One prompt a call: a prompt's embedding must not depend, to the last bit, on its neighbours.
        contexts = {text: self.text.encode([text]) for text in dict.fromkeys(texts)}
        waves = self.unet.config.addition_time_embed_dim
        if not waves:
            return contexts
        worked_at = [side * self.vae.config.factor for side in latents.shape[-2:]]
        told = sizes[:1] if len(set(sizes)) == 1 else sizes
        numbers = torch.tensor([[height, width, 0, 0, *worked_at] for width, height in told], device=self.device)
        features = sinusoids(numbers, waves).flatten(1)
        return {text: context.told(features) for text, context in contexts.items()}

    def _source_row(
        self, attention: p2p.PromptToPrompt, inversion: Inversion, target: str, negative: str
    ) -> p2p.SourceRow:
        """The row that Prompt-to-Prompt predicts beside the edit's; InputError where there is no such pair."""
        if not isinstance(attention, p2p.PromptToPrompt):
            raise InputError(f"attention is {type(attention).__name__}; PromptToPrompt() or None is wanted")
        settings, batch = inversion.settings, len(inversion.x_T)
        p2p.check_prompts(settings.source, target, negative)
        contexts = self._contexts(["", settings.source, target], inversion.original_sizes, inversion.x_T)
        both = [contexts[settings.source], contexts[target]]
        tokens = torch.cat([context.tokens for context in both])
        added = [context.added for context in both if context.added is not None]
        control = attention.control(
            self.text.words(settings.source), self.text.words(target), tokens.shape[1],
            settings.num_steps, inversion.x_T.to(self.device),
        )  # fmt: skip
        both_rows = Context(
            tokens.repeat_interleave(batch, dim=0),
            torch.cat([rows.expand(batch, -1) for rows in added]) if added else None,
        )
        return p2p.SourceRow(settings.source, settings.source_guidance_scale, contexts[""], both_rows, control)

    def _eps_model(self, schedule: Schedule) -> p2p.ControlledEpsModel:
        """The UNet as the maths sees it: it predicts eps, in float32, for one text and a batch of latents."""
        alphas_cumprod = schedule.alphas_cumprod.to(self.device, torch.float32)

        def eps_model(x_t: Tensor, t: Tensor, context: Context, attention: AttentionControl | None = None) -> Tensor:
            batch = len(x_t)
            added = None if context.added is None else context.added.expand(batch, -1)
            prediction: Tensor = self.unet(x_t, t, context.tokens.expand(batch, -1, -1), added, attention)
            if self.schedule.prediction_type == "v_prediction":
                return eps_from_v(prediction, x_t, alphas_cumprod[t].view(-1, 1, 1, 1))
            return prediction

        return eps_model

    def _pictures(self, inversion: Inversion, latents: Tensor, output_size: str) -> list[Image.Image]:
        after = self.runner.decode(latents)
        if output_size == "model":
            return to_images(after)
        before = self.runner.decode(inversion.latents.to(self.device))
        originals = [Image.fromarray(original.numpy()) for original in inversion.originals]
        return [lay_change(*pair) for pair in zip(originals, before, after, strict=True)]


def _refuse_non_finite(finite: Tensor, schedule: Schedule, skip: int, phase: str) -> None:
    """RunError that names the first step whose result was not finite."""
    bad = (~finite).nonzero()
    if len(bad):
        index = int(bad[0])
        t = int(schedule.timesteps[skip + index])
        raise RunError(f"{phase}: values that are not finite at step {index} (t = {t}); try --dtype float32")
