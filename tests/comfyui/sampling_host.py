"""Samples with ComfyUI's own code and writes what it got: run by `test_sampling_parity.py` with the host's Python.

COMFYUI_PATH=... python sampling_host.py RESULTS.safetensors
"""

from __future__ import annotations

import itertools
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "conftest.py"))
from paralleldit.parallel_backend.sampling.names import SAMPLER_NAMES, SCHEDULER_NAMES

MODELS = ("flux", "schnell", "sd3", "eps", "v_prediction", "dit")
SAMPLED_MODELS = ("flux", "sd3", "eps", "v_prediction")
SAMPLER_STEPS = 6
SEED = 1234567
SHAPE = (2, 3, 4, 5)
VIDEO_SHAPE = (2, 3, 4, 8, 6)
CFG = 3.0
SCHEDULES = tuple(itertools.product(SCHEDULER_NAMES, (1, 2, 3, 4, 7, 20, 28, 50), (1.0, 0.6, 0.05), ("euler", "dpm_2")))
"""(scheduler, steps, denoise, sampler)"""

PARTS = (
    *itertools.product(
        ("simple", "karras"),
        ("euler", "dpm_2"),
        ((0, 10_000, False), (0, 6, True), (0, 3, True), (0, 3, False), (2, 10_000, False), (1, 4, True), (4, 4, True)),
    ),
    *itertools.product(("simple",), ("euler",), ((6, 10_000, False), (0, 0, False), (9, 12, True))),
)
"""(scheduler, sampler, (first step, step before which it ends, whether noise is left))"""

RUNS = (
    *itertools.product(SAMPLER_NAMES, SCHEDULER_NAMES, (1.0, 0.6), (False,)),
    *itertools.product(SAMPLER_NAMES, ("normal",), (1.0, 0.6), (True,)),
)
"""(sampler, scheduler, denoise, masked)"""

SIGMA_GRID = (0.0292, 0.05, 0.25, 0.5, 0.77, 0.999)
TIME_GRID = (0.0, 0.4, 1.0, 10.25, 500.5, 999.0)
PERCENT_GRID = (0.0, 1e-4, 0.2, 0.5, 0.9, 1.0)


def case_key(kind: str, model: str, case: tuple) -> str:
    return "/".join((kind, model, *map(str, case)))


def network(x: Tensor, sigma: Tensor, prompt: float = 1.0) -> Tensor:
    """A smooth nonlinear stand-in for a model: mixes neighbours, bounded, depends on the noise level and the prompt."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma
    return 0.6 * torch.sin(1.3 * x + sigma) + 0.2 * prompt * torch.tanh(x.roll(1, -1)) + 0.1 * sigma / (1 + sigma)


def sample_latent() -> Tensor:
    return torch.linspace(-1.5, 1.5, torch.Size(SHAPE).numel()).reshape(SHAPE).roll(1, 2).contiguous()


def pixel_mask() -> Tensor:
    return (torch.arange(32 * 40).reshape(1, 32, 40) % 40 < 20).float()


def frame_masks() -> Tensor:
    return torch.linspace(0, 1, 8 * 16 * 16).reshape(8, 16, 16)


def time_grid(model: str) -> Tensor:
    """Times on the model's clock: these two run from 0 to 1, the others to 1000."""
    return torch.tensor(TIME_GRID) / (1000 if model in ("flux", "schnell") else 1)


def host_model_sampling(name: str):
    from comfy import model_sampling as ms

    settings = {
        "schnell": {"shift": 1.0, "multiplier": 1.0},
        "sd3": {"shift": 3.0},
        "dit": {"beta_schedule": "sqrt_linear", "linear_start": 0.0001, "linear_end": 0.02},
    }.get(name, {})
    bases = {
        "flux": (ms.ModelSamplingFlux, ms.CONST),
        "schnell": (ms.ModelSamplingDiscreteFlow, ms.CONST),
        "sd3": (ms.ModelSamplingDiscreteFlow, ms.CONST),
        "eps": (ms.ModelSamplingDiscrete, ms.EPS),
        "dit": (ms.ModelSamplingDiscrete, ms.EPS),
        "v_prediction": (ms.ModelSamplingDiscrete, ms.V_PREDICTION),
    }[name]
    return type("ModelSampling", bases, {})(SimpleNamespace(sampling_settings=settings))


class HostModel:
    """What ComfyUI's samplers need of a guided model; since 2026 they tell its class and CFG in the log, too."""

    def __init__(self, model_sampling) -> None:
        def scale_latent_inpaint(x, sigma, noise, latent_image, **_):
            return model_sampling.noise_scaling(sigma.reshape(-1, *[1] * (noise.ndim - 1)), noise, latent_image)

        self.model_sampling = model_sampling
        self.inner_model = SimpleNamespace(model_sampling=model_sampling, scale_latent_inpaint=scale_latent_inpaint)
        self.model_patcher = self
        self.model = self.inner_model
        self.cfg = 1.0

    def get_model_object(self, name: str):
        return getattr(self, name)

    def __call__(self, x, sigma, model_options=None, seed=None):
        latent = self.model_sampling.calculate_input(sigma, x)
        positive, negative = (
            self.model_sampling.calculate_denoised(sigma, network(latent, sigma, prompt), x) for prompt in (1.0, 0.5)
        )
        denoised = negative + (positive - negative) * CFG
        for watch in (model_options or {}).get("sampler_post_cfg_function", []):
            denoised = watch({"denoised": denoised, "uncond_denoised": negative})
        return denoised


def host_sigmas(model: HostModel, scheduler: str, steps: int, denoise: float, sampler: str) -> Tensor:
    from comfy.samplers import KSampler

    return KSampler(model, steps, "cpu", sampler, scheduler, denoise).sigmas


def host_part(model: HostModel, scheduler: str, sampler: str, part: tuple[int, int, bool]) -> Tensor:
    """The levels that KSampler (Advanced) takes; empty where it gives back the latent that it was given."""
    import comfy.samplers

    start, end, leftover_noise = part
    latent, levels = torch.zeros(SHAPE), []
    run = comfy.samplers.KSampler(model, SAMPLER_STEPS, "cpu", sampler, scheduler, 1.0)
    with mock.patch.object(comfy.samplers, "sample", lambda *given, **others: levels.append(given[7])):
        run.sample(latent, [], [], 1.0, latent, start_step=start, last_step=end, force_full_denoise=not leftover_noise)
    return levels[0] if levels else torch.empty(0)


def host_latent(model: HostModel, sampler: str, scheduler: str, denoise: float, masked: bool) -> Tensor:
    from comfy.sample import prepare_noise
    from comfy.samplers import sampler_object
    from comfy.utils import reshape_mask

    latent = sample_latent() if masked or denoise < 1 else torch.zeros(SHAPE)
    mask = reshape_mask(pixel_mask(), latent.shape) if masked else None
    sigmas = host_sigmas(model, scheduler, SAMPLER_STEPS, denoise, sampler).clone()
    return sampler_object(sampler).sample(
        model, sigmas, {"seed": SEED, "model_options": {}}, None, prepare_noise(latent, SEED), latent, mask, True
    )


def host_lms_in_fp64(model: HostModel) -> Tensor:
    """The latent of one run of lms with the levels of linear_quadratic, all of it in fp64."""
    from comfy.k_diffusion.sampling import sample_lms
    from comfy.sample import prepare_noise

    sigmas = host_sigmas(model, "linear_quadratic", SAMPLER_STEPS, 1.0, "lms").double()
    return sample_lms(model, prepare_noise(torch.zeros(SHAPE), SEED).double() * sigmas[0], sigmas, disable=True)


def host_results() -> dict[str, Tensor]:
    from comfy.k_diffusion.sampling import default_noise_sampler
    from comfy.sample import prepare_noise
    from comfy.utils import reshape_mask

    results = {
        "noise": prepare_noise(torch.zeros(SHAPE), SEED),
        "noise/batch_index": prepare_noise(torch.zeros(SHAPE), SEED, [5, 2]),
        "noise/gaussian": default_noise_sampler(torch.zeros(SHAPE), seed=SEED)(None, None),
        "mask": reshape_mask(pixel_mask(), torch.Size(SHAPE)),
        "mask/video": reshape_mask(frame_masks(), torch.Size(VIDEO_SHAPE)),
    }
    grid = torch.tensor(SIGMA_GRID)
    from comfy.samplers import SAMPLER_NAMES as KNOWN

    for name in MODELS:
        model = HostModel(host_model_sampling(name))
        ms = model.model_sampling
        results[f"table/{name}"] = ms.sigmas
        results[f"timestep/{name}"] = torch.stack([ms.timestep(sigma) for sigma in grid]).double()
        results[f"sigma/{name}"] = torch.stack([ms.sigma(time) for time in time_grid(name)])
        percents = [float(ms.percent_to_sigma(percent)) for percent in PERCENT_GRID]
        results[f"percent/{name}"] = torch.tensor(percents, dtype=torch.float64)
        for case in SCHEDULES:
            results[case_key("sigmas", name, case)] = host_sigmas(model, *case)
        for case in PARTS:
            results[case_key("part", name, case)] = host_part(model, *case)
        results[f"lms in fp64/{name}"] = host_lms_in_fp64(model)
        for case in RUNS if name in SAMPLED_MODELS else ():
            if case[0] in KNOWN:  # An older ComfyUI lacks some.
                results[case_key("latent", name, case)] = host_latent(model, *case)
    return {key: value.clone().contiguous() for key, value in results.items()}


def import_host() -> None:
    """Makes `comfy` importable, on the CPU."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


if __name__ == "__main__":
    target, sys.argv = sys.argv[1], sys.argv[:1]
    import_host()
    from safetensors.torch import save_file

    with torch.inference_mode():
        save_file(host_results(), target)
