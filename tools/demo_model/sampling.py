"""A plain Euler sampler for the sheets drawn while training; judging goes through diffusers instead."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from .model import DemoModel, shifted, unpack
from .train_vae import decoded, to_pictures

STEPS = 20
GUIDANCE = 3.5


@torch.no_grad()
def sample(
    model: DemoModel, vae: AutoencoderKL, captions: list[str], size: int, shift: float, seed: int = 0
) -> np.ndarray:
    """Pictures uint8 `[B, size, size, 3]` after 20 Euler steps with true CFG."""
    side, count = size // 16, len(captions)
    pooled, text = model.read_all(captions + [""] * count)
    device = text.device
    x = torch.randn(count, side * side, 64, generator=torch.Generator().manual_seed(seed)).to(device)
    sigmas = shifted(torch.linspace(1, 0, STEPS + 1), shift)
    for sigma, following in pairwise(sigmas):
        both, _ = model(torch.cat([x, x]), sigma.expand(2 * count).to(device), pooled, text, side)
        asked, empty = both.chunk(2)
        x = x + (following - sigma) * torch.lerp(empty, asked, GUIDANCE)
    latents = unpack(x, side, side) / vae.config["scaling_factor"] + vae.config["shift_factor"]
    return to_pictures(decoded(vae, latents))


def sample_sheet(model: DemoModel, vae: AutoencoderKL, captions: list[str], size: int, shift: float) -> np.ndarray:
    """The pictures of the captions in rows of four."""
    pictures = sample(model, vae, captions, size, shift)
    rows = [np.concatenate(list(pictures[i : i + 4]), axis=1) for i in range(0, len(pictures), 4)]
    return np.concatenate(rows, axis=0)
