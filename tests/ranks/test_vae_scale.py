"""A model whose VAE has a scale of its own, by channel too: a run is that of plain diffusers in that scale."""

from dataclasses import replace

import pytest
import torch
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine.sample import sample
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol.messages import ModelRef, Sample
from paralleldit.parallel_backend.sampling.noise import initial_noise
from paralleldit.tests.ranks.test_exact_layouts import QuietRun
from paralleldit.tests.tiny_models import CPU, TINY_MODELS, entry_of, tensors_of

HEADS, BATCH, SEED = 4, 2, 5
SCALE, SHIFT = 0.69, -0.21


def by_channel(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.arange(1.0, 1 + channels) / channels
    return numbers - 0.4, numbers + 0.7


def inputs(name):
    tiny, generator = TINY_MODELS[name], torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return tiny.latent(draw, BATCH, 6, 8), tiny.condition(draw, BATCH, 5)


def sampled(world, layout, name):
    """One step of Euler, from the noise level of the tiny model to none."""
    tiny = TINY_MODELS[name]
    latent, condition = inputs(name)
    mean, std = by_channel(latent.shape[1])
    told = {"scaling_factor": SCALE, "shift_factor": SHIFT, "latents_mean": mean.tolist(), "latents_std": std.tolist()}
    family = tiny.family(tiny.make(HEADS), torch.float32, CPU, (tiny.spec.latent.of_vae(told),))
    request = Sample(
        id=0,
        model=ModelRef(path="tiny"),
        layout=layout,
        positive=(entry_of(condition),),
        sampler="euler",
        schedule=None,
        seed=SEED,
    )
    tensors = {"latent": latent, "sigmas": torch.tensor([tiny.sigma, 0.0]), **tensors_of("positive", condition)}
    return sample(request, tensors, family, Mesh(layout), QuietRun())["latent"]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_run_equals_plain_diffusers_in_the_vaes_own_scale(ranks, name):
    tiny = TINY_MODELS[name]
    latent, condition = inputs(name)
    mean, std = (each.view(1, -1, *[1] * (latent.ndim - 2)) for each in by_channel(latent.shape[1]))
    sigma = torch.tensor(tiny.sigma)

    def scaled(unscaled):
        return ((unscaled - mean) / std - SHIFT) * SCALE

    # References travel as the latent does, and are scaled in the ranks.
    condition = replace(condition, references=tuple(map(scaled, condition.references)))
    inner = scaled(latent)
    noise = initial_noise(latent.shape, torch.float32, SEED)
    sampling = tiny.make_family(HEADS).model_sampling(None)
    with torch.inference_mode():
        clean = tiny.denoise(tiny.make(HEADS), sampling.noise_scaling(sigma, noise, inner), condition)
    expected = (clean / SCALE + SHIFT) * std + mean
    for found in ranks.run(2, sampled, Layout(ulysses_degree=2), name):
        assert (found - expected).norm() / expected.norm() <= 1e-5
