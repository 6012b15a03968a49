"""The families that the pack knows: one row each. The first whose landmarks a file has is the one it is taken for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .keys.cogvideox import COGVIDEOX, COGVIDEOX15
from .keys.flux import FLUX
from .keys.hunyuandit import HUNYUANDIT
from .keys.hunyuanvideo import HUNYUANVIDEO
from .keys.mochi import MOCHI
from .keys.pixart import PIXART_ALPHA, PIXART_SIGMA
from .keys.qwen_image import QWEN_IMAGE
from .keys.sd3 import SD3
from .keys.sdxl import SDXL, SDXL_REFINER
from .keys.wan import WAN
from .keys.zimage import ZIMAGE
from .spec import FamilySpec

FAMILIES: dict[str, FamilySpec] = {
    spec.name: spec
    for spec in (
        FLUX,
        SD3,
        PIXART_ALPHA,
        PIXART_SIGMA,
        HUNYUANDIT,
        WAN,
        ZIMAGE,
        QWEN_IMAGE,
        HUNYUANVIDEO,
        SDXL_REFINER,
        SDXL,
        COGVIDEOX,
        COGVIDEOX15,
        MOCHI,
    )
}


def load_class(name: str) -> type:
    """The class of a name such as "flux:Flux", of this folder; a name with dots is one of a module anywhere."""
    module, found = name.split(":")
    return getattr(import_module(module if "." in module else f"{__package__}.{module}"), found)


def load_view(spec: FamilySpec) -> type[Any]:
    """The class of the family's view; imports torch's modules and diffusers. For ranks."""
    return load_class(spec.view)
