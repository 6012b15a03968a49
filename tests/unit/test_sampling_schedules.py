"""Schedules and model sampling without ComfyUI; the numbers below are what ComfyUI 0.3.64 computes."""

from __future__ import annotations

import pytest
import torch
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.sampling.model_sampling import (
    DiscreteFlow,
    EpsPrediction,
    FluxFlow,
    ModelSampling,
    VPrediction,
)
from paralleldit.parallel_backend.sampling.schedules import SCHEDULERS, part_of, sigmas_for

MODELS = {"flux": FluxFlow(), "sd3": DiscreteFlow(shift=3.0), "eps": EpsPrediction()}

KNOWN = [
    ("flux", "simple", [1.0, 0.9045308, 0.7595109, 0.5128441, 0.0], [0.8633382, 0.7595109, 0.6123385, 0.0]),
    ("flux", "sgm_uniform", [1.0, 0.9045671, 0.7596263, 0.5131596, 0.0], [0.8633764, 0.7596263, 0.6124921, 0.0]),
    ("flux", "karras", [1.0, 0.1635048, 0.0141184, 0.0003158, 0.0], [0.1067819, 0.0247968, 0.0039102, 0.0]),
    ("flux", "exponential", [1.0, 0.068095, 0.0046369, 0.0003158, 0.0], [0.0397867, 0.0079361, 0.001583, 0.0]),
    ("flux", "ddim_uniform", [0.9046229, 0.759657, 0.5131105, 0.0006314, 0.0], [0.7595109, 0.6123385, 0.3873469, 0.0]),
    ("flux", "beta", [1.0, 0.9367757, 0.759584, 0.4024983, 0.0], [0.8925824, 0.759584, 0.545649, 0.0]),
    ("flux", "normal", [1.0, 0.8633764, 0.6124921, 0.0009965, 0.0], [0.8257774, 0.6781591, 0.4415888, 0.0]),
    ("flux", "linear_quadratic", [1.0, 0.9875, 0.975, 0.725, 0.0], [0.9833333, 0.975, 0.8611111, 0.0]),
    ("flux", "kl_optimal", [1.0, 0.5774906, 0.2681748, 0.0003158, 0.0], [0.5096846, 0.3251292, 0.1586434, 0.0]),
    ("sd3", "simple", [1.0, 0.9, 0.75, 0.5, 0.0], [0.8573264, 0.75, 0.6007194, 0.0]),
    ("sd3", "sgm_uniform", [1.0, 0.900359, 0.7511211, 0.5029851, 0.0], [0.8576924, 0.7511211, 0.6021506, 0.0]),
    ("sd3", "karras", [1.0, 0.2327368, 0.0368317, 0.002994, 0.0], [0.1670026, 0.0554764, 0.01499, 0.0]),
    ("sd3", "exponential", [1.0, 0.1441289, 0.0207732, 0.002994, 0.0], [0.0978366, 0.0306022, 0.009572, 0.0]),
    ("sd3", "ddim_uniform", [0.9009585, 0.751497, 0.5026596, 0.0059761, 0.0], [0.75, 0.6007194, 0.3772455, 0.0]),
    ("sd3", "beta", [1.0, 0.9335348, 0.7507493, 0.3921714, 0.0], [0.8877552, 0.7507493, 0.5335051, 0.0]),
    ("sd3", "normal", [1.0, 0.8576924, 0.6021506, 0.0089286, 0.0], [0.8189233, 0.6683267, 0.4322251, 0.0]),
    ("sd3", "linear_quadratic", [1.0, 0.9875, 0.975, 0.725, 0.0], [0.9833333, 0.975, 0.8611111, 0.0]),
    ("sd3", "kl_optimal", [1.0, 0.5786816, 0.2700896, 0.002994, 0.0], [0.511035, 0.3269069, 0.1608406, 0.0]),
    ("eps", "simple", [14.6146412, 4.0817294, 1.6128862, 0.6932049, 0.0], [2.9183071, 1.6128862, 0.932358, 0.0]),
    ("eps", "sgm_uniform", [14.6146402, 4.086081, 1.6155803, 0.6951495, 0.0], [2.9183071, 1.6155803, 0.932358, 0.0]),
    ("eps", "karras", [14.6146431, 3.1686049, 0.4469186, 0.0291672, 0.0], [2.2321544, 0.6925706, 0.1697566, 0.0]),
    ("eps", "exponential", [14.6146402, 1.8400236, 0.2316642, 0.0291672, 0.0], [1.2157114, 0.3506322, 0.1011284, 0.0]),
    ("eps", "ddim_uniform", [4.1166964, 1.623692, 0.6983981, 0.0413144, 0.0], [1.6128862, 0.932358, 0.4946969, 0.0]),
    ("eps", "beta", [14.6146412, 5.6865916, 1.6182789, 0.5153906, 0.0], [3.6757534, 1.6182789, 0.7624023, 0.0]),
    ("eps", "normal", [14.6146402, 2.9183071, 0.932358, 0.0291672, 0.0], [2.2797306, 1.1628646, 0.5711889, 0.0]),
    (
        "eps",
        "linear_quadratic",
        [14.6146412, 14.4319582, 14.2492752, 10.5956154, 0.0],
        [14.3710642, 14.2492752, 12.5848303, 0.0],
    ),
    ("eps", "kl_optimal", [14.6146326, 1.5970659, 0.5729142, 0.0291672, 0.0], [1.2947674, 0.7116267, 0.3356374, 0.0]),
]
"""(model, scheduler, 4 steps, 3 steps at denoise 0.6 for a sampler that discards the level before the last)"""


@pytest.mark.parametrize(("model", "scheduler", "full", "partial"), KNOWN)
def test_levels_are_those_of_comfyui(model: str, scheduler: str, full: list, partial: list) -> None:
    close = {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(sigmas_for(MODELS[model], scheduler, 4), torch.tensor(full), **close)
    torch.testing.assert_close(sigmas_for(MODELS[model], scheduler, 3, 0.6, "dpm_2"), torch.tensor(partial), **close)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("model", MODELS)
def test_levels_fall_to_zero_in_the_steps_asked_for(model: str, scheduler: str) -> None:
    for steps in (1, 2, 5, 20, 50):
        for denoise in (1.0, 0.6, 0.1):
            sigmas = sigmas_for(MODELS[model], scheduler, steps, denoise)
            assert sigmas.dtype == torch.float32
            assert (sigmas.diff() < 0).all()
            assert sigmas[-1] == 0
            if not (scheduler == "ddim_uniform" and denoise == 1.0):
                assert len(sigmas) == steps + 1


FOUR = [1.0, 0.9, 0.75, 0.5, 0.0]


@pytest.mark.parametrize(
    ("start", "end", "leftover_noise", "levels"),
    [
        (0, 10_000, False, FOUR),
        (0, 4, True, FOUR),
        (1, 10_000, False, FOUR[1:]),
        (0, 2, True, FOUR[:3]),
        (0, 2, False, [1.0, 0.9, 0.0]),
        (1, 3, True, [0.9, 0.75, 0.5]),
        (1, 3, False, [0.9, 0.75, 0.0]),
        (2, 2, True, [0.75]),
        (4, 10_000, False, [0.0]),
        (7, 9, False, []),
        (0, 0, False, [0.0]),
    ],
)
def test_a_part_of_a_run_has_the_levels_of_its_steps(start, end, leftover_noise, levels) -> None:
    assert part_of(torch.tensor(FOUR), start, end, leftover_noise).tolist() == pytest.approx(levels)


@pytest.mark.parametrize(("start", "end"), [(3, 2), (-1, 2), (1, 0)])
def test_a_part_that_ends_before_it_starts_is_refused_with_both_steps(start: int, end: int) -> None:
    with pytest.raises(UserError, match=f"from step {start} to step {end}") as error:
        part_of(torch.tensor(FOUR), start, end, leftover_noise=False)
    assert f"at most {end}" in error.value.hint


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_schedule_that_would_never_end_is_refused(scheduler: str) -> None:
    with pytest.raises(UserError, match="at most 1000000 are made"):
        sigmas_for(FluxFlow(), scheduler, 10_000, denoise=1e-320)


def test_nothing_to_denoise_gives_no_levels() -> None:
    assert len(sigmas_for(FluxFlow(), "simple", 4, denoise=0.0)) == 0


@pytest.mark.parametrize(
    ("scheduler", "steps", "sampler", "message"),
    [
        ("karas", 4, "euler", "'karas'.*karras"),
        ("simple", 0, "euler", "at least 1 step, not 0"),
        ("simple", 4, "eular", "'eular'.*euler"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(scheduler: str, steps: int, sampler: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sigmas_for(FluxFlow(), scheduler, steps, sampler=sampler)


@pytest.mark.parametrize("kind", [FluxFlow, DiscreteFlow, EpsPrediction, VPrediction])
def test_clock_and_level_are_each_others_inverse(kind: type[ModelSampling]) -> None:
    model = kind()
    table = model.sigmas
    levels = table[[0, len(table) // 3, len(table) // 2, len(table) - 1]]
    times = torch.stack([model.timestep(level) for level in levels])
    assert (times.diff() > 0).all()
    if issubclass(kind, EpsPrediction):
        back = torch.stack([model.sigma(time) for time in times])
        torch.testing.assert_close(back, levels)
    else:
        torch.testing.assert_close(model.sigma(model.timestep(torch.tensor(1.0))), torch.tensor(1.0))
    assert model.percent_to_sigma(1.0) == 0.0
    assert model.percent_to_sigma(0.3) > model.percent_to_sigma(0.7)


@pytest.mark.parametrize("model", [FluxFlow(), DiscreteFlow(3.0), EpsPrediction(), VPrediction()], ids=str)
@pytest.mark.parametrize("sigma", [torch.tensor(0.4), torch.tensor([0.4, 0.7])], ids=["scalar", "per sample"])
def test_perfect_output_denoises_to_the_latent(model, sigma: torch.Tensor) -> None:
    """The prediction types: what the model has to say, for x made of a latent and noise, to mean that latent."""
    latent, noise = torch.randn(2, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    x = model.noise_scaling(sigma, noise, latent)
    level = sigma.view(-1, 1, 1, 1)
    if isinstance(model, VPrediction):
        output = (noise - level * latent) / torch.sqrt(level**2 + 1)
    elif isinstance(model, EpsPrediction):
        output = noise
    else:
        output = noise - latent
    torch.testing.assert_close(model.denoised(output, x, sigma), latent, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.sigma_from_half_log_snr(model.half_log_snr(sigma)), sigma)


def test_flux_shift_and_schnell_clock() -> None:
    shifted = FluxFlow().sigma(torch.tensor(0.5))
    assert float(shifted) == pytest.approx(2.718281828**1.15 / (2.718281828**1.15 + 1), rel=1e-6)
    schnell = DiscreteFlow(shift=1.0, multiplier=1.0)
    assert float(schnell.timestep(torch.tensor(0.25))) == 0.25
    assert float(DiscreteFlow(shift=3.0).timestep(torch.tensor(0.25))) == 250.0
