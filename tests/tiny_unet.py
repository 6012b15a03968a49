"""A tiny U-Net in the manner of Stable Diffusion XL, of random weights, and its plain view."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.parallel_backend.families.spec import FamilySpec, Input, LatentSpec
from paralleldit.parallel_backend.families.unet import UNet
from paralleldit.parallel_backend.layout.capabilities import ROWS_ALONE
from paralleldit.parallel_backend.sampling.model_sampling import EpsPrediction, ModelSampling

TEXT, POOLED, TIME = 24, 12, 8


class TinyUNet(UNet):
    spec = FamilySpec(
        name="tiny-unet",
        title="tiny U-Net",
        view="unet:UNet",
        class_name="UNet2DConditionModel",
        blocks=(),
        latents=(LatentSpec(channels=4, patch=(1, 1, 1), scale=0.13025),),
        inputs=(Input("tokens", 3, "text tokens"), Input("pooled", 2, "a pooled vector")),
        encoders="none",
        can=ROWS_ALONE,
    )
    numbers = 6

    def model_sampling(self, shift: float | None) -> ModelSampling:
        return EpsPrediction("sqrt_linear", linear_start=0.00085, linear_end=0.012)

    def added_numbers(self, condition: Condition) -> list[float]:
        assert condition.size is not None
        return [*condition.size, 0, 0, *(condition.target_size or condition.size)]


@cache
def network(levels: int = 3) -> Any:
    """`levels`: the last of which is not halved. Random weights of a size at which every layer counts."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32, 48)[:levels],
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")[:levels],
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")[3 - levels :],
            transformer_layers_per_block=(1, 1, 2)[:levels],
            attention_head_dim=(2, 4, 6)[:levels],
            norm_num_groups=8,
            cross_attention_dim=TEXT,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME,
            projection_class_embeddings_input_dim=POOLED + 6 * TIME,
        ).eval()
        for name, parameter in unet.named_parameters():
            if name.endswith(".bias"):
                parameter.data.normal_(std=0.1)
            elif "norm" in name:
                parameter.data.normal_(1, 0.2)
        return unet


def condition(batch: int, seed: int = 5, size: tuple[int, int] = (104, 72)) -> Condition:
    draw = torch.Generator().manual_seed(seed)
    return Condition(
        {
            "tokens": torch.randn(batch, 7, TEXT, generator=draw),
            "pooled": torch.randn(batch, POOLED, generator=draw),
        },
        size=size,
    )
