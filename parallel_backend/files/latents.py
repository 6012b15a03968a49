"""How a model's latents are scaled: as its family's usually are, or as the VAE in its folder says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..families.spec import Config, FamilySpec, LatentSpec
from .checkpoint import read_json


def latents_of(spec: FamilySpec, config: Config, path: Path) -> tuple[LatentSpec, ...]:
    """The latents that the model of the family `spec` at `path` samples; `config`: its own.

    A diffusers pipeline folder says how its own VAE's latents are scaled; a single file is of the family's usual scale.
    Raises `UserError` for a config of the VAE that does not say it.
    """
    vae_config = path / "vae" / "config.json"
    first, *others = spec.latents
    if spec.latent_scale:
        first = replace(first, scale=spec.latent_scale(config))
    if vae_config.is_file():
        first = first.of_vae(read_json(vae_config))
    return first, *others
