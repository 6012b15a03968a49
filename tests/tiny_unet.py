"""Tiny U-Nets in the manner of Stable Diffusion XL and its refiner, of random weights, and their plain views."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.parallel_backend.families.keys.sdxl import RULES, SDXL, SDXL_REFINER
from paralleldit.parallel_backend.families.registry import load_view
from paralleldit.parallel_backend.families.spec import FamilySpec
from paralleldit.parallel_backend.families.unet import UNet

CPU = torch.device("cpu")
TEXT, POOLED, TIME = 24, 12, 8
BASE, REFINER = "sdxl", "sdxl refiner"
SPECS: dict[str, FamilySpec] = {BASE: SDXL, REFINER: SDXL_REFINER}
TYPES = {
    BASE: ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    REFINER: ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
}
NUMBERS = {BASE: 6, REFINER: 5}


@cache
def network(model: str = BASE) -> Any:
    """Of a size at which every layer counts; the base model's last level is not halved."""
    return _network(model, widths=(16, 32, 48, 48), heads=(2, 4, 6, 6), groups=4, number=TIME)


@cache
def of_files(model: str = BASE) -> Any:
    """With what single files do not say as in all published models: heads of 64 channels, norms of 32 groups."""
    return _network(model, widths=(64, 128, 128, 128), heads=(1, 2, 2, 2), groups=32, number=256)


def _network(model: str, widths: tuple[int, ...], heads: tuple[int, ...], groups: int, number: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        levels = len(TYPES[model])
        unet = UNet2DConditionModel(
            block_out_channels=widths[:levels],
            layers_per_block=2,
            down_block_types=TYPES[model],
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(TYPES[model])),
            transformer_layers_per_block=(1, 1, 2) if model == BASE else (1, 1, 1, 1),
            attention_head_dim=heads[:levels],
            norm_num_groups=groups,
            cross_attention_dim=TEXT,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=number,
            projection_class_embeddings_input_dim=POOLED + NUMBERS[model] * number,
            _marks=(),
        ).eval()
        for name, parameter in unet.named_parameters():
            if name.endswith(".bias"):
                parameter.data.normal_(std=0.1)
            elif "norm" in name:
                parameter.data.normal_(1, 0.2)
        return unet


def original_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights by the names of the original layout."""
    names = {target: rule.source for rule in RULES for target in rule.targets}
    originals = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        source = names[module]
        if ".upsamplers." in name and f"{module.split('.upsamplers')[0]}.attentions.0.norm.weight" in weights:
            source = source.replace(".1.conv", ".2.conv")
        originals[f"{source}.{leaf}"] = tensor
    return originals


def family(model: str = BASE) -> UNet:
    return load_view(SPECS[model])(network(model), torch.float32, CPU)


def condition(batch: int, seed: int = 5, size: tuple[int, int] = (104, 72)) -> Condition:
    draw = torch.Generator().manual_seed(seed)
    return Condition(
        {
            "tokens": torch.randn(batch, 7, TEXT, generator=draw),
            "pooled": torch.randn(batch, POOLED, generator=draw),
        },
        size=size,
        crop=(8, 16),
        aesthetic_score=6.0,
    )


def told(given: Condition, model: str = BASE) -> dict[str, torch.Tensor]:
    """The condition as diffusers takes it."""
    assert given.size is not None
    assert given.aesthetic_score is not None
    last = given.target_size or given.size if model == BASE else (given.aesthetic_score,)
    numbers = [*given.size, *given.crop, *last]
    return {"text_embeds": given["pooled"], "time_ids": torch.tensor([numbers] * len(given["pooled"]))}
