"""Latents for the adapters' training, made as a run starts: the base model's caches hold neither chalk nor edges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from .model import DemoModel, pack, shifted
from .scenes import Style, draw, edge_map, make_scene
from .train import SHIFT
from .train_vae import posterior_of, to_tensor

SIZE = 128
SEED = 31
BATCH = 32


@dataclass
class Examples:
    """Packed latents `[N, S, 64]`, and the captions as `DemoModel.read` gives them."""

    clean: torch.Tensor
    pooled: torch.Tensor
    text: torch.Tensor


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: list[np.ndarray]) -> torch.Tensor:
    """Normalised and packed latents `[N, S, 64]` of uint8 pictures."""
    parts = (to_tensor(pictures[i : i + BATCH]).to(vae.device) for i in range(0, len(pictures), BATCH))
    latents = torch.cat([posterior_of(vae, part).mean for part in parts])
    return pack((latents - vae.config["shift_factor"]) * vae.config["scaling_factor"])


def make_examples(model: DemoModel, vae: AutoencoderKL, count: int, style: Style) -> Examples:
    """The first `count` scenes in a style."""
    scenes = [make_scene(SEED, index) for index in range(count)]
    clean = encode(vae, [draw(scene, SIZE, style) for scene in scenes])
    return Examples(clean, *model.read_all([scene.caption() for scene in scenes]))


def make_edges(vae: AutoencoderKL, count: int) -> torch.Tensor:
    """Packed latents `[N, S, 64]` of the edge maps of the same scenes."""
    return encode(vae, [edge_map(draw(make_scene(SEED, index), SIZE)) for index in range(count)])


def noisy_batch(examples: Examples, step: int, size: int) -> tuple[torch.Tensor, ...]:
    """Chosen indices, noise `[B, S, 64]` and noise levels `[B]` of one step."""
    device = examples.clean.device
    generator = torch.Generator(device).manual_seed((SEED << 32) + step)
    chosen = torch.randint(len(examples.clean), (size,), generator=generator, device=device)
    noise = torch.randn(size, *examples.clean.shape[1:], generator=generator, device=device)
    sigma = shifted(torch.sigmoid(torch.randn(size, generator=generator, device=device)), SHIFT[SIZE])
    return chosen, noise, sigma
