"""Edit-friendly inversion: the noise, the noisy copies, the reverse step, and the faults around the residuals."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ledits_min.config import ScheduleConfig
from ledits_min.edit import edit, invert
from ledits_min.guidance import EditSettings
from ledits_min.inversion import (
    InversionSettings,
    Solver,
    draw_noise,
    eps_from_v,
    noisy_latents,
    posterior_mean,
    predict_x0,
    trajectory,
)
from ledits_min.schedule import Level, Schedule, make_schedule, sigma

ALPHA_BARS = st.floats(0.004, 0.9999)
SHAPE = (4, 6, 5)


def eps_model(x_t: Tensor, t: Tensor, context: float) -> Tensor:
    """Smooth, nonlinear, neighbouring pixels mixed; stands for a network."""
    mixed = 0.6 * x_t + 0.3 * x_t.roll(1, -1) + 0.1 * x_t.roll(1, 1)
    return torch.tanh(mixed + context) + 0.2 * torch.sin(3.0 * x_t + t.view(-1, 1, 1, 1) / 100.0)


def latents(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(9)).to(dtype)


class TestNoise:
    def test_independent_of_skip(self) -> None:
        assert torch.equal(draw_noise([5], 10, SHAPE)[4:], draw_noise([5], 6, SHAPE))

    def test_independent_of_batch(self) -> None:
        together = draw_noise([5, 8, 5], 7, SHAPE)
        assert together.shape == (7, 3, *SHAPE)
        assert torch.equal(together[:, 1:2], draw_noise([8], 7, SHAPE))
        assert torch.equal(together[:, 0], together[:, 2])

    def test_independent_of_the_global_seed_and_leaves_it_alone(self) -> None:
        torch.manual_seed(1)
        first = draw_noise([3], 2, SHAPE)
        state = torch.get_rng_state()
        torch.manual_seed(2)
        assert torch.equal(first, draw_noise([3], 2, SHAPE))
        torch.manual_seed(1)
        assert torch.equal(state, torch.get_rng_state())

    def test_the_seed_has_an_effect_and_timesteps_are_independent(self) -> None:
        """A seed control that does nothing."""
        noise = draw_noise([0, 1], 400, SHAPE).flatten(2)
        assert noise.dtype == torch.float32
        assert abs(float(noise.mean())) < 0.01
        assert abs(float(noise.std()) - 1.0) < 0.01
        assert abs(float((noise[:, 0] * noise[:, 1]).mean())) < 0.02
        assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.02


class TestTrajectory:
    def test_ends_in_the_picture_itself(self) -> None:
        x_0, noise = latents(), draw_noise([0, 1], 3, SHAPE).double()
        alpha_bar_t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        x = trajectory(x_0, noise, alpha_bar_t)
        assert torch.equal(x[-1], x_0)
        for i, level in enumerate(alpha_bar_t.tolist()):
            torch.testing.assert_close(x[i], level**0.5 * x_0 + (1.0 - level) ** 0.5 * noise[i])

    def test_keeps_the_state_in_the_dtype_of_the_picture(self) -> None:
        schedule = make_schedule(ScheduleConfig(), 3)
        for dtype in (torch.float32, torch.float64):
            x = trajectory(latents(dtype=dtype), draw_noise([0, 1], 3, SHAPE), schedule.alpha_bar_t)
            assert x.dtype == dtype

    def test_levels_are_rounded_once(self) -> None:
        """1 - alpha_bar of a float32 alpha_bar keeps four digits near t = 1; the root is taken in float64."""
        schedule = make_schedule(ScheduleConfig(), 500)
        noise = torch.ones(500, 1, 1, 1, 1)
        x = trajectory(torch.zeros(1, 1, 1, 1), noise, schedule.alpha_bar_t).flatten()[:-1]
        torch.testing.assert_close(x, (1.0 - schedule.alpha_bar_t).sqrt().float(), rtol=1.2e-7, atol=0.0)


class TestReverseStep:
    @settings(max_examples=60, deadline=None)
    @given(ALPHA_BARS)
    def test_the_true_noise_predicts_the_picture(self, alpha_bar_t: float) -> None:
        x_0, noise = latents(), draw_noise([0, 1], 1, SHAPE)[0].double()
        x_t = noisy_latents(x_0, noise, alpha_bar_t)
        torch.testing.assert_close(predict_x0(x_t, noise, alpha_bar_t), x_0, rtol=1e-10, atol=1e-10)

    @settings(max_examples=60, deadline=None)
    @given(ALPHA_BARS, ALPHA_BARS, st.floats(0.0, 1.0))
    def test_a_step_keeps_the_noise_level(self, one: float, other: float, eta: float) -> None:
        """With the true eps, x_{t-1} has signal sqrt(alpha_bar_prev) and noise variance 1 - alpha_bar_prev."""
        alpha_bar_t, alpha_bar_prev = sorted((one, other))
        sigma_t = sigma(alpha_bar_t, alpha_bar_prev, eta)
        signal, noise = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
        x_t = noisy_latents(signal, noise, alpha_bar_t)
        mu_t = posterior_mean(x_t, noise, alpha_bar_t, alpha_bar_prev, sigma_t)
        assert float(mu_t[0]) == pytest.approx(alpha_bar_prev**0.5, rel=1e-9)
        assert float(mu_t[1]) ** 2 + sigma_t**2 == pytest.approx(1.0 - alpha_bar_prev, rel=1e-7, abs=1e-12)

    @settings(max_examples=60, deadline=None)
    @given(ALPHA_BARS)
    def test_v_and_eps_are_the_same_prediction(self, alpha_bar_t: float) -> None:
        """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0; public code took v for eps."""
        x_0, eps = latents(), draw_noise([0, 1], 1, SHAPE)[0].double()
        x_t = noisy_latents(x_0, eps, alpha_bar_t)
        v = alpha_bar_t**0.5 * eps - (1.0 - alpha_bar_t) ** 0.5 * x_0
        torch.testing.assert_close(eps_from_v(v, x_t, alpha_bar_t), eps, rtol=1e-12, atol=1e-12)
        assert (v - eps).abs().max() > 1e-3

    def test_takes_levels_as_numbers_or_as_tensors(self) -> None:
        x_t, eps = latents(), latents().flip(0)
        numbers = posterior_mean(x_t, eps, 0.3, 0.5, 0.2)
        tensors = posterior_mean(x_t, eps, *(torch.tensor(value, dtype=torch.float64) for value in (0.3, 0.5, 0.2)))
        torch.testing.assert_close(numbers, tensors, rtol=1e-14, atol=1e-14)


def written_out(i: int, x_t: Tensor, m: Tensor, last: Tensor, order: int, levels: list[Level]) -> Tensor:
    """SDE-DPM-Solver++ as its paper writes it: data prediction, midpoint, sde form; 1/(2 r) is at most 1/2."""
    alpha_t, alpha_next = levels[i].alpha_bar_t, levels[i].alpha_bar_prev
    h = log_snr(alpha_next) - log_snr(alpha_t)
    change = torch.zeros_like(m)
    if order == 2:
        r = (log_snr(alpha_t) - log_snr(levels[i - 1].alpha_bar_t)) / h
        change = min(1.0 / (2.0 * r), 0.5) * (m - last)
    s_t, s_next = (1.0 - alpha_t) ** 0.5, (1.0 - alpha_next) ** 0.5
    return s_next / s_t * math.exp(-h) * x_t + alpha_next**0.5 * (1.0 - math.exp(-2.0 * h)) * (m + change)


def log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1.0 - alpha_bar))


class TestSolver:
    """SDE-DPM-Solver++ of first and second order against the equations of [2211.01095]."""

    settings = InversionSettings(num_steps=10, skip=1, solver_order=2)

    def test_first_order_is_the_posterior_mean_with_eta_1(self) -> None:
        levels = replace(self.settings, solver_order=1).make_schedule().levels(1.0)
        for i, level in enumerate(levels):
            x_t, eps = latents(), latents().flip(0)
            m = predict_x0(x_t, eps, level.alpha_bar_t)
            mu_t = posterior_mean(x_t, eps, *level)
            torch.testing.assert_close(mu_t, written_out(i, x_t, m, m, 1, levels), rtol=1e-13, atol=1e-13)

    def test_second_order_between_a_first_and_a_last_step_of_first_order(self) -> None:
        solver, generator = Solver(self.settings), torch.Generator().manual_seed(3)
        last = torch.zeros(2, *SHAPE, dtype=torch.float64)
        for i, level in enumerate(solver.levels):
            x_t, eps = torch.randn(2, 2, *SHAPE, generator=generator, dtype=torch.float64)
            m = predict_x0(x_t, eps, level.alpha_bar_t)
            wanted = written_out(i, x_t, m, last, 1 if i in (0, 8) else 2, solver.levels)
            found = solver.mean(i, x_t, eps)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
            differs = float((found - posterior_mean(x_t, eps, *level)).abs().max())
            assert differs == 0.0 if i in (0, 8) else differs > 1e-3
            last = m

    def test_the_tables_one_long_interval_is_bounded(self) -> None:
        """stride + 1 -> 1 is several times as long as the interval before it: 1/(2 r) would be 2 and more."""
        levels = self.settings.make_schedule().levels(1.0)
        h = [log_snr(level.alpha_bar_prev) - log_snr(level.alpha_bar_t) for level in levels]
        assert h[-2] / (2.0 * h[-3]) > 1.0
        weight = self.settings.make_schedule().second_order_weights()[-2]
        signal, noise = levels[-2].alpha_bar_t ** 0.5, (1.0 - levels[-2].alpha_bar_t) ** 0.5
        assert weight == pytest.approx(0.5 * signal / noise)

    @pytest.mark.parametrize(("num_steps", "skip"), [(1, 0), (2, 0), (3, 2), (6, 0), (10, 1), (25, 4), (50, 0)])
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_what_is_not_edited_comes_back(self, num_steps: int, skip: int, dtype: torch.dtype, bound: float) -> None:
        """Theirs finds the last step's noise with order 2 and applies it with order 1: 28 % off at 10 steps."""
        inversion = replace(self.settings, num_steps=num_steps, skip=skip)
        x_0 = latents().to(dtype)
        noise = draw_noise([0, 1], inversion.executed_steps, SHAPE).to(dtype)
        x_T, residuals = invert(eps_model, {"": 0.0}, x_0, noise, inversion)
        x = edit(eps_model, {"": 0.0}, x_T, residuals, inversion, EditSettings())
        assert (x - x_0).abs().max() <= bound

    def test_a_last_level_without_noise_comes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """alpha_bar 1 behind the last step: std is 0 there and h infinite; a residual divided by std would be lost."""
        make = InversionSettings.make_schedule

        def clean(settings: InversionSettings) -> Schedule:
            schedule = make(settings)
            return replace(schedule, alpha_bar_prev=torch.cat([schedule.alpha_bar_prev[:-1], torch.ones(1).double()]))

        monkeypatch.setattr(InversionSettings, "make_schedule", clean)
        assert self.settings.make_schedule().levels(1.0)[-1].sigma_t == 0.0
        x_0, noise = latents(), draw_noise([0, 1], 9, SHAPE).double()
        x_T, residuals = invert(eps_model, {"": 0.0}, x_0, noise, self.settings)
        assert residuals[-1].abs().max() > 1e-2
        x = edit(eps_model, {"": 0.0}, x_T, residuals, self.settings, EditSettings())
        assert (x - x_0).abs().max() < 1e-12


class TestResiduals:
    """What the reverse steps add; every faulty form below is somebody's released code."""

    settings = InversionSettings(num_steps=20, skip=0)
    schedule = settings.make_schedule()

    def reconstruct(self, change: Callable[[Tensor], Tensor], eta: float = 1.0) -> float:
        x_0 = latents()
        noise = draw_noise([0, 1], 20, SHAPE).double()
        inversion = replace(self.settings, eta=eta)
        x_T, residuals = invert(eps_model, {"": 0.0}, x_0, noise, inversion)
        x = edit(eps_model, {"": 0.0}, x_T, change(residuals), inversion, EditSettings())
        return float((x - x_0).abs().max())

    def test_untouched_they_reconstruct(self) -> None:
        assert self.reconstruct(lambda residuals: residuals) < 1e-12

    def test_the_last_one_zeroed_loses_the_last_step(self) -> None:
        """The last residual is kept: zeroed, the reconstruction would lose its last step."""

        def zero_the_last(residuals: Tensor) -> Tensor:
            return torch.cat([residuals[:-1], torch.zeros_like(residuals[-1:])])

        assert self.reconstruct(zero_the_last) > 1e-2

    def test_they_exist_where_sigma_is_zero(self) -> None:
        """With eta 0 it would divide by zero, were z_t stored."""
        assert self.reconstruct(lambda residuals: residuals, eta=0.0) < 1e-12
        assert self.schedule.sigmas(0.0).max() == 0.0

    @pytest.mark.parametrize("eta", [0.3, 0.5])
    def test_eta_where_eta_squared_belongs_hides_behind_a_round_trip(self, eta: float) -> None:
        """With eta for eta^2 it reconstructs as well, which is why tests/oracle/test_schedule.py looks at the step."""
        i = 5
        alpha_bar_t, alpha_bar_prev, sigma_t = self.schedule.levels(eta)[i]
        x_t, x_prev = latents(), latents().flip(0)
        eps = eps_model(x_t, self.schedule.timesteps[i].expand(2), 0.0)
        full = sigma(alpha_bar_t, alpha_bar_prev, 1.0)
        pred_x0 = predict_x0(x_t, eps, alpha_bar_t)
        faulty = alpha_bar_prev**0.5 * pred_x0 + (1.0 - alpha_bar_prev - eta * full**2) ** 0.5 * eps
        assert (faulty + (x_prev - faulty) - x_prev).abs().max() < 1e-14
        mu_t = posterior_mean(x_t, eps, alpha_bar_t, alpha_bar_prev, sigma_t)
        assert (mu_t - faulty).abs().max() > 1e-2

    def test_half_precision_state_and_corrections_in_the_wrong_order_drift(self) -> None:
        """Faults 3 and 4: x_t and z_t in float16, and x_{t-1} corrected only after its own residual was taken."""
        drift_first = self.half_precision_error(range(20))
        drift_last = self.half_precision_error(range(19, -1, -1))
        ours = self.reconstruct(lambda residuals: residuals.float())
        assert ours < 1e-5
        assert drift_first > 100 * ours
        assert drift_last > 2 * drift_first

    def half_precision_error(self, order: range) -> float:
        """z_t and x_t in float16, x_{t-1} <- mu_t + sigma_t z_t on the way, in the given order of steps."""
        x_0, levels = latents(), self.schedule.levels(1.0)
        x = trajectory(x_0, draw_noise([0, 1], 20, SHAPE).double(), self.schedule.alpha_bar_t).half()
        z = torch.zeros_like(x[1:])

        def mean(x_t: Tensor, i: int) -> Tensor:
            eps = eps_model(x_t.double(), self.schedule.timesteps[i].expand(2), 0.0)
            return posterior_mean(x_t.double(), eps, *levels[i])

        for i in order:
            mu_t = mean(x[i], i)
            z[i] = ((x[i + 1] - mu_t) / levels[i].sigma_t).half()
            x[i + 1] = (mu_t + levels[i].sigma_t * z[i]).half()
        x_t = x[0]
        for i in range(20):
            x_t = (mean(x_t.half(), i) + levels[i].sigma_t * z[i]).half()
        return float((x_t.double() - x_0).abs().max())
