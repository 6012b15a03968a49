"""IP-Adapters in diffusers' layouts: what their files look like. Reads headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..families.spec import Shapes, count_blocks
from .checkpoint import Checkpoint, open_checkpoint
from .recognise import refuse_others

PROJECTION, SITES = "projection.", "sites"
"""How the names begin of what makes tokens of a picture, and of what shows them to the model's attention sites."""
FLUX_NAMES = (
    (r"(?:ip_adapter_proj_model|image_proj)\.proj\.", r"projection.image_embeds."),
    (r"(?:ip_adapter_proj_model|image_proj)\.", r"projection."),
    (r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.", r"sites.\1.to_\2_ip."),
    (r"ip_adapter\.", r"sites."),
)
"""Maps the names in files, XLabs' own and diffusers', to ours; the first rule that matches counts."""
SD3_NAMES = (
    (r"image_proj\.layers\.(\d+)\.0\.norm1\.", r"projection.layers.\1.ln0."),
    (r"image_proj\.layers\.(\d+)\.0\.norm2\.", r"projection.layers.\1.ln1."),
    (r"image_proj\.layers\.(\d+)\.0\.to_out\.", r"projection.layers.\1.attn.to_out.0."),
    (r"image_proj\.layers\.(\d+)\.0\.", r"projection.layers.\1.attn."),
    (r"image_proj\.layers\.(\d+)\.1\.0\.", r"projection.layers.\1.adaln_norm."),
    (r"image_proj\.layers\.(\d+)\.1\.1\.", r"projection.layers.\1.ff.net.0.proj."),
    (r"image_proj\.layers\.(\d+)\.1\.3\.", r"projection.layers.\1.ff.net.2."),
    (r"image_proj\.layers\.(\d+)\.2\.1\.", r"projection.layers.\1.adaln_proj."),
    (r"image_proj\.", r"projection."),
    (r"ip_adapter\.", r"sites."),
)


@dataclass(frozen=True)
class Kind:
    """How a family's IP-Adapters are named, and the tensors that only they have together.

    `picture`: what of ComfyUI's CLIP_VISION_OUTPUT they take; `entrance`: the weight that it meets first.
    """

    names: tuple[tuple[str, str], ...]
    landmarks: tuple[str, ...]
    picture: str
    entrance: str


KINDS = {
    "flux": Kind(
        FLUX_NAMES,
        ("projection.image_embeds.weight", "sites.0.to_k_ip.weight", "sites.0.to_k_ip.bias"),
        "image_embeds",
        "image_embeds.weight",
    ),
    "sd3": Kind(
        SD3_NAMES,
        ("projection.latents", "sites.0.norm_ip.linear.weight", "sites.0.to_k_ip.weight"),
        "penultimate_hidden_states",
        "proj_in.weight",
    ),
}
"""Kinds of IP-Adapter by the family of their models."""


@dataclass(frozen=True)
class IPAdapterInfo:
    """An IP-Adapter for models of `family`. `keys`: in the file, by our names; `shapes` by our names, too."""

    checkpoint: Checkpoint
    family: str
    keys: Mapping[str, str]
    shapes: Shapes

    @property
    def name(self) -> str:
        return self.checkpoint.source.name

    @property
    def sites(self) -> int:
        """How many attention sites of the model it reaches."""
        return count_blocks(self.shapes, SITES)

    @property
    def width(self) -> int:
        """The width of its models' tokens."""
        return self.shapes["sites.0.to_k_ip.weight"][0]

    @property
    def picture_width(self) -> int:
        """The width of the image embedding that it takes."""
        return self.shapes.get(PROJECTION + KINDS[self.family].entrance, (0, 0))[-1]

    @property
    def picture(self) -> str:
        """The field of ComfyUI's CLIP_VISION_OUTPUT that it takes."""
        return KINDS[self.family].picture


def read_ip_adapter(path: str | Path) -> IPAdapterInfo:
    """What a file holds, from its header. Raises `UserError` for anything but an IP-Adapter that is known."""
    checkpoint = open_checkpoint(path)
    for family, kind in KINDS.items():
        keys = {_renamed(key, kind): key for key in checkpoint.tensors}
        if all(landmark in keys for landmark in kind.landmarks):
            shapes = {name: checkpoint.tensors[key].shape for name, key in keys.items()}
            return IPAdapterInfo(checkpoint, family, keys, shapes)
    refuse_others(checkpoint, "an IP-Adapter")
    raise UserError(
        f"{checkpoint.source} holds no IP-Adapter that is known: its {len(checkpoint.tensors)} tensors begin with "
        f"{', '.join(sorted(checkpoint.tensors)[:3])}.",
        "Choose one for Flux.1 (XLabs) or Stable Diffusion 3.5 (InstantX, as diffusers has it).",
    )


def _renamed(key: str, kind: Kind) -> str:
    for pattern, ours in kind.names:
        if (found := re.match(pattern, key)) is not None:
            return found.expand(ours) + key[found.end() :]
    return key
