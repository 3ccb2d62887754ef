"""Noise schedules: their ends, and samplers against data whose best prediction is known."""

import pytest
import torch

from moesaic.nn.noise_schedule import DDPM, RectifiedFlow, denoise

SCHEDULES = {
    "flow": RectifiedFlow(),
    "linear": DDPM(),
    "few-steps": DDPM(steps=50),
    "cosine": DDPM(betas="cosine"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_zero_is_clean_and_time_one_is_noise(name):
    clean, noise = torch.randn(3, 5), torch.randn(3, 5)
    schedule = SCHEDULES[name]
    start = schedule.noisy(clean, noise=noise, time=torch.zeros(3))
    assert torch.allclose(start, clean, atol=1e-3)
    end = schedule.noisy(clean, noise=noise, time=torch.ones(3))
    assert torch.allclose(end, noise, atol=0.03)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_with_the_true_prediction_lies_on_the_path_of_that_noise(name):
    clean, noise = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    schedule = SCHEDULES[name]
    x = schedule.noisy(clean, noise=noise, time=torch.full((4,), 0.6))
    moved = schedule.step(x, prediction=schedule.target(clean, noise=noise), time=0.6, to=0.25)
    expected = schedule.noisy(clean, noise=noise, time=torch.full((4,), 0.25))
    assert torch.allclose(moved, expected, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_of_a_normal_distribution_have_its_mean_and_deviation(name):
    """For normal data the best prediction is linear in x, so the whole sampler has an answer."""
    mean, deviation, schedule = 0.7, 0.5, SCHEDULES[name]
    generator = torch.Generator().manual_seed(1)

    def predict(x, time):
        # E[target | x] from the joint normal distribution of target and x at this time
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        a = schedule.noisy(one, noise=zero, time=time)
        b = schedule.noisy(zero, noise=one, time=time)
        c = schedule.target(one, noise=zero)
        d = schedule.target(zero, noise=one)
        slope = (a * c * deviation**2 + b * d) / (a**2 * deviation**2 + b**2)
        return c * mean + slope * (x - a * mean)

    noise = torch.randn(20_000, 1, dtype=torch.float64, generator=generator)
    sample = denoise(noise, predict=predict, schedule=schedule, steps=200)
    assert abs(float(sample.mean()) - mean) < 0.03
    assert abs(float(sample.std()) - deviation) < 0.03
