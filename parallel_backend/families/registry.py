"""The families that the engine samples, by the name that detection gives them."""

from __future__ import annotations

from .family import Family
from .flux import Flux
from .hunyuandit import HunyuanDiT
from .pixart import PixArtAlpha, PixArtSigma
from .sd3 import SD3

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (Flux, SD3, PixArtAlpha, PixArtSigma, HunyuanDiT)
}
