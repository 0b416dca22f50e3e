"""The whole edit against a loop of its own, written from the papers' equations on diffusers' modules in float64."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ledits_min.config import EditDefaults, ScheduleConfig, UNetConfig
from ledits_min.edit import EpsModel, edit, invert
from ledits_min.files.configs import config_json
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings, eps_from_v
from ledits_min.schedule import Schedule
from ledits_min.sega import Concept
from ledits_min.unet import UNet

Fill = Callable[[nn.Module, int], nn.Module]
Error = Callable[[Tensor, Tensor], float]

UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    num_attention_heads=(4, 4),
    cross_attention_dim=24,
    norm_num_groups=8,
    norm_eps=1e-5,
    use_linear_projection=False,
    sample_size=8,
)
TEXTS = ("", "a cat", "a dog", "blurry", "hat", "beard", "smile")


@dataclass(frozen=True)
class Case:
    """The settings of one comparison, in the names of the public interface."""

    eta: float = 1.0
    prediction_type: str = "epsilon"
    source: str = "a cat"
    source_guidance_scale: float = 3.5
    target: str = "a dog"
    guidance_scale: float = 5.0
    negative: str = ""
    concepts: tuple[Concept, ...] = ()
    momentum_scale: float = 0.0
    momentum_beta: float = 0.6
    num_steps: int = 14
    skip: int = 4


CONCEPTS = (
    Concept("hat", guidance_scale=4.0, threshold=0.9),
    Concept("beard", guidance_scale=6.0, threshold=0.7, warmup_steps=3, cooldown_steps=7, weight=1.5, reverse=True),
    Concept("smile", guidance_scale=2.0, threshold=0.3, warmup_steps=0, cooldown_steps=5, weight=0.5),
)
EVERYTHING = Case(negative="blurry", concepts=CONCEPTS, momentum_scale=0.4)
CASES = {
    "reconstruction": Case(source="", target=""),
    "pure DDPM edit": Case(),
    "pure DDPM edit, eta 0.5, negative": Case(eta=0.5, negative="blurry"),
    "concepts alone": Case(source="", target="", concepts=CONCEPTS),
    "concepts without momentum": Case(concepts=CONCEPTS, negative="blurry"),
    "concepts at guidance scale 1": Case(concepts=CONCEPTS, guidance_scale=1.0),
    "concepts at guidance scale 0": Case(concepts=CONCEPTS, guidance_scale=0.0, momentum_scale=0.2),
    "everything": EVERYTHING,
    "everything, eta 0.5": replace(EVERYTHING, eta=0.5),
    "everything, eta 0": replace(EVERYTHING, eta=0.0),
    "everything, v": replace(EVERYTHING, prediction_type="v_prediction"),
    "everything, v, eta 0.5": replace(EVERYTHING, prediction_type="v_prediction", eta=0.5),
    "all cooled down, momentum goes on": replace(
        EVERYTHING, concepts=tuple(replace(concept, cooldown_steps=4) for concept in CONCEPTS)
    ),
    "one concept without strength warms up late": replace(
        EVERYTHING, concepts=(*CONCEPTS[:2], Concept("smile", guidance_scale=0.0, warmup_steps=8))
    ),
    "one concept is never warm": replace(
        EVERYTHING, concepts=(*CONCEPTS[1:], Concept("hat", guidance_scale=4.0, warmup_steps=99))
    ),
}


def contexts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {text: 2.0 * torch.randn(1, 6, 24, generator=generator) for text in TEXTS}


def ours(case: Case, unet: UNet, x_0: Tensor, noise: Tensor) -> Tensor:
    """ledits_min in float32."""
    inversion = InversionSettings(
        schedule=ScheduleConfig(prediction_type=case.prediction_type), num_steps=case.num_steps, skip=case.skip,
        eta=case.eta, source=case.source, source_guidance_scale=case.source_guidance_scale,
    )  # fmt: skip
    settings = EditSettings(
        case.target, case.guidance_scale, case.negative,
        tuple(concept.resolve(EditDefaults()) for concept in case.concepts), case.momentum_scale, case.momentum_beta,
    )  # fmt: skip
    model = eps_model(unet, inversion.make_schedule(), case.prediction_type)
    table = contexts()
    x_T, residuals = invert(model, table, x_0, noise, inversion)
    return edit(model, table, x_T, residuals, inversion, settings)


def eps_model(unet: UNet, schedule: Schedule, prediction_type: str) -> EpsModel:
    def predict(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        output: Tensor = unet(x_t, t, context.expand(len(x_t), -1, -1))
        if prediction_type == "v_prediction":
            return eps_from_v(output, x_t, float(schedule.alphas_cumprod[t[0]]))
        return output

    return predict


class Reference:
    """LEDITS with diffusers' UNet and DDIMScheduler in float64; shares no line with ledits_min."""

    def __init__(self, case: Case, unet: UNet2DConditionModel) -> None:
        self.case = case
        self.unet = unet
        self.contexts = {text: context.double() for text, context in contexts().items()}
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        self.scheduler.set_timesteps(case.num_steps)
        self.timesteps = [int(t) for t in self.scheduler.timesteps][case.skip :]

    def eps(self, x: Tensor, t: int, text: str) -> Tensor:
        context = self.contexts[text].expand(len(x), -1, -1)
        output = self.unet(x, t, encoder_hidden_states=context).sample
        if self.case.prediction_type == "v_prediction":
            alpha_bar = float(self.scheduler.alphas_cumprod[t])
            return alpha_bar**0.5 * output + (1 - alpha_bar) ** 0.5 * x
        return output

    def mean(self, x: Tensor, t: int, eps: Tensor) -> Tensor:
        """A DDIM step whose noise happens to be zero."""
        step = self.scheduler.step(eps, t, x, eta=self.case.eta, variance_noise=torch.zeros_like(x))
        return step.prev_sample

    def invert(self, x_0: Tensor, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
        case, xs = self.case, []
        for t, n in zip(self.timesteps, noise, strict=True):
            xs.append(self.scheduler.add_noise(x_0, n, torch.full((len(x_0),), t)))
        xs.append(x_0)
        maps = []
        for i, t in enumerate(self.timesteps):
            empty = self.eps(xs[i], t, "")
            eps = empty + case.source_guidance_scale * (self.eps(xs[i], t, case.source) - empty)
            maps.append(xs[i + 1] - self.mean(xs[i], t, eps))
        return xs[0], maps

    def edit(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        case = self.case
        nu = torch.zeros_like(x)
        for i, t in enumerate(self.timesteps):
            uncond = self.eps(x, t, case.negative)
            terms = [self.term(x, t, concept, uncond) for concept in case.concepts]
            warm = [i >= self.warmup(concept) for concept in case.concepts]
            cold = [i >= (concept.cooldown_steps or 10**9) for concept in case.concepts]
            everything = case.momentum_scale * nu
            for term, is_cold in zip(terms, cold, strict=True):
                everything = everything + (0.0 if is_cold else 1.0) * term
            if all(warm):
                gamma = everything
            else:
                chosen = [term for term, w, c in zip(terms, warm, cold, strict=True) if w and not c]
                gamma = torch.stack([torch.zeros_like(x), *chosen]).sum(0)
            nu = case.momentum_beta * nu + (1 - case.momentum_beta) * everything
            target = self.eps(x, t, case.target)
            x = self.mean(x, t, uncond + case.guidance_scale * (target - uncond) + gamma) + maps[i]
        return x

    @staticmethod
    def warmup(concept: Concept) -> int:
        return 1 if concept.warmup_steps is None else concept.warmup_steps

    def term(self, x: Tensor, t: int, concept: Concept, uncond: Tensor) -> Tensor:
        assert concept.guidance_scale is not None
        sign = -1 if concept.reverse else 1
        psi = (sign * concept.guidance_scale * (self.eps(x, t, concept.text) - uncond)).numpy()
        share = 0.95 if concept.threshold is None else concept.threshold
        for image in psi:
            for channel in image:
                channel[np.abs(channel) < np.quantile(np.abs(channel), share)] = 0.0
        return concept.weight * torch.from_numpy(psi)


def networks(fill: Fill) -> tuple[UNet, UNet2DConditionModel]:
    theirs = UNet2DConditionModel.from_config(config_json(UNET))
    fill(theirs, 3)
    unet = UNet(UNET)
    unet.load_state_dict(theirs.state_dict(), strict=True)
    return unet.eval().requires_grad_(False), theirs.double()


def start(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x_0 = torch.randn(2, 4, 8, 10, generator=generator)
    return x_0, torch.randn(case.num_steps - case.skip, 2, 4, 8, 10, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_final_latents(name: str, fill: Fill, error: Error) -> None:
    case = CASES[name]
    unet, theirs = networks(fill)
    x_0, noise = start(case)
    reference = Reference(case, theirs)
    wanted = reference.edit(*reference.invert(x_0.double(), noise.double()))
    found = ours(case, unet, x_0, noise)
    assert found.dtype == torch.float32
    assert error(found, wanted) <= 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"eta": 0.9},
        {"source": ""},
        {"target": "a cat"},
        {"negative": ""},
        {"momentum_scale": 0.3},
        {"momentum_beta": 0.5},
        {"source_guidance_scale": 3.0},
        {"guidance_scale": 4.5},
        {"prediction_type": "v_prediction"},
        {"concepts": CONCEPTS[:2]},
        {"concepts": (CONCEPTS[0], replace(CONCEPTS[1], warmup_steps=4), CONCEPTS[2])},
        {"concepts": (CONCEPTS[0], replace(CONCEPTS[1], cooldown_steps=6), CONCEPTS[2])},
        {"concepts": (CONCEPTS[0], replace(CONCEPTS[1], reverse=False), CONCEPTS[2])},
        {"concepts": (CONCEPTS[0], replace(CONCEPTS[1], weight=1.0), CONCEPTS[2])},
        {"concepts": (replace(CONCEPTS[0], threshold=0.8), *CONCEPTS[1:])},
    ],
    ids=lambda change: " ".join(change),
)
def test_the_comparison_sees_every_setting(change: Mapping[str, object], fill: Fill, error: Error) -> None:
    """Were a setting ignored on both sides, agreement would prove nothing: each one moves the latents by 10 x 1e-3."""
    unet, _ = networks(fill)
    x_0, noise = start(EVERYTHING)
    other = replace(EVERYTHING, **change)  # type: ignore[arg-type]
    assert error(ours(other, unet, x_0, noise), ours(EVERYTHING, unet, x_0, noise)) > 1e-2
