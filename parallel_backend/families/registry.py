"""The families that the engine samples: their views, by the names that detection gives them."""

from __future__ import annotations

FAMILIES = {
    "flux": "flux:Flux",
    "sd3": "sd3:SD3",
    "pixart-alpha": "pixart:PixArtAlpha",
    "pixart-sigma": "pixart:PixArtSigma",
    "hunyuandit": "hunyuandit:HunyuanDiT",
}
"""Module of this folder and class: imported where a model of the family is loaded, and nowhere else."""
