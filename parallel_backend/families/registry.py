"""The families that the engine samples, by the name that detection gives them."""

from __future__ import annotations

import json
from pathlib import Path

from ..weights.load import LoadedTransformer
from .base import Family
from .flux import Flux
from .hunyuandit import HunyuanDiT
from .pixart import PixArtAlpha, PixArtSigma
from .sd3 import SD3

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (Flux, SD3, PixArtAlpha, PixArtSigma, HunyuanDiT)
}


def build_family(loaded: LoadedTransformer, path: Path) -> Family:
    """The block view of a loaded transformer.

    A diffusers pipeline folder says how its own VAE's latents are scaled; a single file is of the family's usual scale.
    """
    vae_config = path / "vae" / "config.json"
    scale: dict[str, float] = {}
    if vae_config.is_file():
        config = json.loads(vae_config.read_text())
        scale = {"latent_scale": config["scaling_factor"], "latent_shift": config.get("shift_factor") or 0.0}
    device = next(parameter.device for parameter in loaded.module.parameters() if not parameter.is_meta)
    family = FAMILIES[loaded.family](loaded.module, loaded.compute_dtype, device, **scale)
    family.block_parameters = loaded.block_parameters
    return family
