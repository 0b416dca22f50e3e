"""`LEdits`: load a checkpoint, invert a picture, edit it. The only file that knows all the parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ledits_min.config import EditDefaults, ScheduleConfig
from ledits_min.engine.ahead import Ahead
from ledits_min.engine.maps import check_attends, check_masks
from ledits_min.engine.networks import build_networks, resolve_device, resolve_dtype
from ledits_min.engine.ops import kernel_calls
from ledits_min.engine.plain import PlainRunner
from ledits_min.engine.presets import preset_defaults
from ledits_min.engine.progress import Callback, Reporting
from ledits_min.engine.record import Edited
from ledits_min.engine.request import (
    PromptToPrompt,
    Start,
    check_attention,
    check_call,
    check_noise,
    check_prompt,
    check_prompts,
    check_seeds,
    edit_settings,
    edit_texts,
    named_tokens,
    warn_of_idle,
)
from ledits_min.engine.runner import Runner
from ledits_min.engine.usage import Usage, running
from ledits_min.errors import InputError, check_choice, check_number, check_whole, warn
from ledits_min.files.configs import read_config
from ledits_min.files.frame import Frame, Framing
from ledits_min.files.inversion import Inversion, check_inversion, check_inversion_settings
from ledits_min.files.opening import ImageLike, open_pictures
from ledits_min.files.picture import lay_change, to_images
from ledits_min.files.region import MaskLike, Plane, open_masks
from ledits_min.files.result import Result
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings, draw_noise
from ledits_min.p2p import Lending, LocalBlend
from ledits_min.sega import Concept
from ledits_min.text import Context, TextEncoder, TextEncoderPair
from ledits_min.unet import UNet, sinusoids
from ledits_min.vae import VAE
from ledits_min.weights.embedding import EmbeddingSource
from ledits_min.weights.load import Checkpoint, load_checkpoint
from ledits_min.weights.lora import LoraSource

RUNNERS = {"fast": Runner, "plain": PlainRunner}
EMBEDDED_MIN_PSNR = 25.0  # below it a picture is outside what the embedded model's VAE has learned


class LEdits:
    """A checkpoint ready to edit real pictures. Make one with `LEdits.from_pretrained`.

    ImageLike  what a picture may be: a path, a PIL image, or a uint8 array (H, W, 3)
    Callback   a function that takes a `Progress` and may return a true value to stop the run, which then raises
               `Stopped`; whatever it raises itself ends the run, too
    Every refusal is an `InputError` (a ValueError) of one line; Ctrl-C ends a run between two calls of the UNet.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text: TextEncoder | TextEncoderPair,
        schedule: ScheduleConfig,
        defaults: EditDefaults,
        fingerprint: str,
        notes: Sequence[str] = (),
        name: str = "",
        engine: str = "fast",
    ) -> None:
        self.unet, self.vae, self.text, self.schedule = unet, vae, text, schedule
        self.defaults, self.fingerprint, self.notes = defaults, fingerprint, tuple(notes)
        self.name, self.embedded = name, name == "tiny"
        self.runner = RUNNERS[engine](unet, vae, schedule.prediction_type, text.length)

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
        insist: bool = False,
        compile: bool = False,
        engine: str = "fast",
        preset: str | None = None,
    ) -> LEdits:
        """Load a checkpoint. Never touches a network.

        model            the embedded model ("tiny"), a .safetensors file, a diffusers folder, or an org/name[@revision]
                         that is in the local Hugging Face cache
        device           "auto": CUDA where there is one, else the CPU; "cpu", "cuda", "cuda:1", or a torch.device
        dtype            "auto": float16 on CUDA, bfloat16 on a CPU that computes in it, else float32; "float32",
                         "bfloat16", "float16", or a torch.dtype; "tf32" is float32 whose products a CUDA device may
                         round to 10 bits, several times as fast
        vae, text_encoder, tokenizer    files or folders that replace the checkpoint's own part; None: its own
        prediction_type  "epsilon" ("eps") or "v_prediction" ("v"); None: what the checkpoint says
        lora             a path or (path, scale), or a list of them, merged in that order
        ema              take the averaged UNet of a single file that brings both
        embedding        textual inversions: a path or (path, word), or a list of them
        clip_skip        the text encoder's layer that is read, 1 being the last, as A1111 counts; None: the model's
        insist           load a checkpoint that would be refused for a name in it, where its tensors are sound
        compile          run the UNet through torch.compile: a minute or more per batch size at first, faster then
        engine           "fast", or "plain": the loops of `edit.py` through the plain networks, one evaluation after the
                         other, the reference that "fast" is tested against
        preset           as in `with_preset`
        InputError names anything that does not fit.
        """
        check_choice("engine", engine, RUNNERS)
        chosen_device = resolve_device(device)
        chosen_dtype = resolve_dtype(dtype, chosen_device)
        checkpoint = load_checkpoint(
            model, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, prediction_type=prediction_type,
            lora=lora, ema=ema, embedding=embedding, clip_skip=clip_skip, insist=insist, dtype=chosen_dtype,
        )  # fmt: skip
        ahead = Ahead(_kernel_calls(checkpoint, chosen_device, chosen_dtype) if engine == "fast" else [])
        ledits = cls.from_checkpoint(checkpoint, chosen_device, chosen_dtype, str(model), engine)
        ledits.runner.ahead = ahead
        ledits.runner.tf32 = dtype == "tf32"
        if compile:
            ledits.unet.compile(dynamic=False)  # a batch size at a time: the few there are come again and again
            ledits.runner.compiled = True
        return ledits.with_preset(preset)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        name: str = "",
        engine: str = "fast",
    ) -> LEdits:
        """Build the networks around the tensors of `checkpoint`, which they take over, on `device` and in `dtype`.

        name  what it was loaded by, "tiny" for the embedded model; engine  as in `from_pretrained`
        """
        networks = build_networks(checkpoint, device, dtype)
        return cls(
            unet=networks.unet,
            vae=networks.vae,
            text=networks.text,
            schedule=checkpoint.schedule_config,
            defaults=read_config(EditDefaults, checkpoint.defaults, "ledits.json"),
            fingerprint=checkpoint.fingerprint,
            notes=checkpoint.notes,
            name=name,
            engine=engine,
        )

    def __repr__(self) -> str:
        closed = self.device.type == "meta"
        where = "closed" if closed else f"{self.device}, {self.precision}"
        return f"LEdits({self.name!r}, {where})"

    @property
    def usage(self) -> Usage:
        """Who uses the networks at the moment."""
        return self.runner.usage

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return self.unet.conv_in.weight.dtype

    @property
    def precision(self) -> str:
        """As `from_pretrained` calls it: float32, tf32, float16 or bfloat16."""
        return "tf32" if self.runner.tf32 else str(self.dtype).removeprefix("torch.")

    def to(self, device: str | torch.device, dtype: str | torch.dtype | None = None) -> LEdits:
        """Move the networks. What a narrower dtype rounds stays rounded.

        device, dtype  as in `from_pretrained`; dtype None: as it is
        Returns itself. InputError where there is no such device, and during a run.
        """
        with self.usage.alone():
            place = resolve_device(device)
            self.runner.forget()
            before, after = self.dtype, self.dtype if dtype is None else resolve_dtype(dtype, place)
            # An autoencoder that is kept wider than the UNet is so for a reason: SDXL's overflows float16.
            own = next(self.vae.parameters()).dtype
            self.unet.to(place, after)
            self.vae.to(place, after if own == before else own)
            self.text.to(place, after)
            if dtype is not None:
                self.runner.tf32 = dtype == "tf32"
        return self

    def with_preset(self, preset: str | None) -> LEdits:
        """The same networks under other defaults, which is what every None stands for.

        preset      None: these, or one of
        "leditspp"  those of LEDITS++ [2311.16711] in diffusers: scale 5, threshold 0.9, no warm-up, the second-order
                    solver, masks of attention and noise in 30 executed steps (with SDXL masks of noise in 50)
        "fast"      10 steps of the embedded model, with the scale 1.5 and the threshold 0.95, for what is small; give
                    what is large (hair, a background) 2.5 and 0.8. "What they buy" in app/README.md says what it loses

        InputError for another name, and where the preset is not for this model.
        """
        if preset is None:
            return self
        other = copy(self)
        is_sdxl = self.unet.add_embedding is not None
        other.defaults = preset_defaults(preset, self.defaults, self.embedded, is_sdxl)
        return other

    def close(self) -> None:
        """Free the networks' memory, whoever still refers to them; the editor cannot be used any more.

        A run under way, in another thread or the one whose callback calls this, ends with Stopped at its next
        evaluation, and the memory is freed then.
        """

        def free() -> None:
            self.runner.forget()
            for network in (self.unet, self.vae, self.text):
                network.to(torch.device("meta"))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

        self.usage.close(free)

    def __enter__(self) -> LEdits:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def native_size(self) -> int:
        """The longer side, in pixels, that the model was trained at."""
        return self.unet.config.sample_size * self.vae.config.factor

    @property
    def framing(self) -> Framing:
        """How it frames pictures."""
        return Framing(self.native_size, self.vae.config.factor, self.defaults.one_size)

    @running
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
        solver_order: int | None = None,
    ) -> Inversion:
        """Find the noise maps that lead back to the picture: the first half of Algorithm 1.

        image      an `ImageLike` (path, PIL image, or uint8 array (H, W, 3)), or a list of them for one batch
        source     the prompt that describes the picture as it is; "" for none
        source_guidance_scale    how strongly `source` is followed, 0 .. 1000; None: the checkpoint's own, else the
                   paper's 3.5
        num_steps  steps from pure noise to the picture, 1 .. 500; None: the checkpoint's own, else the paper's 100
        skip       how many of the noisiest of them are left out, 0 .. num_steps - 1: fewer let an edit change more.
                   None: as large a share as the checkpoint's own of its own num_steps, or the paper's, 36 of 100
        eta        noise of the steps, 0 .. 1: 1 is DDPM, 0 DDIM
        seed       0 .. 2^63 - 1, one number or one per picture: it alone decides the noise
        noise      float32 (num_steps - skip, B, C, h, w), item i is n_t of timesteps[skip + i]; replaces the seed
        solver_order  1: DDPM or DDIM, as eta says; 2: SDE-DPM-Solver++, as LEDITS++ has it, with eta 1 alone; None:
                   the checkpoint's own, else 1
        size       what is worked at: the longer side in pixels, or (width, height). None: the model's native size for
                   the longer side; a model that knows squares alone is given one, which is said
        progress   show a bar on a terminal
        callback   a `Callback`, called with a `Progress` after every call of the UNet
        Returns an `Inversion`, to edit as often as wanted. InputError for what does not fit; Stopped where the callback
        returns true.
        """
        check_call(callback=callback)
        pictures = open_pictures(image)
        seeds = check_seeds(seed, len(pictures)) if noise is None else ()
        settings = self.inversion_settings(source, source_guidance_scale, num_steps, skip, eta, seeds, solver_order)
        frame = self.framing.frame(pictures, size)
        x_0 = self._encode(pictures, frame)
        settings = replace(settings, squared=bool(frame.squares))
        noise = self._noise(noise, settings, x_0)
        contexts = self._contexts(["", source], [picture.size for picture in pictures], x_0)
        x_T, residuals = self.runner.invert(contexts, x_0, noise, settings, Reporting(progress, callback=callback))
        return _inversion(pictures, x_0, x_T, residuals, settings)

    def inversion_settings(
        self,
        source: str = "",
        source_guidance_scale: float | None = None,
        num_steps: int | None = None,
        skip: int | None = None,
        eta: float = 1.0,
        seeds: tuple[int, ...] = (),
        solver_order: int | None = None,
    ) -> InversionSettings:
        """What `invert` would note down, every default resolved; it refuses what `invert` refuses.

        source, source_guidance_scale, num_steps, skip, eta, solver_order as there
        seeds  one per picture, () for given noise
        """
        num_steps, skip = self._steps(num_steps, skip)
        scale = self.defaults.source_guidance_scale if source_guidance_scale is None else source_guidance_scale
        order = self.defaults.solver_order if solver_order is None else solver_order
        settings = InversionSettings(
            self.fingerprint, self.schedule, num_steps, skip, eta, check_prompt("source", source), scale, seeds, order
        )
        check_inversion_settings(settings, "invert")
        return settings

    def edit_settings(
        self,
        target: str = "",
        guidance_scale: float | None = None,
        negative: str = "",
        concepts: Sequence[Concept] = (),
        momentum_scale: float = 0.0,
        momentum_beta: float = 0.6,
    ) -> EditSettings:
        """What `edit` would follow, every default resolved; it refuses what `edit` refuses.

        target, guidance_scale, negative, concepts, momentum_scale, momentum_beta    as there
        """
        settings = edit_settings(
            self.defaults, target, guidance_scale, negative, concepts, momentum_scale, momentum_beta
        )  # fmt: skip
        check_masks(self.unet.config, settings)
        return settings

    @running
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
        mask_image: MaskLike | Sequence[MaskLike] | None = None,
    ) -> Result:
        """Denoise the inverted picture again under a target prompt, concepts, or both: the second half of Algorithm 1.

        inversion       what `invert` gave back or `Inversion.load` read, made with this model
        target          the prompt that describes the new picture; "" for none
        guidance_scale  how strongly `target` is followed, 0 .. 1000; None: the checkpoint's own, else the paper's 15
        negative        what the picture should not show; it replaces the empty prompt in eps_uncond
        concepts        a list of `Concept`: what to add or remove, each with its own numbers
        momentum_scale, momentum_beta    SEGA's momentum, 0 <= value < 1; off by default, since LEDITS has none
        progress        show a bar on a terminal
        trace           note down numbers of every step in `Result.trace`
        output_size     "input": the change, laid over the original's pixels at the original's size, by
                        `files.picture.lay_change`; "model": the model's own picture at the size it worked at
        attention       a `PromptToPrompt`: the attention maps of the inversion's source prompt, lent to the target
        mask_image      limits every concept to where it is white: a grey picture of the picture's shape, of any size
                        and with soft edges, or one per picture; or arrays (H, W) of bool, uint8, or float in 0 .. 1.
                        The concepts' thresholds are taken inside it
        callback        a `Callback`, called with a `Progress` after every step
        Returns a `Result`: images, masks, latents, trace. InputError for what does not fit; Stopped where the callback
        returns true.
        """
        check_call(concepts, callback)
        check_inversion(inversion, self.unet.config.in_channels)
        if inversion.settings.fingerprint != self.fingerprint:
            raise InputError(
                "this inversion was made with another model, or with other parts or LoRAs; edit it with the same ones, "
                "or invert again"
            )
        check_inversion_settings(inversion.settings, "inversion")
        check_choice("output_size", output_size, ("input", "model"))
        check_attention(attention)
        settings = self.edit_settings(target, guidance_scale, negative, concepts, momentum_scale, momentum_beta)
        height, width = (side * self.vae.config.factor for side in inversion.latents.shape[-2:])
        frame = Frame.of(inversion.pictures, (width, height), inversion.settings.squared)
        planes = _opened(mask_image, inversion.original_sizes, settings)
        settings = self._limited(settings, planes, frame)
        start = Start(inversion.x_T, inversion.residuals, inversion.settings)
        reporting = Reporting(progress, trace, callback)
        edited = self._denoise("editing", start, settings, inversion.original_sizes, reporting, attention)
        return self._result(edited, settings, frame, output_size, inversion)

    @running
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
        solver_order: int | None = None,
        mask_image: MaskLike | Sequence[MaskLike] | None = None,
    ) -> tuple[Inversion, Result]:
        """`invert` and `edit` for whoever edits a picture once: the same in fewer calls of the UNet.

        image, source, source_guidance_scale, num_steps, skip, eta, seed, noise, size, solver_order    as in `invert`
        target, guidance_scale, negative, concepts, momentum_scale, momentum_beta    as in `edit`
        trace, output_size, mask_image    as in `edit`
        progress   show a bar on a terminal
        callback   a `Callback`, called with a `Progress` after every step
        attention  as in `edit`. Prompt-to-Prompt shares nothing with the inversion: one runs after the other, and each
                   calls back as it does alone
        Both share the UNet's calls, and what both would ask is asked once, as long as the edit retraces the inversion.
        Batches have other sizes than in two calls, which rounds differently. Returns an `Inversion` and a `Result`;
        raises what they raise.
        """
        check_call(concepts, callback)
        check_choice("output_size", output_size, ("input", "model"))
        check_attention(attention)
        settings = self.edit_settings(target, guidance_scale, negative, concepts, momentum_scale, momentum_beta)
        pictures = open_pictures(image)
        sizes = [picture.size for picture in pictures]
        planes = _opened(mask_image, sizes, settings)
        frame = self.framing.frame(pictures, size)
        settings = self._limited(settings, planes, frame)
        if attention is not None:
            check_prompts(check_prompt("source", source), target, negative)
            self.named_words(attention, source, target)  # now, not behind the inversion
            inversion = self.invert(
                pictures, source, source_guidance_scale, num_steps, skip, eta, seed, noise, size, progress, callback,
                solver_order,
            )  # fmt: skip
            return inversion, self.edit(
                inversion, target, guidance_scale, negative, concepts, momentum_scale, momentum_beta,
                progress, trace, output_size, attention, callback, planes or None,
            )  # fmt: skip
        seeds = check_seeds(seed, len(pictures)) if noise is None else ()
        inverting = self.inversion_settings(source, source_guidance_scale, num_steps, skip, eta, seeds, solver_order)
        warn_of_idle(settings, inverting.executed_steps)
        x_0 = self._encode(pictures, frame)
        inverting = replace(inverting, squared=bool(frame.squares))
        noise = self._noise(noise, inverting, x_0)
        contexts = self._contexts(["", source, *edit_texts(settings)], sizes, x_0)
        x_T, residuals, edited = self.runner.invert_and_edit(
            contexts, x_0, noise, inverting, settings, Reporting(progress, trace, callback)
        )
        inversion = _inversion(pictures, x_0, x_T, residuals, inverting)
        return inversion, self._result(edited, settings, frame, output_size, inversion)

    @running
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

        prompt          what the picture shows
        concepts, negative, momentum_scale, momentum_beta, progress, trace, callback    as in `edit`
        guidance_scale  how strongly `prompt` is followed, 0 .. 1000
        num_steps, eta  steps, and their noise: 0 is DDIM, 1 DDPM
        seed            one number, or a list: one picture per seed
        size            the side in pixels of a square, or (width, height); None: the model's native size
        The same loop as an edit. It starts from noise at the first timestep, and its residuals sigma_t z_t are drawn
        instead of found by inversion (eta = 0, DDIM, has none). Steps are of first order, whatever the checkpoint's or
        a preset's edits take. Returns a `Result`; InputError and Stopped as there.
        """
        check_call(concepts, callback)
        settings = self.edit_settings(prompt, guidance_scale, negative, concepts, momentum_scale, momentum_beta)
        seeds = check_seeds(seed, len(seed) if isinstance(seed, list | tuple) else 1)
        check_whole("num_steps", num_steps, 1, self.schedule.num_train_timesteps // 2)
        check_number("eta", eta, 0.0, 1.0)
        framing = self.framing
        frame = Frame(framing.worked_at((framing.native, framing.native), size)[0])
        framing.warn_of(frame)
        width, height = frame.size
        shape = (self.unet.config.in_channels, height // framing.factor, width // framing.factor)
        levels = InversionSettings(self.fingerprint, self.schedule, num_steps, skip=0, eta=eta, seeds=seeds)
        # Item 0 starts the trajectory, the others are z_t.
        noise = draw_noise(seeds, num_steps + 1, shape)
        residuals = levels.make_schedule().sigmas(eta).float().view(-1, 1, 1, 1, 1) * noise[1:]
        start, reporting = Start(noise[0], residuals, levels), Reporting(progress, trace, callback)
        edited = self._denoise("generating", start, settings, [frame.size], reporting)
        return self._result(edited, settings, frame)

    def _limited(self, settings: EditSettings, planes: Sequence[Plane], frame: Frame) -> EditSettings:
        """With the user's opened masks as the concepts' region, if any."""
        factor = self.vae.config.factor
        return replace(settings, region=frame.region(planes, factor).to(self.device)) if planes else settings

    def _encode(self, pictures: Sequence[Image.Image], frame: Frame) -> Tensor:
        """Scaled latents, float32 (B, C, h, w) on the device; says what is unlike the pictures, or cannot be copied."""
        self.framing.warn_of(frame)
        image = frame.cut(pictures).to(self.device)
        x_0 = self.runner.encode(image)
        if self.embedded:
            error = (self.runner.decode(x_0).clamp(-1.0, 1.0) - image).square().mean(dim=(1, 2, 3)).max()
            psnr = 10.0 * float(torch.log10(4.0 / error))
            if psnr < EMBEDDED_MIN_PSNR:
                warn(
                    f"the embedded model was trained on drawn portraits and cannot even copy this picture well "
                    f"({psnr:.0f} dB); it wants a larger model, such as a Stable Diffusion checkpoint"
                )
        return x_0

    def _noise(self, noise: Tensor | None, settings: InversionSettings, x_0: Tensor) -> Tensor:
        """n_t of every executed step beside x_0: the given noise, else what the seeds draw."""
        shape = (settings.executed_steps, *x_0.shape)
        if noise is None:
            noise = draw_noise(settings.seeds, settings.executed_steps, tuple(x_0.shape[1:]))
        check_noise(noise, shape)
        return noise.to(x_0)

    def _denoise(
        self,
        phase: str,
        start: Start,
        settings: EditSettings,
        sizes: Sequence[tuple[int, int]],
        reporting: Reporting,
        attention: PromptToPrompt | None = None,
    ) -> Edited:
        texts, source, lending = edit_texts(settings), start.inversion.source, None
        if attention is not None:
            check_prompts(source, settings.target, settings.negative)
            texts += ["", source]
            lending = self.lending(attention, start.inversion, settings, start.x_T)
        warn_of_idle(settings, start.inversion.executed_steps)
        contexts = self._contexts(texts, sizes, start.x_T)
        return self.runner.edit(phase, contexts, start.to(self.device), settings, reporting, lending)

    def lending(
        self, attention: PromptToPrompt, inversion: InversionSettings, settings: EditSettings, latents: Tensor
    ) -> Lending:
        """Which of the source prompt's maps `attention` lends to the target's.

        inversion, settings  what the picture was inverted with, and the edit; latents  (B, C, h, w), for their size
        """
        source, target = self.text.words(inversion.source), self.text.words(settings.target)
        lending = attention.lending(source, target, self.text.length, inversion.num_steps, latents.to(self.device))
        factors, blended = self.named_words(attention, inversion.source, settings.target)
        if attention.reweight and not lending.cross_steps:
            warn("Prompt-to-Prompt: reweight acts while cross-attention is lent, and cross is too small for any step")
        threshold = attention.resolve(self.defaults).blend_threshold
        blend = None if threshold is None else LocalBlend(blended, threshold)
        return replace(lending, mapper=lending.mapper.reweighted(factors.to(self.device)), blend=blend)

    def named_words(self, attention: PromptToPrompt, source: str, target: str) -> tuple[Tensor, Tensor]:
        """`engine.request.named_tokens`; InputError where the prompts lack the words, or the UNet the maps to blend by.

        attention, source, target  as in `invert_and_edit`
        """
        if attention.blend:
            check_attends(self.unet.config, self.defaults, "Prompt-to-Prompt: blend is by attention", "leave it out")
        return named_tokens(attention, self.text.words, source, target, self.text.length)

    def _steps(self, num_steps: int | None, skip: int | None) -> tuple[int, int]:
        """The defaults' skip belongs to the defaults' step count: of another count it is the same share."""
        check_whole("num_steps", num_steps, 1, self.schedule.num_train_timesteps // 2, optional=True)
        count = self.defaults.num_steps if num_steps is None else num_steps
        if skip is None:
            skip = min(round(count * self.defaults.skip / self.defaults.num_steps), count - 1)
        check_whole(f"skip (with {count} steps)", skip, 0, count - 1)
        return count, skip

    def _contexts(self, texts: Sequence[str], sizes: Sequence[tuple[int, int]], latents: Tensor) -> dict[str, Context]:
        """What the UNet is given of each text; SDXL's is given the sizes too, one row per picture where they differ.

        added = [pooled text, waves of (H, W of the original; 0, 0: nothing cropped; H, W worked at)]
        [2307.01952, section 2.2]; `sizes` (width, height) are those of the pictures' own pixels.
        """
        # One prompt per call: a prompt's embedding must not depend, to the last bit, on its neighbours.
        with self.runner.precisely():
            contexts = {one: self.text.encode([one]) for one in dict.fromkeys(texts)}
        waves = self.unet.config.addition_time_embed_dim
        if not waves:
            return contexts
        worked_at = [side * self.vae.config.factor for side in latents.shape[-2:]]
        rows = sizes[:1] if len(set(sizes)) == 1 else sizes
        numbers = [[height, width, 0, 0, *worked_at] for width, height in rows]
        features = sinusoids(torch.tensor(numbers, device=contexts[texts[0]].tokens.device), waves).flatten(1)
        return {one: context.with_features(features) for one, context in contexts.items()}

    def _result(
        self,
        edited: Edited,
        settings: EditSettings,
        frame: Frame,
        output_size: str = "model",
        inversion: Inversion | None = None,
    ) -> Result:
        """Pictures, and a mask for concepts that are none too; without an inversion at the model's own size."""
        found = iter(edited.masks)
        nothing = torch.zeros_like(edited.latents[:, 0]).cpu()
        masks = [nothing if term.text == settings.negative else next(found) for term in settings.concepts]
        masks = [frame.spread_mask(mask) for mask in masks]
        originals = [] if inversion is None else inversion.pictures
        after = self._decode(edited.latents, frame)
        if inversion is None or output_size == "model":
            images = [to_images(image[None])[0] for image in after]
        else:
            before = self._decode(inversion.latents, frame)
            images = [lay_change(*each) for each in zip(originals, before, after, strict=True)]
        return Result(images, edited.latents.cpu(), masks, edited.trace, originals, settings.concepts)

    def _decode(self, latents: Tensor, frame: Frame) -> list[Tensor]:
        return frame.spread(self.runner.decode(latents.to(self.device)).cpu())


def _opened(
    masks: MaskLike | Sequence[MaskLike] | None, sizes: Sequence[tuple[int, int]], settings: EditSettings
) -> list[Plane]:
    """The user's masks, if any; InputError where there is no concept for them to limit. `sizes` of the pictures."""
    if masks is None:
        return []
    if not settings.concepts:
        raise InputError("mask_image limits concepts, and there is none; pass concepts, or leave it out")
    return open_masks(masks, sizes)


def _kernel_calls(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> list[Callable[[], object]]:
    """Calls that compile the kernels which an edit at the checkpoint's own size needs."""
    unet = checkpoint.unet_config
    latents = unet.in_channels, unet.sample_size, unet.sample_size
    return kernel_calls(device, dtype, unet.block_out_channels, unet.norm_num_groups, latents)


def _inversion(
    pictures: list[Image.Image], x_0: Tensor, x_T: Tensor, residuals: Tensor, settings: InversionSettings
) -> Inversion:
    originals = tuple(torch.from_numpy(np.array(picture)) for picture in pictures)
    return Inversion(x_T.cpu(), residuals.cpu(), x_0.cpu(), originals, settings)
