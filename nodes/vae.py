"""Parallel VAE Loader, Decode, Encode and Encode (for Inpainting)."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parallel_backend.errors import UserError
from ..parallel_backend.layout.layout import MAX_DEGREE
from ..parallel_backend.protocol.messages import OnOutOfMemory, VaeRef, WeightDtype
from ..parallel_backend.vae.files.header import read_header
from ..parallel_backend.vae.tiles import Tiling, cropped
from . import model_files
from .layout_choice import LayoutChoice
from .remote_vae import ParallelVAE
from .widgets import LAYOUT_INPUT, allowed, verdict

KINDS = ("vae", "checkpoints")
WHAT = "The VAE"


class ParallelDiTVAELoader:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "load vae",
        "vae loader",
    )
    DESCRIPTION = "Names a VAE for the ranks. Its output also serves ComfyUI's own VAE Decode and VAE Encode."
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("For Parallel VAE Decode, VAE Decode and VAE Encode.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": (
                    model_files.names(*KINDS),
                    {
                        "tooltip": "A safetensors file in models/vae or models/checkpoints, or a pipeline folder in "
                        "models/diffusers."
                    },
                ),
                "weight_dtype": (
                    list(get_args(WeightDtype)),
                    {"default": "auto", "tooltip": "The weights' type in the ranks' memory. auto keeps the file's."},
                ),
            },
            "optional": {
                "layout": LAYOUT_INPUT,
                "own_ranks": (
                    "INT",
                    {
                        "default": 0,
                        "advanced": True,
                        "min": 0,
                        "max": MAX_DEGREE,
                        "tooltip": "Ranks that work for this VAE alone, on the last GPUs; the layout's ranks must "
                        "leave these free. 0: the ranks that sample decode and encode, too.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, vae: str) -> bool | str:
        return verdict(lambda name: model_files.resolve(name, KINDS, WHAT), vae)

    def load(
        self, vae: str, weight_dtype: WeightDtype, layout: LayoutChoice | None = None, own_ranks: int = 0
    ) -> tuple[ParallelVAE]:
        path = model_files.resolve(vae, KINDS, WHAT)
        ref = VaeRef(path=str(path), weight_dtype=weight_dtype)
        return (ParallelVAE(ref, layout, read_header(path), own_ranks),)


TILE_SIZE = (
    "INT",
    {
        "default": 0,
        "min": 0,
        "max": 8192,
        "step": 32,
        "tooltip": "Side of a tile in pixels, for pictures larger than the ranks' memory: an approximation. "
        "0: no tiles, the exact result.",
    },
)
OVERLAP = (
    "INT",
    {
        "default": 64,
        "min": 0,
        "max": 4096,
        "step": 32,
        "advanced": True,
        "tooltip": "Pixels that neighbouring tiles share and blend.",
    },
)
ON_OUT_OF_MEMORY = {
    "on_out_of_memory": (
        list(get_args(OnOutOfMemory)),
        {
            "default": "error",
            "advanced": True,
            "tooltip": "When the ranks' memory is too small for the exact result: an error that says what to do, or "
            "tiles of a size that fits, an approximation.",
        },
    )
}
PIXELS = ("IMAGE", {"tooltip": "The pictures; for a VAE of videos, the frames of one video."})
VAE = ("VAE", {"tooltip": "From Parallel VAE Loader."})


class ParallelDiTVAEDecode:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "vae decode",
        "decode latent",
        "vae decode tiled",
        "latent to image",
        "distvae",
    )
    DESCRIPTION = "Decodes a latent with all ranks: each decodes a band of rows, and the seams are exact."
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The pictures, or the frames of the videos one after the other.",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        latent = ("LATENT", {"tooltip": "The latent to decode."})
        required = {"samples": latent, "vae": VAE, "tile_size": TILE_SIZE, "overlap": OVERLAP}
        return {"required": required, "optional": ON_OUT_OF_MEMORY}

    @classmethod
    def VALIDATE_INPUTS(cls, tile_size: int, overlap: int) -> bool:
        return allowed(_tiling, tile_size, overlap)

    def decode(
        self,
        samples: dict[str, Any],
        vae: Any,
        tile_size: int,
        overlap: int,
        on_out_of_memory: OnOutOfMemory = "error",
    ) -> tuple[Tensor]:
        image = _ours(vae).decode(samples["samples"], _tiling(tile_size, overlap), on_out_of_memory)
        return (image.flatten(0, -4),)


class ParallelDiTVAEEncode:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "vae encode",
        "encode image",
        "vae encode tiled",
        "image to latent",
    )
    DESCRIPTION = "Encodes pictures with all ranks: each encodes a band of rows, and the seams are exact."
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The latent, its sides cropped to what the VAE can hold.",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {"pixels": PIXELS, "vae": VAE, "tile_size": TILE_SIZE, "overlap": OVERLAP}
        return {"required": required, "optional": ON_OUT_OF_MEMORY}

    @classmethod
    def VALIDATE_INPUTS(cls, tile_size: int, overlap: int) -> bool:
        return allowed(_tiling, tile_size, overlap)

    def encode(
        self, pixels: Tensor, vae: Any, tile_size: int, overlap: int, on_out_of_memory: OnOutOfMemory = "error"
    ) -> tuple[dict[str, Tensor]]:
        return ({"samples": _ours(vae).encode(pixels, _tiling(tile_size, overlap), on_out_of_memory)},)


class ParallelDiTVAEEncodeForInpaint:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "vae encode inpaint",
        "inpaint",
        "inpainting",
    )
    DESCRIPTION = "Encodes pictures with all ranks, what the mask covers made grey, for models that fill it anew."
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The latent with the mask as its noise mask.",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        grow = (
            "INT",
            {"default": 6, "min": 0, "max": 64, "tooltip": "Pixels by which the mask grows, for soft seams."},
        )
        return {
            "required": {
                "pixels": PIXELS,
                "vae": VAE,
                "mask": ("MASK", {"tooltip": "What is to be filled anew."}),
                "grow_mask_by": grow,
                "tile_size": TILE_SIZE,
                "overlap": OVERLAP,
            },
            "optional": ON_OUT_OF_MEMORY,
        }

    @classmethod
    def VALIDATE_INPUTS(cls, tile_size: int, overlap: int) -> bool:
        return allowed(_tiling, tile_size, overlap)

    def encode(
        self,
        pixels: Tensor,
        vae: Any,
        mask: Tensor,
        grow_mask_by: int,
        tile_size: int,
        overlap: int,
        on_out_of_memory: OnOutOfMemory = "error",
    ) -> tuple[dict[str, Tensor]]:
        vae, tiling = _ours(vae), _tiling(tile_size, overlap)
        holes = F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=pixels.shape[1:3], mode="bilinear").round()
        if len(holes) not in (1, len(pixels)):
            raise UserError(
                f"{len(holes)} masks do not fit {len(pixels)} pictures.",
                "Give one mask, or one for each picture or frame.",
            )
        pixels, holes = cropped(pixels, vae.downscale_ratio, 1), cropped(holes, vae.downscale_ratio, 2)
        grey = torch.where(holes.movedim(1, -1).bool(), 0.5, pixels)
        height, width = holes.shape[-2:]
        if grow_mask_by:
            holes = F.max_pool2d(holes, grow_mask_by, stride=1, padding=grow_mask_by // 2)[..., :height, :width]
        return ({"samples": vae.encode(grey, tiling, on_out_of_memory), "noise_mask": holes},)


def _ours(vae: Any) -> ParallelVAE:
    if not isinstance(vae, ParallelVAE):
        raise UserError(
            "This VAE was not loaded by Parallel VAE Loader, so it is not in the ranks.",
            "Connect a Parallel VAE Loader, or use ComfyUI's own VAE nodes.",
        )
    return vae


def _tiling(tile_size: int, overlap: int) -> Tiling:
    if tile_size < 0 or overlap < 0:
        raise UserError(f"tile_size={tile_size} and overlap={overlap} cannot be negative.", "Use 0 for no tiles.")
    if tile_size and overlap >= tile_size:
        raise UserError(
            f"overlap={overlap} leaves nothing of a tile of tile_size={tile_size}.",
            f"Use an overlap of at most {tile_size // 2}.",
        )
    return Tiling(tile_size, overlap)
