"""Every family's transformer, as small as it gets and of random weights, beside its stock diffusers forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from paralleldit.parallel_backend.families.base import Condition, Family
from paralleldit.parallel_backend.families.flux import Flux
from paralleldit.parallel_backend.families.sd3 import SD3
from paralleldit.parallel_backend.protocol.messages import Conditioning
from torch import Tensor

GUIDANCE = 2.5
CPU = torch.device("cpu")

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class TinyModel:
    """`build(heads)` makes the diffusers transformer, `condition(draw, batch, text)` a conditioning of `text` tokens.

    `denoise(model, latent, condition)` is the clean latent that the stock forward predicts at `sigma`, with code of its
    own around it.
    """

    family: type[Family]
    build: Callable[[int], Any]
    condition: Callable[[Draw, int, int], Condition]
    sigma: float
    denoise: Callable[[Any, Tensor, Condition], Tensor]

    def make(self, heads: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return self.build(heads).eval()

    def make_family(self, heads: int, dtype: torch.dtype = torch.float32) -> Family:
        return self.family(self.make(heads).to(dtype), dtype, CPU)


def _flux(guidance: bool) -> TinyModel:
    sigma = 0.7

    def build(heads: int) -> FluxTransformer2DModel:
        return FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=24,
            pooled_projection_dim=12,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        return Condition(tokens=draw(batch, text, 24), pooled=draw(batch, 12), guidance=GUIDANCE)

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        batch, channels, height, width = latent.shape
        rows, columns = -(-height // 2), -(-width // 2)
        tokens = whole_patches(latent).view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        axes = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        ids = torch.stack([torch.zeros(rows, columns), *axes], dim=-1)
        output = model(
            hidden_states=tokens.reshape(batch, rows * columns, channels * 4),
            encoder_hidden_states=condition.tokens.expand(batch, -1, -1),
            pooled_projections=condition.pooled.expand(batch, -1),
            timestep=torch.full((batch,), sigma),
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(condition.tokens.shape[1], 3),
            guidance=torch.full((batch,), GUIDANCE) if guidance else None,
        ).sample
        velocity = output.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return latent - sigma * velocity.reshape(batch, channels, rows * 2, columns * 2)[..., :height, :width]

    return TinyModel(Flux, build, condition, sigma, denoise)


def _sd3(dual: tuple[int, ...], qk_norm: str | None) -> TinyModel:
    sigma = 0.7

    def build(heads: int) -> SD3Transformer2DModel:
        return SD3Transformer2DModel(
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=24,
            caption_projection_dim=heads * 16,
            pooled_projection_dim=12,
            pos_embed_max_size=9,
            dual_attention_layers=dual,
            qk_norm=qk_norm,
        )

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        return Condition(tokens=draw(batch, text, 24), pooled=draw(batch, 12))

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        batch, _, height, width = latent.shape
        velocity = model(
            hidden_states=whole_patches(latent),
            encoder_hidden_states=condition.tokens.expand(batch, -1, -1),
            pooled_projections=condition.pooled.expand(batch, -1),
            timestep=torch.full((batch,), sigma * 1000),
        ).sample
        return latent - sigma * velocity[..., :height, :width]

    return TinyModel(SD3, build, condition, sigma, denoise)


def tensors_of(side: str, condition: Condition) -> dict[str, Tensor]:
    """The condition's tensors as a request carries them."""
    return {f"{side}.0.{name}": value for name, value in vars(condition).items() if isinstance(value, Tensor)}


def entry_of(condition: Condition) -> Conditioning:
    """The rest of the condition as a request carries it."""
    return Conditioning(guidance=condition.guidance)


def whole_patches(latent: Tensor) -> Tensor:
    """The latent with its first row and column again after an odd last one."""
    return F.pad(latent, (0, latent.shape[3] % 2, 0, latent.shape[2] % 2), mode="circular")


TINY_MODELS = {
    "flux dev": _flux(guidance=True),
    "flux schnell": _flux(guidance=False),
    "sd3 medium": _sd3(dual=(), qk_norm=None),
    "sd3.5 medium": _sd3(dual=(0, 1), qk_norm="rms_norm"),
}
