"""Latents for the adapters' training, made as they are needed: the base model's caches hold neither chalk nor edges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL

from .model import DemoModel, pack, shifted
from .scenes import Style, draw, edge_map, make_scene
from .train import SHIFT
from .train_vae import to_tensor

SIZE = 128
SEED = 31


@dataclass
class Examples:
    """Packed latents `[N, S, 64]`, those of the edge maps, and the tokens of the captions."""

    clean: torch.Tensor
    edges: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: list[np.ndarray]) -> torch.Tensor:
    """Normalised and packed latents `[B, S, 64]` of uint8 pictures."""
    latents = vae.encode(to_tensor(pictures)).latent_dist.mean
    return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)


def make_examples(model: DemoModel, vae: AutoencoderKL, count: int, style: Style, suffix: str = "") -> Examples:
    """`count` scenes in a style, each caption followed by `suffix`."""
    scenes = [make_scene(SEED, index) for index in range(count)]
    clean, edges = [], []
    for first in range(0, count, 32):
        batch = scenes[first : first + 32]
        clean.append(encode(vae, [draw(scene, SIZE, style) for scene in batch]))
        edges.append(encode(vae, [edge_map(draw(scene, SIZE)) for scene in batch]))
    ids = model.tokenize([scene.caption() + suffix for scene in scenes])
    return Examples(torch.cat(clean), torch.cat(edges), *ids)


def noisy_batch(examples: Examples, step: int, size: int = 24) -> tuple[torch.Tensor, ...]:
    """Chosen indices, noise `[B, S, 64]` and noise levels `[B]` of one step."""
    rng = np.random.default_rng([SEED, step])
    chosen = torch.from_numpy(rng.integers(len(examples.clean), size=size))
    noise = torch.from_numpy(rng.standard_normal((size, *examples.clean.shape[1:]), dtype=np.float32))
    sigma = shifted(torch.sigmoid(torch.from_numpy(rng.standard_normal(size, dtype=np.float32))), SHIFT[SIZE])
    return chosen, noise, sigma
