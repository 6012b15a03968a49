"""The same seed gives the same latent as ComfyUI's own samplers, schedules and noise.

`COMFYUI_PATH` names a checkout of ComfyUI, `COMFYUI_PYTHON` a Python that has its requirements (by default this one).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paralleldit.parallel_backend.sampling import driver, multistep, noise, schedules
from paralleldit.parallel_backend.sampling.model_sampling import DiscreteFlow, EpsPrediction, FluxFlow, VPrediction
from paralleldit.parallel_backend.sampling.samplers import SAMPLERS, NoiseKind
from paralleldit.parallel_backend.sampling.solver import Denoise, SolverContext
from paralleldit.tests.comfyui import sampling_host as host
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]

MODELS = {
    "flux": FluxFlow(),
    "schnell": DiscreteFlow(multiplier=1.0),
    "sd3": DiscreteFlow(shift=3.0),
    "eps": EpsPrediction(),
    "v_prediction": VPrediction(),
    "dit": EpsPrediction("sqrt_linear", 0.0001, 0.02),
}
TOLERANCE = 1e-5
ILL_CONDITIONED = {
    ("deis", "linear_quadratic"): 1e-4,
    ("lms", "linear_quadratic"): 5e-4,
}
"""(sampler, scheduler): the tolerance where the sampler's own weights amplify a last bit.

They are up to +466 and -428 of deis, and to 751 of lms for a flow and 118,162 for the table of DiT. ComfyUI's own lms
in fp32 is 2e-5 to 4e-4 from the same run in fp64; with coefficients integrated in fp64 it still is 2e-5 to 2e-4. In
fp64 there is no difference, as `test_lms_equals_native_in_fp64` shows.
"""


@pytest.fixture(scope="session")
def native(tmp_path_factory) -> dict[str, Tensor]:
    """What ComfyUI computes, by key."""
    target = tmp_path_factory.mktemp("native") / "results.safetensors"
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, "-W", "ignore", str(Path(host.__file__)), str(target)]
    env = os.environ | {"PYTHONPATH": str(Path(host.__file__).parent / "shim"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.returncode == 0, f"ComfyUI's side failed:\n{done.stderr[-3000:]}"
    return load_file(target)


def assert_close(ours: Tensor, theirs: Tensor, relative: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    scale = theirs.abs().max().clamp(min=1e-30)
    error = float((ours.to(theirs) - theirs).abs().max() / scale)
    assert error <= relative, f"{what}: relative error {error:.2e}"


def native_noise_source(native: dict[str, Tensor], like: Tensor, sigmas: Tensor, kind: NoiseKind) -> object:
    """Noise as the host draws it: ComfyUI before 2026 takes the run's own seed on the CPU."""
    if kind is not NoiseKind.GAUSSIAN:
        return noise.noise_source(kind, like, host.SEED, sigmas)
    for offset in (0, 1):
        first_draw = noise.GaussianNoise(like, host.SEED, offset)(sigmas[0], sigmas[1])
        if torch.equal(first_draw, native["noise/gaussian"]):
            return noise.GaussianNoise(like, host.SEED, offset)
    pytest.fail("ComfyUI draws the noise of ancestral samplers from neither the run's seed nor the next")


def our_latent(native: dict[str, Tensor], model_name: str, case: tuple) -> Tensor:
    sampler, scheduler, denoise, masked = case
    sampling = MODELS[model_name]

    negatives: list[Tensor] = []

    def model(x: Tensor, sigma: Tensor, step: driver.StepContext) -> Tensor:
        latent = sampling.calculate_input(sigma, x)
        positive, negative = (sampling.denoised(host.network(latent, sigma, prompt), x, sigma) for prompt in (1.0, 0.5))
        negatives[:] = [negative]
        return negative + (positive - negative) * host.CFG

    latent = host.sample_latent() if masked or denoise < 1 else torch.zeros(host.SHAPE)
    sigmas = schedules.sigmas_for(sampling, scheduler, host.SAMPLER_STEPS, denoise, sampler)
    job = driver.SamplingJob(
        sampler=sampler,
        model_sampling=sampling,
        sigmas=sigmas,
        noise=noise.initial_noise(host.SHAPE, torch.float32, host.SEED),
        latent=latent,
        seed=host.SEED,
        mask=driver.latent_mask(host.pixel_mask(), latent.shape) if masked else None,
        noise_source=native_noise_source(native, latent, sigmas, SAMPLERS[sampler].noise),
    )
    return driver.run(model, job, negative=lambda: negatives[0])


def test_noise_and_masks_equal_native(native) -> None:
    assert torch.equal(noise.initial_noise(host.SHAPE, torch.float32, host.SEED), native["noise"])
    indexed = noise.initial_noise(host.SHAPE, torch.float32, host.SEED, [5, 2])
    assert torch.equal(indexed, native["noise/batch_index"])
    assert torch.equal(driver.latent_mask(host.pixel_mask(), torch.Size(host.SHAPE)), native["mask"])
    assert torch.equal(driver.latent_mask(host.frame_masks(), torch.Size(host.VIDEO_SHAPE)), native["mask/video"])


@pytest.mark.parametrize("name", MODELS)
def test_model_sampling_equals_native(native, name: str) -> None:
    sampling = MODELS[name]
    times = host.time_grid(name)
    assert_close(sampling.sigmas, native[f"table/{name}"], 1e-6, "table")
    timesteps = torch.stack([sampling.timestep(sigma) for sigma in torch.tensor(host.SIGMA_GRID)]).double()
    assert_close(timesteps, native[f"timestep/{name}"], 1e-6, "timestep")
    assert_close(torch.stack([sampling.sigma(time) for time in times]), native[f"sigma/{name}"], 1e-6, "sigma")
    for percent, theirs in zip(host.PERCENT_GRID, native[f"percent/{name}"], strict=True):
        assert math.isclose(sampling.percent_to_sigma(percent), float(theirs), rel_tol=1e-6), percent


@pytest.mark.parametrize("name", MODELS)
def test_sigmas_equal_native(native, name: str) -> None:
    for case in host.SCHEDULES:
        theirs = native[host.case_key("sigmas", name, case)]
        if theirs.isnan().any():
            assert case[0] == "kl_optimal", f"{case}: native sigmas are NaN"
            continue
        assert torch.equal(schedules.sigmas_for(MODELS[name], *case), theirs), case


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_run_equal_native(native, name: str) -> None:
    for scheduler, sampler, part in host.PARTS:
        whole = schedules.sigmas_for(MODELS[name], scheduler, host.SAMPLER_STEPS, sampler=sampler)
        levels = schedules.part_of(whole, *part)
        theirs = native[host.case_key("part", name, (scheduler, sampler, part))]
        assert torch.equal(levels if len(levels) > 1 else torch.empty(0), theirs), (scheduler, sampler, part)


@pytest.mark.parametrize("name", MODELS)
def test_lms_equals_native_in_fp64(native, name: str) -> None:
    sampling = MODELS[name]

    def predict(call: Denoise) -> Tensor:
        latent = sampling.calculate_input(call.sigma, call.x)
        positive, negative = (
            sampling.denoised(host.network(latent, call.sigma, prompt), call.x, call.sigma) for prompt in (1.0, 0.5)
        )
        return negative + (positive - negative) * host.CFG

    sigmas = schedules.sigmas_for(sampling, "linear_quadratic", host.SAMPLER_STEPS).double()
    x = noise.initial_noise(host.SHAPE, torch.float32, host.SEED).double() * sigmas[0]
    context = SolverContext(sampling, lambda sigma, sigma_next: torch.zeros_like(x))
    ours = driver.drive(multistep.lms(x, sigmas, context), predict)
    assert_close(ours, native[f"lms in fp64/{name}"], 1e-9, name)


@pytest.mark.parametrize("name", host.SAMPLED_MODELS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_equal_native(native, name: str, sampler: str) -> None:
    for case in host.RUNS:
        if case[0] == sampler:
            key = host.case_key("latent", name, case)
            if key not in native:
                pytest.skip(f"this ComfyUI has no sampler {sampler}")
            theirs = native[key]
            assert theirs.isfinite().all(), f"{name} {case}: the native latent is not finite"
            tolerance = ILL_CONDITIONED.get(case[:2], TOLERANCE)
            assert_close(our_latent(native, name, case), theirs, tolerance, f"{name} {case}")
