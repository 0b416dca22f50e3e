"""`LEdits`: load a checkpoint, invert a picture, edit it. The only file that knows all the parts."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ledits_min import edit as algorithm
from ledits_min.archive import Inversion, InversionSettings, check_settings
from ledits_min.config import EditDefaults, InputError, RunError, ScheduleConfig, check_number, check_whole
from ledits_min.image import fit_size, lay_change, open_image, to_images, to_tensor
from ledits_min.inversion import draw_noise, eps_from_v
from ledits_min.record import Recorder
from ledits_min.schedule import Schedule, make_schedule
from ledits_min.sega import Concept
from ledits_min.text import TextEncoder, build_text_model, load_tokenizer
from ledits_min.unet import UNet
from ledits_min.vae import VAE
from ledits_min.weights.load import load_checkpoint

ImageLike = Image.Image | str | Path | np.ndarray[Any, Any]
Module = TypeVar("Module", bound=nn.Module)

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
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
        text: TextEncoder,
        schedule: ScheduleConfig,
        defaults: EditDefaults,
        fingerprint: str,
        notes: Sequence[str] = (),
        embedded: bool = False,
    ) -> None:
        self.unet, self.vae, self.text, self.schedule = unet, vae, text, schedule
        self.defaults, self.fingerprint, self.notes, self.embedded = defaults, fingerprint, tuple(notes), embedded

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
    ) -> LEdits:
        """Load the embedded model ("tiny"), a .safetensors file or a diffusers folder. Never touches a network.

        device "auto" is CUDA where there is one; dtype "auto" is float16 there, bfloat16 on a CPU that computes in it,
        else float32. `vae`, `text_encoder` and `tokenizer` replace the checkpoint's own parts. `prediction_type` is
        "epsilon" ("eps") or "v_prediction" ("v"). InputError names anything that does not fit.
        """
        chosen_device = resolve_device(device)
        chosen_dtype = resolve_dtype(dtype, chosen_device)
        checkpoint = load_checkpoint(
            model, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, prediction_type=prediction_type
        )

        def place(build: Callable[[], Module], state: dict[str, Tensor]) -> Module:
            with torch.device("meta"):
                module = build()
            module.load_state_dict(state, strict=True, assign=True)
            state.clear()  # the module owns the mapped tensors now; each is dropped as its converted copy replaces it
            return module.to(chosen_device, chosen_dtype).eval().requires_grad_(False)

        text_model = place(lambda: build_text_model(checkpoint.text_config), checkpoint.text)
        text_length = checkpoint.text_config.max_position_embeddings
        return cls(
            unet=place(lambda: UNet(checkpoint.unet_config), checkpoint.unet),
            vae=place(lambda: VAE(checkpoint.vae_config), checkpoint.vae),
            text=TextEncoder(load_tokenizer(checkpoint.tokenizer, text_length), text_model),
            schedule=checkpoint.schedule_config,
            defaults=EditDefaults.from_json(checkpoint.defaults, "ledits.json"),
            fingerprint=checkpoint.fingerprint,
            notes=checkpoint.notes,
            embedded=str(model) == "tiny",
        )

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

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
    ) -> Inversion:
        """Find the noise maps that lead back to the picture: the first half of Algorithm 1.

        image   one picture or a list that shares one latent size: PIL image, path, or uint8 array (H, W, 3)
        skip    how many of the noisiest steps are left out; None: num_steps * 36 // 100
        eta     0 .. 1; 1 is DDPM
        seed    0 .. 2^63 - 1, one number or one an image
        noise   float32 (num_steps - skip, B, C, h, w), item i is n_t of timesteps[skip + i]; replaces the seed
        size    longer side in pixels, or (width, height); None: the model's native size for the longer side
        """
        num_steps, skip = self._steps(num_steps, skip)
        pictures = self._open(image)
        seeds = _seeds(seed, len(pictures)) if noise is None else ()
        scale = self.defaults.source_guidance_scale if source_guidance_scale is None else source_guidance_scale
        settings = InversionSettings(
            self.fingerprint, self.schedule, num_steps, skip, eta, _prompt("source", source), scale, seeds
        )
        check_settings(settings, "invert")
        schedule = make_schedule(self.schedule, num_steps)
        contexts = self._contexts(["", source])

        x_0 = self._encode(pictures, size)
        if noise is None:
            noise = draw_noise(seeds, num_steps - skip, tuple(x_0.shape[1:]))
        _check_noise(noise, (num_steps - skip, *x_0.shape))
        with _progress("inverting", num_steps - skip, progress) as bar:
            x_T, residuals = algorithm.invert(
                self._eps_model(schedule), contexts, x_0, noise.to(x_0), schedule, skip, eta, source, scale,
                on_step=lambda index: bar.update(),
            )  # fmt: skip
        finite = residuals.flatten(1).isfinite().all(dim=1)
        _refuse_non_finite(finite, schedule, skip, "inverting")
        originals = tuple(torch.from_numpy(np.array(picture)) for picture in pictures)
        return Inversion(x_T.cpu(), residuals.cpu(), x_0.cpu(), originals, settings)

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
    ) -> Result:
        """Denoise the inverted picture again under a target prompt, concepts, or both: the second half of Algorithm 1.

        negative      replaces the empty prompt in eps_uncond
        concepts      what to add or remove, see `Concept`
        momentum_*    SEGA's momentum, 0 <= value < 1; off by default, since LEDITS has none
        output_size   "input": the change, laid over the original pixels at the original size;
                      "model": the model's own picture at the size it worked at
        """
        settings = inversion.settings
        if settings.fingerprint != self.fingerprint:
            raise InputError("this inversion was made with another model; edit it with that one, or invert again")
        check_settings(settings, "inversion")
        if output_size not in ("input", "model"):
            raise InputError(f"output_size is {output_size!r}; 'input' or 'model' is wanted")
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        latents, masks, steps = self._denoise(
            "editing", inversion.x_T, inversion.residuals, make_schedule(settings.schedule, settings.num_steps),
            settings.skip, settings.eta, target, scale, negative, concepts, momentum_scale, momentum_beta,
            progress, trace,
        )  # fmt: skip
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
    ) -> Result:
        """Make pictures from a prompt, with SEGA's concepts: what the guidance does where no real picture is involved.

        The same loop as an edit. It starts from noise at the first timestep, and its residuals sigma_t z_t are drawn
        instead of found by inversion (eta = 0, DDIM, has none). One picture a seed; `size` as in `invert`, square by
        default.
        """
        seeds = _seeds(seed, len(seed) if isinstance(seed, list | tuple) else 1)
        check_whole("num_steps", num_steps, 1, self.schedule.num_train_timesteps // 2)
        check_number("eta", eta, 0.0, 1.0)
        factor = self.vae.config.factor
        width, height = fit_size((self.native_size, self.native_size), size, self.native_size, factor)
        shape = (self.unet.config.in_channels, height // factor, width // factor)
        schedule = make_schedule(self.schedule, num_steps)
        # Item 0 starts the trajectory, the others are z_t.
        noise = draw_noise(seeds, num_steps + 1, shape)
        residuals = schedule.sigmas(eta).float().view(-1, 1, 1, 1, 1) * noise[1:]
        latents, masks, steps = self._denoise(
            "generating", noise[0], residuals, schedule, 0, eta, prompt, guidance_scale,
            negative, concepts, momentum_scale, momentum_beta, progress, trace,
        )  # fmt: skip
        return Result(to_images(self.vae.decode(latents)), latents.cpu(), masks, steps)

    def _denoise(
        self,
        phase: str,
        x_T: Tensor,
        residuals: Tensor,
        schedule: Schedule,
        skip: int,
        eta: float,
        target: str,
        guidance_scale: float,
        negative: str,
        concepts: Sequence[Concept],
        momentum_scale: float,
        momentum_beta: float,
        progress: bool,
        trace: bool,
    ) -> tuple[Tensor, list[Tensor], list[dict[str, Any]]]:
        """Check what the guidance was asked to do, run the loop, and refuse a result that is not finite.

        Returns the latents on the device, one mask a concept, and the trace.
        """
        check_number("guidance_scale", guidance_scale, 0.0, 1000.0)
        for name, value in (("momentum_scale", momentum_scale), ("momentum_beta", momentum_beta)):
            check_number(name, value, 0.0, 1.0)
            if value == 1.0:
                raise InputError(f"{name} is 1; it must stay below 1, or the momentum never fades")
        _prompt("target", target), _prompt("negative", negative)
        terms = [concept.resolve(self.defaults) for concept in concepts]
        live = [term for term in terms if not term.is_noop(base=negative)]
        for term in live:
            if not any(term.acts(step) for step in range(len(residuals))):
                warnings.warn(
                    f"concept {term.text[:40]!r} never acts: only {len(residuals)} steps are executed, and its warm-up "
                    f"is {term.warmup_steps}, its cool-down {term.cooldown_steps}",
                    stacklevel=4,
                )

        contexts = self._contexts([negative, target, *(term.text for term in live)])
        recorder = Recorder(live, negative, target, schedule, skip, eta, trace)
        with _progress(phase, len(residuals), progress) as bar:

            def on_step(step: algorithm.Step) -> None:
                recorder.record(step)
                bar.update()

            latents = algorithm.edit(
                self._eps_model(schedule), contexts, x_T.to(self.device), residuals.to(self.device), schedule,
                skip, eta, target, guidance_scale, negative, live, momentum_scale, momentum_beta, on_step,
            )  # fmt: skip
        _refuse_non_finite(torch.stack(recorder.finite), schedule, skip, phase)

        found = iter(recorder.masks(x_T))
        nothing = torch.zeros_like(x_T[:, 0]).cpu()
        masks = [nothing if term.is_noop(base=negative) else next(found) for term in terms]
        return latents, masks, recorder.trace

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
        x_0 = self.vae.encode(tensor)
        if self.embedded:
            error = (self.vae.decode(x_0).clamp(-1.0, 1.0) - tensor).square().mean(dim=(1, 2, 3)).max()
            psnr = 10.0 * float(torch.log10(4.0 / error))
            if psnr < EMBEDDED_MIN_PSNR:
                warnings.warn(
                    f"the embedded model was trained on drawn portraits and cannot even copy this picture well "
                    f"({psnr:.0f} dB); for photographs pass a Stable Diffusion checkpoint with --model",
                    stacklevel=4,
                )
        return x_0

    def _contexts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        # One prompt a call: a prompt's embedding must not depend, to the last bit, on its neighbours.
        return {text: self.text.encode([text]) for text in dict.fromkeys(texts)}

    def _eps_model(self, schedule: Schedule) -> algorithm.EpsModel:
        """The UNet as the maths sees it: it predicts eps, in float32, for one text and a batch of latents."""
        alphas_cumprod = schedule.alphas_cumprod.to(self.device, torch.float32)

        def eps_model(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            prediction: Tensor = self.unet(x_t, t, context.expand(len(x_t), -1, -1))
            if self.schedule.prediction_type == "v_prediction":
                return eps_from_v(prediction, x_t, alphas_cumprod[t].view(-1, 1, 1, 1))
            return prediction

        return eps_model

    def _pictures(self, inversion: Inversion, latents: Tensor, output_size: str) -> list[Image.Image]:
        after = self.vae.decode(latents)
        if output_size == "model":
            return to_images(after)
        before = self.vae.decode(inversion.latents.to(self.device))
        originals = [Image.fromarray(original.numpy()) for original in inversion.originals]
        return [lay_change(*pair) for pair in zip(originals, before, after, strict=True)]


def resolve_device(device: str | torch.device) -> torch.device:
    """"auto", or a device that is really there; InputError otherwise."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {str(device)!r} is not one torch knows; use auto, cpu or cuda") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (chosen.index or 0) >= count.get(chosen.type, 0):
        raise InputError(f"device {str(device)!r} is not available on this machine; use cpu")
    return chosen


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the networks; everything between them is float32."""
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        if device.type == "cpu":
            capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch >= 2.10
            fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile")
            return torch.bfloat16 if fast else torch.float32
        return torch.float16
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; the choices are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _prompt(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name} is {type(text).__name__}; a string is wanted")
    return text


def _seeds(seed: int | Sequence[int], batch: int) -> tuple[int, ...]:
    seeds = tuple(seed) if isinstance(seed, list | tuple) else (seed,) * batch
    for value in seeds:
        check_whole("seed", value, 0, 2**63 - 1)  # type: ignore[arg-type]
    if len(seeds) != batch:
        raise InputError(f"{len(seeds)} seeds for {batch} pictures; give one number, or one a picture")
    return seeds  # type: ignore[return-value]


def _check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(noise.shape) != shape or noise.dtype != torch.float32:
        raise InputError(f"noise is {noise.dtype} {tuple(noise.shape)}; torch.float32 {shape} is wanted")
    if not bool(noise.isfinite().all()):
        raise InputError("noise holds values that are not finite")


def _refuse_non_finite(finite: Tensor, schedule: Schedule, skip: int, phase: str) -> None:
    """RunError that names the first step whose result was not finite."""
    bad = (~finite).nonzero()
    if len(bad):
        index = int(bad[0])
        t = int(schedule.timesteps[skip + index])
        raise RunError(f"{phase}: values that are not finite at step {index} (t = {t}); try --dtype float32")


def _progress(phase: str, total: int, wanted: bool) -> tqdm[Any]:
    """A bar on stderr that stays silent where stderr is no terminal."""
    return tqdm(total=total, desc=phase, unit="step", file=sys.stderr, disable=None if wanted else True)
