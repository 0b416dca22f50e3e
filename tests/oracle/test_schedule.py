"""Our schedule and our reverse step against diffusers' DDIMScheduler."""

import inspect
import json
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from ledits_min.config import SD15_SCHEDULE, ScheduleConfig
from ledits_min.errors import InputError
from ledits_min.files.configs import config_json, read_config
from ledits_min.inversion import InversionSettings, Solver, eps_from_v, noisy_latents, posterior_mean, predict_x0
from ledits_min.schedule import make_schedule
from ledits_min.weights.read.prediction import schedule_of_folder

CONFIGS = [
    ScheduleConfig(),
    ScheduleConfig(prediction_type="v_prediction"),
    ScheduleConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    ScheduleConfig(steps_offset=0),
    ScheduleConfig(num_train_timesteps=300, beta_start=0.003, beta_end=0.03),
]
STEPS = [1, 2, 3, 7, 10, 20, 33, 48, 50, 51, 99, 100, 128, 150]


def their_scheduler(config: ScheduleConfig, num_steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(config_json(config))
    scheduler.set_timesteps(num_steps)
    return scheduler


def random_states(count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, 5, 7, generator=generator, dtype=torch.float64) for _ in range(count))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tables(config: ScheduleConfig) -> None:
    for num_steps in STEPS:
        theirs = their_scheduler(config, num_steps)
        ours = make_schedule(config, num_steps)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-6, atol=0.0)
        torch.testing.assert_close(ours.alpha_bar_prev[-1].float(), theirs.final_alpha_cumprod, rtol=1e-6, atol=0.0)


def test_every_number_of_steps_of_stable_diffusion() -> None:
    theirs = DDIMScheduler.from_config(config_json(ScheduleConfig()))
    for num_steps in range(1, 501):
        theirs.set_timesteps(num_steps)
        ours = make_schedule(ScheduleConfig(), num_steps)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        assert ours.t_prev[:-1].tolist() == [t - 1000 // num_steps for t in theirs.timesteps.tolist()[:-1]]


RESCALED = ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)
ALL = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and name != "DPMSolverSDEScheduler")
# DPMSolverSDE is a placeholder where torchsde is not installed. Those that step along betas, but belong to models of
# other kinds: few steps, video, inpainting by repetition.
OTHER_KINDS = {
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "LCMScheduler", "RePaintScheduler", "TCDScheduler"
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_class_of_diffusers_has_a_verdict(name: str) -> None:
    """Read, where it steps along betas; refused by its name where it does not."""
    kind = getattr(diffusers, name)
    if "beta_start" in inspect.signature(kind.__init__).parameters and name not in OTHER_KINDS:
        written = json.loads(kind.from_config(config_json(RESCALED)).to_json_string())
        rescales = "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters
        found = read_config(ScheduleConfig, written, "scheduler_config.json")
        assert found == replace(RESCALED, rescale_betas_zero_snr=rescales or "rescale_betas_zero_snr" in written)
    else:
        with pytest.raises(InputError, match=name):
            read_config(ScheduleConfig, config_json(SD15_SCHEDULE) | {"_class_name": name}, "scheduler_config.json")


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler"])
def test_a_plain_model_saved_with_a_sampler_of_few_steps(name: str) -> None:
    """As diffusers writes it: refused, and read for its betas where that is insisted on."""
    options = config_json(SD15_SCHEDULE) | {"timestep_spacing": "trailing"}
    written = json.loads(getattr(diffusers, name).from_config(options).to_json_string())
    with pytest.raises(InputError, match="--insist"):
        schedule_of_folder(written, "scheduler_config.json")
    assert schedule_of_folder(written, "scheduler_config.json", insist=True) == SD15_SCHEDULE


def test_rescaled_betas() -> None:
    """Zero terminal SNR: the table is diffusers', whose last entry is set to 2^-24 where ours stays 0."""
    theirs = DDIMScheduler.from_config(config_json(RESCALED) | {"timestep_spacing": "leading"})
    plain = make_schedule(ScheduleConfig(), 50).alphas_cumprod
    for num_steps in STEPS:
        theirs.set_timesteps(num_steps)
        ours = make_schedule(RESCALED, num_steps)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        assert float((ours.alphas_cumprod.float() - theirs.alphas_cumprod).abs().max()) < 1e-6
        wanted = theirs.alphas_cumprod[theirs.timesteps]
        torch.testing.assert_close(ours.alpha_bar_t.float(), wanted, rtol=1e-2, atol=2e-7)
    assert float(make_schedule(RESCALED, 50).alphas_cumprod[-1]) == 0.0
    assert float((plain[981] - ours.alphas_cumprod[981]) / plain[981]) > 0.9


def test_only_the_last_timestep_is_singular() -> None:
    """Leading steps end before it, but for half of all timesteps, whose stride of two reaches it."""
    for num_steps in range(1, 500):
        assert int(make_schedule(RESCALED, num_steps).timesteps[0]) < 999
    with pytest.raises(InputError, match="num_steps is 500, and its first step, t = 999, is pure noise"):
        make_schedule(RESCALED, 500)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_that_diffusers_wrote_is_read(config: ScheduleConfig, name: str) -> None:
    """Which sampler a checkpoint names does not matter; the noise schedule in its file does."""
    written = json.loads(getattr(diffusers, name).from_config(config_json(config)).to_json_string())
    assert read_config(ScheduleConfig, written, "scheduler_config.json") == config


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_step_with_noise(config: ScheduleConfig, eta: float) -> None:
    x_t, output, noise = random_states(3)
    for num_steps in (7, 50):
        theirs, ours = their_scheduler(config, num_steps), make_schedule(config, num_steps)
        sigmas = ours.sigmas(eta)
        for i, t in enumerate(ours.timesteps.tolist()):
            alpha_bar_t, alpha_bar_prev = float(ours.alpha_bar_t[i]), float(ours.alpha_bar_prev[i])
            wanted = theirs.step(output, t, x_t, eta=eta, variance_noise=noise)
            is_v = config.prediction_type == "v_prediction"
            eps = eps_from_v(output, x_t, alpha_bar_t) if is_v else output
            mu_t = posterior_mean(x_t, eps, alpha_bar_t, alpha_bar_prev, float(sigmas[i]))
            # Their table is float32: 1 - alpha_bar keeps four digits near t = 1.
            bound = {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(mu_t + float(sigmas[i]) * noise, wanted.prev_sample, **bound)
            torch.testing.assert_close(predict_x0(x_t, eps, alpha_bar_t), wanted.pred_original_sample, **bound)


def test_eta_where_eta_squared_belongs_is_caught_at_one_half_and_hidden_at_zero_and_one() -> None:
    """A fault of the two original repositories: sqrt(1 - alpha_bar_prev - eta variance)."""
    x_t, eps, noise = random_states(3)
    theirs, ours = their_scheduler(ScheduleConfig(), 50), make_schedule(ScheduleConfig(), 50)
    i, differences = 10, {}
    alpha_bar_t, alpha_bar_prev = float(ours.alpha_bar_t[i]), float(ours.alpha_bar_prev[i])
    variance = float(ours.sigmas(1.0)[i]) ** 2
    for eta in (0.0, 0.5, 1.0):
        pred_x0 = predict_x0(x_t, eps, alpha_bar_t)
        faulty = alpha_bar_prev**0.5 * pred_x0 + (1.0 - alpha_bar_prev - eta * variance) ** 0.5 * eps
        wanted = theirs.step(eps, int(ours.timesteps[i]), x_t, eta=eta, variance_noise=noise).prev_sample
        differences[eta] = float((faulty + eta * variance**0.5 * noise - wanted).abs().max())
    assert differences[0.0] < 1e-4
    assert differences[1.0] < 1e-4
    assert differences[0.5] > 1e-2


@pytest.mark.parametrize("num_steps", [6, 10, 25])
def test_a_step_of_second_order(num_steps: int) -> None:
    """Fed with the same two predictions and the same noise; their sigmas are float32."""
    theirs = DPMSolverMultistepScheduler.from_config(
        config_json(ScheduleConfig()), algorithm_type="sde-dpmsolver++", solver_type="midpoint", solver_order=2,
        timestep_spacing="leading", steps_offset=1, final_sigmas_type="sigma_min", use_karras_sigmas=False,
    )  # fmt: skip
    theirs.set_timesteps(num_steps)
    settings = InversionSettings(num_steps=num_steps, skip=0, solver_order=2)
    ours, solver = settings.make_schedule(), Solver(settings)
    x_t, eps, last_pred_x0, noise = random_states(4)
    bounded = 0
    for i in range(1, num_steps - 1):
        level, levels = solver.levels[i], [ours.alpha_bar_t[i - 1], ours.alpha_bar_t[i], ours.alpha_bar_prev[i]]
        theirs.sigmas = torch.stack([((1.0 - level) / level).sqrt() for level in levels])
        theirs._step_index = 1
        pred_x0 = predict_x0(x_t, eps, level.alpha_bar_t)
        before, now, after = (float(-sigma.log()) for sigma in theirs.sigmas)
        # Ours bounds 1 / (2 r) by 1/2, theirs does not: it gets as much less of the change instead.
        r = (now - before) / (after - now)
        bounded += r < 1.0
        last = pred_x0 - min(r, 1.0) * (pred_x0 - last_pred_x0)
        wanted = theirs.multistep_dpm_solver_second_order_update([last, pred_x0], sample=x_t, noise=noise)
        solver.last_pred_x0 = last_pred_x0
        found = solver.mean(i, x_t, eps) + level.sigma_t * noise
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert 0 < bounded < num_steps - 2


@pytest.mark.parametrize("t", [1, 421, 981])
def test_noisy_latents(t: int) -> None:
    x_0, noise = random_states(2)
    ours, theirs = make_schedule(ScheduleConfig(), 50), their_scheduler(ScheduleConfig(), 50)
    wanted = theirs.add_noise(x_0, noise, torch.tensor([t, t]))
    torch.testing.assert_close(noisy_latents(x_0, noise, float(ours.alphas_cumprod[t])), wanted, rtol=0.0, atol=1e-5)
