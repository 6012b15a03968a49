"""A VAE of ComfyUI's graph whose work is done in the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..parallel_backend.protocol.messages import Decode, EncodeImage, OnOutOfMemory, VaeRef
from ..parallel_backend.vae.files.header import VaeHeader
from ..parallel_backend.vae.kinds import check_side
from ..parallel_backend.vae.tiles import NO_TILES, Tiling
from . import host
from .layout_choice import LayoutChoice
from .session import session
from .session.activity import noted


@dataclass(frozen=True)
class ParallelVAE:
    """A VAE in the ranks, which ComfyUI's own VAE nodes use as theirs; `header` is its file's header.

    `own_ranks`: those of a sidecar of its own; 0: it is in the ranks that sample.
    """

    ref: VaeRef
    layout: LayoutChoice | None
    header: VaeHeader
    own_ranks: int = 0

    @property
    def works_aside(self) -> bool:
        """Whether the ranks that sample are free while it works."""
        return self.own_ranks > 0

    @noted
    def decode(self, samples: Tensor, tiling: Tiling = NO_TILES, on_out_of_memory: OnOutOfMemory = "error") -> Tensor:
        """Latent `[B, C, h, w]` to pictures `[B, H, W, 3]` in 0..1, `[B, C, t, h, w]` to videos `[B, T, H, W, 3]`."""
        check_side("decode", self.header.sides, self.header.source)
        image = self._ask(Decode, tiling, on_out_of_memory, {"latent": samples}).tensors["image"]
        return host.current().kept(image)

    @noted
    def encode(
        self, pixel_samples: Tensor, tiling: Tiling = NO_TILES, on_out_of_memory: OnOutOfMemory = "error"
    ) -> Tensor:
        """Pictures `[B, H, W, 3]` in 0..1 to latents `[B, C, h, w]`.

        A VAE of videos takes one video `[T, H, W, 3]`, or `[B, T, H, W, 3]`, and gives `[B, C, t, h, w]`.
        """
        check_side("encode", self.header.sides, self.header.source)
        image = pixel_samples[..., :3]
        if self.header.frames and image.ndim == 4:
            image = image[None]
        latent = self._ask(EncodeImage, tiling, on_out_of_memory, {"image": image}).tensors["latent"]
        return host.current().kept(latent)

    def decode_tiled(self, samples: Tensor, tile_x: int, tile_y: int, overlap: int, **in_time: Any) -> Tensor:
        """Has the signature that ComfyUI's tiled node calls, in latent pixels. Frames are never cut into tiles."""
        return self.decode(samples, Tiling(max(tile_x, tile_y) * self.downscale_ratio, overlap * self.downscale_ratio))

    def encode_tiled(self, pixel_samples: Tensor, tile_x: int, tile_y: int, overlap: int, **in_time: Any) -> Tensor:
        """Has the signature that ComfyUI's tiled node calls, in pixels. Frames are never cut into tiles."""
        return self.encode(pixel_samples, Tiling(max(tile_x, tile_y), overlap))

    @property
    def downscale_ratio(self) -> int:
        """Pixels per latent row or column."""
        return self.header.scale

    @property
    def latent_channels(self) -> int:
        return self.header.kind.latent_channels(self.header.config)

    def spacial_compression_decode(self) -> int:
        return self.header.scale

    def spacial_compression_encode(self) -> int:
        return self.header.scale

    def temporal_compression_decode(self) -> int | None:
        return self.header.frames

    def throw_exception_if_invalid(self) -> None:
        """ComfyUI asks this of a VAE whose file may hold none; ours was read before."""

    def _ask(
        self,
        kind: type[Decode] | type[EncodeImage],
        tiling: Tiling,
        on_out_of_memory: OnOutOfMemory,
        tensors: dict[str, Tensor],
    ) -> session.Reply:
        if self.works_aside:
            client = session.vae_client(self.own_ranks, self.layout or LayoutChoice())
        else:
            client = session.client_for(self.layout)
        request = kind(id=0, vae=self.ref, **tiling._asdict(), on_out_of_memory=on_out_of_memory)
        return session.with_living(
            client, lambda client: session.ask(client, request, tensors, on_vae_sidecar=self.works_aside)
        )
