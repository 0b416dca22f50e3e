"""The noise schedule: its tables, its limits, and the last step that public code tends to get wrong."""

import pytest
import torch

from ledits_min.config import ScheduleConfig
from ledits_min.errors import InputError
from ledits_min.schedule import Level, make_schedule, sigma, sqrt


def test_published_numbers() -> None:
    schedule = make_schedule(ScheduleConfig(), 50)
    assert len(schedule.timesteps) == 50
    assert schedule.timesteps.tolist() == list(range(981, 0, -20))
    assert schedule.timesteps.dtype == torch.int64
    assert float(schedule.alphas_cumprod[0]) == pytest.approx(0.99914998, abs=3e-8)
    assert float(schedule.alphas_cumprod[999]) == pytest.approx(0.00466010, abs=3e-8)


@pytest.mark.parametrize(("beta_start", "beta_end"), [(1e-300, 0.012), (0.00085, 0.999), (1e-8, 1e-8)])
def test_a_schedule_that_reaches_pure_noise_or_never_leaves_the_picture_is_refused(
    beta_start: float, beta_end: float
) -> None:
    with pytest.raises(InputError, match="pure picture or pure noise"):
        make_schedule(ScheduleConfig(beta_start=beta_start, beta_end=beta_end), 50)


def test_tables_are_float64() -> None:
    schedule = make_schedule(ScheduleConfig(), 20)
    tables = (schedule.alpha_bar_t, schedule.alpha_bar_prev, schedule.alphas_cumprod, schedule.sigmas(0.5))
    assert {table.dtype for table in tables} == {torch.float64}


@pytest.mark.parametrize("offset", [0, 1])
def test_every_number_of_steps(offset: int) -> None:
    config = ScheduleConfig(steps_offset=offset)
    for num_steps in range(1, 501):
        schedule = make_schedule(config, num_steps)
        assert len(schedule.timesteps) == num_steps
        assert schedule.timesteps.diff().lt(0).all()
        assert schedule.timesteps[-1] == offset
        assert schedule.timesteps[0] <= 999
        assert schedule.t_prev.tolist() == [*schedule.timesteps[1:].tolist(), -1]
        assert torch.equal(schedule.alpha_bar_t, schedule.alphas_cumprod[schedule.timesteps])
        assert torch.equal(schedule.alpha_bar_prev[:-1], schedule.alpha_bar_t[1:])
        assert schedule.alpha_bar_prev[-1] == schedule.alphas_cumprod[0]
        # What the posterior mean takes the root of.
        assert (1.0 - schedule.alpha_bar_prev - schedule.sigmas(1.0) ** 2).min() >= 0.0


@pytest.mark.parametrize("num_steps", [0, -1, 501, 1000])
def test_too_few_or_too_many_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(InputError, match=rf"num_steps is {num_steps}.*1 .. 500"):
        make_schedule(ScheduleConfig(), num_steps)


@pytest.mark.parametrize("skip", [-1, 10, 11])
def test_steps_are_left_to_run(skip: int) -> None:
    assert len(make_schedule(ScheduleConfig(), 10, 9).timesteps) == 1
    with pytest.raises(InputError, match=rf"skip is {skip}; it must lie in 0 .. 9"):
        make_schedule(ScheduleConfig(), 10, skip)


def test_the_last_sigma_is_not_zero() -> None:
    """set_alpha_to_one is false: alpha_bar after the last step is alphas_cumprod[0], not 1."""
    schedule = make_schedule(ScheduleConfig(), 50)
    assert float(schedule.sigmas(1.0)[-1]) == pytest.approx(0.0206, abs=5e-5)
    assert sigma(float(schedule.alpha_bar_t[-1]), 1.0, eta=1.0) == 0.0  # the faulty form


def test_sigma_is_the_posterior_deviation_of_ddpm_at_eta_one() -> None:
    """beta_tilde = (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta  between neighbours [2006.11239, Eq. 7]."""
    schedule = make_schedule(ScheduleConfig(), 100)
    beta = 1.0 - schedule.alpha_bar_t / schedule.alpha_bar_prev
    beta_tilde = (1.0 - schedule.alpha_bar_prev) / (1.0 - schedule.alpha_bar_t) * beta
    torch.testing.assert_close(schedule.sigmas(1.0) ** 2, beta_tilde, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(schedule.sigmas(0.3), 0.3 * schedule.sigmas(1.0), rtol=1e-12, atol=0.0)
    assert not schedule.sigmas(0.0).any()


@pytest.mark.parametrize("skip", [0, 1, 18, 49])
def test_what_is_skipped_is_not_there(skip: int) -> None:
    """The executed steps alone, each as it is without a skip."""
    whole, rest = make_schedule(ScheduleConfig(), 50), make_schedule(ScheduleConfig(), 50, skip)
    assert len(rest.timesteps) == 50 - skip
    for name in ("timesteps", "t_prev", "alpha_bar_t", "alpha_bar_prev"):
        assert torch.equal(getattr(rest, name), getattr(whole, name)[skip:]), name
    assert torch.equal(rest.alphas_cumprod, whole.alphas_cumprod)
    assert rest.levels(0.5) == whole.levels(0.5)[skip:]


def test_levels_are_the_tables_step_by_step() -> None:
    schedule = make_schedule(ScheduleConfig(), 10, 3)
    columns = schedule.alpha_bar_t, schedule.alpha_bar_prev, schedule.sigmas(0.7)
    levels = schedule.levels(0.7)
    assert levels == [Level(*numbers) for numbers in torch.stack(columns, dim=1).tolist()]
    assert all(type(number) is float for level in levels for number in level)


def test_scalars_and_tensors_agree() -> None:
    schedule = make_schedule(ScheduleConfig(), 10)
    for i in range(10):
        alpha_bar_t, alpha_bar_prev = float(schedule.alpha_bar_t[i]), float(schedule.alpha_bar_prev[i])
        assert sigma(alpha_bar_t, alpha_bar_prev, 0.7) == pytest.approx(float(schedule.sigmas(0.7)[i]), rel=1e-13)
    assert sqrt(2.25) == 1.5
    assert sqrt(torch.tensor(2.25)) == 1.5
