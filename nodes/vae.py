"""Parallel VAE Loader and Parallel VAE Decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from ..parallel_backend.errors import UserError
from ..parallel_backend.protocol.messages import Decode, EncodeImage, VaeRef, WeightDtype
from . import paths, session
from .layout import LayoutChoice
from .loader import LAYOUT_INPUT
from .validation import verdict

KIND = "vae"
WHAT = "The VAE"


@dataclass(frozen=True)
class ParallelVAE:
    """A VAE in the ranks. ComfyUI's VAE Decode and VAE Encode use it through `decode` and `encode`."""

    ref: VaeRef
    layout: LayoutChoice | None

    def decode(self, samples: Tensor, tile_size: int = 0, overlap: int = 64) -> Tensor:
        """Latent `[B, C, h, w]` to picture `[B, H, W, 3]` in 0..1."""
        message = Decode(id=0, vae=self.ref, tile_size=tile_size, overlap=overlap)
        return session.ask(self._client(), message, {"latent": samples}).tensors["image"]

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Picture `[B, H, W, 3]` in 0..1 to latent `[B, C, h, w]`."""
        message = EncodeImage(id=0, vae=self.ref)
        return session.ask(self._client(), message, {"image": pixel_samples[..., :3]}).tensors["latent"]

    def _client(self) -> Any:
        return session.client_for(self.layout.ranks if self.layout else None)


class ParallelDiTVAELoader:
    CATEGORY = "ParallelDiT"
    DESCRIPTION = "Names a VAE for the ranks. Its output also serves ComfyUI's own VAE Decode and VAE Encode."
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("For Parallel VAE Decode, VAE Decode and VAE Encode.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": (
                    paths.names(KIND),
                    {"tooltip": "A safetensors file in models/vae, or a pipeline folder in models/diffusers."},
                ),
                "weight_dtype": (
                    list(get_args(WeightDtype)),
                    {"default": "auto", "tooltip": "The weights' type in the ranks' memory. auto keeps the file's."},
                ),
            },
            "optional": {"layout": LAYOUT_INPUT},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, vae: str) -> bool | str:
        return verdict(lambda name: paths.resolve(name, KIND, WHAT), vae)

    def load(self, vae: str, weight_dtype: WeightDtype, layout: LayoutChoice | None = None) -> tuple[ParallelVAE]:
        return (ParallelVAE(VaeRef(path=str(paths.resolve(vae, KIND, WHAT)), weight_dtype=weight_dtype), layout),)


class ParallelDiTVAEDecode:
    CATEGORY = "ParallelDiT"
    DESCRIPTION = "Decodes a latent with all ranks: each decodes a band of rows, and the seams are exact."
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The picture.",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latent to decode."}),
                "vae": ("VAE", {"tooltip": "From Parallel VAE Loader."}),
                "tile_size": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 8192,
                        "step": 32,
                        "tooltip": "Side of a tile in pixels, for pictures larger than the ranks' memory. 0: no tiles, "
                        "the exact picture.",
                    },
                ),
                "overlap": (
                    "INT",
                    {
                        "default": 64,
                        "min": 0,
                        "max": 4096,
                        "step": 32,
                        "tooltip": "Pixels that neighbouring tiles share and blend.",
                    },
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, tile_size: int, overlap: int) -> bool | str:
        return verdict(_check_tiles, tile_size, overlap)

    def decode(self, samples: dict[str, Any], vae: Any, tile_size: int, overlap: int) -> tuple[Tensor]:
        if not isinstance(vae, ParallelVAE):
            raise UserError(
                "This VAE was not loaded by Parallel VAE Loader, so it is not in the ranks.",
                "Connect a Parallel VAE Loader, or decode with ComfyUI's VAE Decode.",
            )
        _check_tiles(tile_size, overlap)
        return (vae.decode(samples["samples"], tile_size, overlap),)


def _check_tiles(tile_size: int, overlap: int) -> None:
    if tile_size < 0 or overlap < 0:
        raise UserError(f"tile_size={tile_size} and overlap={overlap} cannot be negative.", "Use 0 for no tiles.")
    if tile_size and overlap >= tile_size:
        raise UserError(
            f"overlap={overlap} leaves nothing of a tile of tile_size={tile_size}.",
            f"Use an overlap of at most {tile_size // 2}.",
        )
