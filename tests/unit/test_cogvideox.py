"""A run of CogVideoX gives the latent that the pipeline of diffusers gives."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.families.keys.cogvideox import COGVIDEOX, COGVIDEOX15, latent_scale
from paralleldit.parallel_backend.files.latents import latents_of
from paralleldit.parallel_backend.sampling import model_sampling
from paralleldit.parallel_backend.sampling.driver import SamplingJob, run
from paralleldit.parallel_backend.sampling.schedules import sigmas_for
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.strategies.prompt_batches import one_by_one
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.parallel_backend.strategies.weighted_prompts import WeightedPrompt
from paralleldit.tests.tiny_models import TINY_MODELS

STEPS, CFG, FRAMES, HEIGHT, WIDTH = 4, 3.0, 4, 8, 6


@pytest.mark.parametrize("model", ["cogvideox 2b", "cogvideox 5b", "cogvideox 1.5"])
@pytest.mark.parametrize(
    ("sampler", "last_alpha", "limit"),
    [("euler", model_sampling.LAST_ALPHA, 5e-5), ("euler", 1e-4, 1e-5), ("ddim", 1e-4, 1e-5)],
)
def test_a_run_gives_the_latent_of_the_pipeline(monkeypatch, model, sampler, last_alpha, limit):
    """A sampler's first step away from noise of 4518 times the picture leaves fewer digits than one from 100 times."""
    monkeypatch.setattr(model_sampling, "LAST_ALPHA", last_alpha)
    tiny, generator = TINY_MODELS[model], torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    positive, negative = (tiny.condition(draw, 1, 5) for _ in range(2))
    noise = draw(1, 16, FRAMES, HEIGHT, WIDTH)
    family = tiny.make_family(2)
    levels = family.model_sampling(None)
    alone = Axis("alone", [0], None, Ledger())
    predict = SequenceParallel(family, alone, AttentionCore(alone, alone, KERNELS["sdpa"])).predict
    prompts = [[WeightedPrompt.plain(each)] for each in (positive, negative)]
    guidance = Guidance(one_by_one(predict), levels, alone, *prompts, CFG)
    sigmas = sigmas_for(levels, "simple", STEPS, 1.0, sampler)
    job = SamplingJob(sampler, levels, sigmas, noise, torch.zeros_like(noise), seed=0)
    with torch.inference_mode():
        latent = run(lambda x, sigma, step: guidance.denoised(x, sigma), job)
        expected = piped(model, noise, positive["tokens"], negative["tokens"])
    assert (latent - expected).norm() / expected.norm() <= limit


def piped(model, noise, positive, negative):
    """The latent of diffusers' pipeline, at whose highest level of noise is as much of the picture left as here."""
    transformer = TINY_MODELS[model].make(2)
    transformer.patch_embed.max_text_seq_length, transformer.patch_embed.sample_width = positive.shape[1], 0
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=3.0 if model == "cogvideox 2b" else 1.0,
    )
    scheduler.alphas_cumprod[-1] = model_sampling.LAST_ALPHA
    pipeline = CogVideoXPipeline(None, None, None, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        height=HEIGHT * 8,
        width=WIDTH * 8,
        num_frames=4 * FRAMES - 3,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        latents=noise.transpose(1, 2),
        output_type="latent",
    ).frames
    return frames.transpose(1, 2)


def test_the_width_of_a_model_says_how_its_latents_are_scaled(tmp_path):
    scales = {}
    for spec in (COGVIDEOX, COGVIDEOX15):
        for name, config in spec.published.items():
            (latent,) = latents_of(spec, config, tmp_path)
            scales[name] = latent.scale
            assert latent.scale == latent_scale(config)
    assert scales == {"cogvideox-2b": 1.15258426, "cogvideox-5b": 0.7, "cogvideox1.5-5b": 0.7}
