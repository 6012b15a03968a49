"""ComfyUI's latent format of a model whose VAE has a scale of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...parallel_backend.families.spec import LatentSpec


def format_of_vae(usual: Any, spec: LatentSpec) -> Any:
    """A copy of the family's `usual` format that scales as `spec` says.

    The colours of previews are those of the same latent in the usual scale. A TAESD takes no other, so none is used.
    """
    own = copy.copy(usual)
    own.scale_factor, own.shift_factor = spec.scale, spec.shift
    own.process_in, own.process_out = spec.process_in, spec.process_out
    own.taesd_decoder_name = None
    if usual.latent_rgb_factors is not None:
        factors = torch.tensor(usual.latent_rgb_factors)
        bias = torch.tensor(usual.latent_rgb_factors_bias or [0.0] * factors.shape[1])
        # A channel x of `own` is steps * x + start of `usual`.
        cell = torch.zeros(1, spec.channels, *[1] * spec.dims)
        start, end = (usual.process_in(own.process_out(each)).flatten() for each in (cell, cell + 1))
        own.latent_rgb_factors = ((end - start).unsqueeze(1) * factors).tolist()
        own.latent_rgb_factors_bias = (bias + start @ factors).tolist()
    return own
