"""The serial driver and the noise: what a run does with its seed, latent, mask and parts, and how it fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.sampling.driver import SamplingJob, StepContext, latent_mask, run
from paralleldit.parallel_backend.sampling.model_sampling import EpsPrediction, FluxFlow
from paralleldit.parallel_backend.sampling.noise import (
    BrownianNoise,
    GaussianNoise,
    NoiseKind,
    SlicedNoise,
    initial_noise,
)
from paralleldit.parallel_backend.sampling.samplers import SAMPLERS
from paralleldit.parallel_backend.sampling.schedules import part_of, sigmas_for
from torch import Tensor

SHAPE = (3, 2, 4, 4)
SEED = 11
NEGATIVE = torch.linspace(-0.5, 0.5, 96).view(SHAPE)
"""What the negative prompt predicts, at every step: for the samplers of CFG++."""
FLOW, EPS = FluxFlow(), EpsPrediction()


def model(x: Tensor, sigma: Tensor, step: StepContext) -> Tensor:
    return torch.tanh(x) / (1 + sigma)


def job(sampler: str = "euler", model_sampling=FLOW, steps: int = 4, denoise: float = 1.0, **changes) -> SamplingJob:
    return SamplingJob(
        **{
            "sampler": sampler,
            "model_sampling": model_sampling,
            "sigmas": sigmas_for(model_sampling, "simple", steps, denoise, sampler),
            "noise": initial_noise(SHAPE, torch.float32, SEED),
            "latent": torch.linspace(-1, 1, 96).view(SHAPE),
            "seed": SEED,
            **changes,
        }
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_progress_comes_once_a_step_and_the_model_knows_its_step(sampler: str) -> None:
    told, asked = [], []

    def watching(x: Tensor, sigma: Tensor, step: StepContext) -> Tensor:
        asked.append((step.index, step.evaluation))
        assert step.total == 4
        return model(x, sigma, step)

    def on_step(step: int, total: int, denoised: Tensor, x: Tensor, sigma: Tensor) -> None:
        told.append((step, total, denoised.shape == x.shape, sigma.ndim))

    run(watching, job(sampler), on_step, lambda: NEGATIVE)
    steps = [index for index, evaluation in asked if evaluation == 0]
    assert told == [(step, 4, True, 0) for step in steps]
    # An adaptive one goes on in its last step until the end.
    assert (sorted(set(steps)) if sampler == "dpm_adaptive" else steps) == [0, 1, 2, 3]


@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if sampler.elementwise])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_a_batch_are_the_parts_of_the_whole_run(sampler: str, masked: bool) -> None:
    mask = (torch.arange(16).view(1, 4, 4) % 3 == 0).float()
    whole_job = job(sampler, denoise=0.7, mask=latent_mask(mask, torch.Size(SHAPE)) if masked else None)
    parts = [
        run(model, replace(whole_job, part=part), negative=lambda part=part: NEGATIVE[part])
        for part in (slice(0, 1), slice(1, 3))
    ]
    whole = run(model, whole_job, negative=lambda: NEGATIVE)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "uni_pc", "dpmpp_2m_sde"])
def test_masked_area_keeps_the_latent(sampler: str) -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    held = job(sampler, denoise=0.6, mask=mask)
    sampled = run(model, held)
    # uni_pc stops at sigma 0.001, where a trace of noise is left.
    torch.testing.assert_close(sampled[..., :2], held.latent[..., :2], rtol=0, atol=5e-3)
    assert (sampled[..., 2:] - held.latent[..., 2:]).abs().max() > 0.1


def test_full_flow_run_forgets_the_latent_and_a_partial_run_does_not() -> None:
    for denoise, same in ((1.0, True), (0.5, False)):
        given = run(model, job(denoise=denoise))
        empty = run(model, job(denoise=denoise, latent=torch.zeros(SHAPE)))
        assert torch.allclose(given, empty) is same


def test_run_from_the_highest_level_starts_with_unit_signal_to_noise_of_the_model() -> None:
    """ComfyUI's rule: from sigma_max the noise is scaled by sqrt(1 + sigma^2), from lower levels by sigma."""
    first = []

    def watching(x: Tensor, sigma: Tensor, step: StepContext) -> Tensor:
        if step.index == 0:
            first.append((x, float(sigma)))
        return model(x, sigma, step)

    for denoise in (1.0, 0.5):
        empty = job(model_sampling=EPS, denoise=denoise, latent=torch.zeros(SHAPE))
        run(watching, empty)
    noise = initial_noise(SHAPE, torch.float32, SEED)
    (full, highest), (partial, level) = first
    torch.testing.assert_close(full, noise * (1 + highest**2) ** 0.5)
    torch.testing.assert_close(partial, noise * level)


@pytest.mark.parametrize("model_sampling", [FLOW, EPS], ids=["flow", "eps"])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "dpm_2"])
def test_two_parts_of_a_run_are_the_whole_where_the_first_leaves_its_noise(sampler: str, model_sampling) -> None:
    whole = job(sampler, model_sampling)
    first = run(model, replace(whole, sigmas=part_of(whole.sigmas, 0, 2, leftover_noise=True)))
    rest = {"noise": torch.zeros(SHAPE), "sigmas": part_of(whole.sigmas, 2, 4, leftover_noise=False)}
    torch.testing.assert_close(run(model, replace(whole, latent=first, **rest)), run(model, whole))


def test_no_steps_return_the_latent() -> None:
    nothing = job(denoise=0.0)
    assert torch.equal(run(model, nothing), nothing.latent)


def test_half_precision_latents_are_sampled_in_fp32() -> None:
    half = job(latent=torch.zeros(SHAPE, dtype=torch.float16), noise=torch.ones(SHAPE, dtype=torch.bfloat16))
    assert run(model, half).dtype == torch.float32


def breaks_at(step_index: int):
    def broken(x: Tensor, sigma: Tensor, step: StepContext) -> Tensor:
        return model(x, sigma, step) * (float("nan") if step.index == step_index else 1.0)

    return broken


FAILURES = {
    "unknown sampler": (model, {"sampler": "eular", "sigmas": torch.tensor([1.0, 0.0])}, r"'eular'.*euler_ancestral"),
    "not finite": (
        breaks_at(2),
        {},
        r"prediction is not finite at step 3 of 4 \(sigma 0\.\d+\): it holds NaN.*bfloat16",
    ),
    "sampler breaks down": (
        model,
        {"sampler": "uni_pc", "sigmas": torch.tensor([1.0, 0.5, 1e-5, 5e-6, 0.0])},
        r"latent is not finite.*sampler's own numbers.*euler",
    ),
    "rising sigmas": (model, {"sigmas": torch.tensor([0.5, 0.7, 0.0])}, r"do not fall.*0\.5, 0\.7, 0\.0"),
    "many sigmas": (
        model,
        {"sigmas": torch.cat((torch.linspace(1, 0.5, 3000), torch.tensor([0.7, 0.0])))},
        r"do not fall.{0,20}: … 0\.5\d*, 0\.5\d*, 0\.5, 0\.7, 0\.0, wrong at number 3000 of 3001",
    ),
    "NaN in sigmas": (model, {"sigmas": torch.tensor([1.0, float("nan"), 0.0])}, "do not fall.*nan"),
    "more than noise": (
        model,
        {"sampler": "dpmpp_sde", "sigmas": torch.tensor([20.0, 5.0, 0.0])},
        r"dpmpp_sde.*logarithm.*20\.0, 5\.0, 0\.0.*euler",
    ),
    "too few steps": (model, {"sampler": "uni_pc", "sigmas": torch.tensor([1.0, 0.0])}, "at least 2 steps.* 1"),
    "noise of another shape": (model, {"noise": torch.zeros(1, 2, 4, 4)}, r"\[1, 2, 4, 4\].*\[3, 2, 4, 4\]"),
    "empty latent": (
        model,
        {"latent": torch.zeros(0, 2, 4, 4), "noise": torch.zeros(0, 2, 4, 4)},
        r"latent is empty.*\[0, 2, 4, 4\]",
    ),
}


@pytest.mark.parametrize(("broken_model", "changes", "message"), FAILURES.values(), ids=FAILURES)
def test_failures_name_what_is_wrong(broken_model, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        run(broken_model, replace(job(), **changes))


@pytest.mark.parametrize(
    "mask", [torch.ones(8), torch.ones(()), torch.ones(0, 1, 4, 4), torch.full((4, 4), torch.nan)], ids=str
)
def test_a_mask_that_is_no_picture_is_refused(mask: Tensor) -> None:
    with pytest.raises(UserError, match="noise_mask"):
        latent_mask(mask, torch.Size(SHAPE))


def test_same_seed_same_latent_and_other_seed_other_latent() -> None:
    for sampler in SAMPLERS:
        latents = [
            run(
                model,
                job(sampler, seed=seed, noise=initial_noise(SHAPE, torch.float32, seed)),
                negative=lambda: NEGATIVE,
            )
            for seed in (5, 5, 6)
        ]
        assert torch.equal(latents[0], latents[1]), sampler
        assert not torch.allclose(latents[0], latents[2], atol=1e-3), sampler


def test_batch_index_redraws_a_member_of_a_batch() -> None:
    alone = initial_noise((1, 2, 4, 4), torch.float32, SEED, [2])
    together = initial_noise(SHAPE, torch.float32, SEED, [0, 2, 0])
    assert torch.equal(together[1:2], alone)
    assert torch.equal(together[0], together[2])
    torch.random.manual_seed(SEED)
    draws = [torch.randn(1, 2, 4, 4) for _ in range(3)]
    assert torch.equal(alone, draws[2])


@pytest.mark.parametrize("batch_index", [[0, 1], [0, 1, -1]])
def test_batch_index_that_does_not_fit_is_refused(batch_index: list[int]) -> None:
    with pytest.raises(UserError, match=r"batch_index .* batch of 3"):
        initial_noise(SHAPE, torch.float32, SEED, batch_index)


def test_noise_of_half_precision_latents_is_that_of_fp32_ones_rounded() -> None:
    for numbers in (None, [0, 2, 1]):
        half, whole = (initial_noise(SHAPE, dtype, SEED, numbers) for dtype in (torch.float16, torch.float32))
        assert torch.equal(half, whole.half())


def test_initial_noise_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    initial_noise(SHAPE, torch.float32, SEED)
    assert torch.equal(before, torch.random.get_rng_state())


def test_largest_seed_works_for_every_noise() -> None:
    like, sigmas = torch.zeros(SHAPE), torch.tensor([1.0, 0.5, 0.0])
    for source in (GaussianNoise(like, 2**64 - 1), BrownianNoise(like, 2**64 - 1, sigmas)):
        assert torch.isfinite(source(sigmas[0], sigmas[1])).all()


def test_ancestral_noise_does_not_repeat_the_initial_noise() -> None:
    fresh = GaussianNoise(torch.zeros(SHAPE), SEED)(torch.tensor(1.0), torch.tensor(0.5))
    assert not torch.allclose(fresh, initial_noise(SHAPE, torch.float32, SEED), atol=0.1)


def test_brownian_noise_adds_up_over_intermediate_levels() -> None:
    levels = torch.tensor([1.0, 0.6, 0.25])
    path = BrownianNoise(torch.zeros(1, 1, 32, 32), SEED, levels)
    high, middle, low = levels
    whole = path(high, low) * (high - low).sqrt()
    halves = path(high, middle) * (high - middle).sqrt() + path(middle, low) * (middle - low).sqrt()
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-4)
    assert float(path(high, low).std()) == pytest.approx(1.0, abs=0.1)


def test_shared_draws_are_kept_until_every_part_had_them_and_no_longer() -> None:
    count = iter(range(10))
    shared = SlicedNoise(
        lambda sigma, sigma_next: torch.full((4,), float(next(count))), [lambda draw: draw[:1], lambda draw: draw[1:]]
    )
    first, second = shared.part(0), shared.part(1)
    sigma = torch.tensor(1.0)
    assert [first(sigma, sigma).tolist() for _ in range(3)] == [[0.0], [1.0], [2.0]]
    assert [second(sigma, sigma).tolist() for _ in range(3)] == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    assert not shared._draws


DRAWN_ON_THE_CPU = (NoiseKind.NONE, NoiseKind.BROWNIAN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if sampler.noise in DRAWN_ON_THE_CPU])
def test_cuda_gives_the_latent_of_the_cpu(sampler: str) -> None:
    host = job(sampler)
    device = replace(host, noise=host.noise.cuda(), latent=host.latent.cuda())
    sampled = run(model, device, negative=NEGATIVE.cuda).cpu()
    torch.testing.assert_close(sampled, run(model, host, negative=lambda: NEGATIVE), rtol=1e-4, atol=1e-4)
