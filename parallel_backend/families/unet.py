"""The U-Net of Stable Diffusion XL and its relatives (diffusers' UNet2DConditionModel) as a plain network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .condition import Condition
from .plain import PlainFamily


class UNet(PlainFamily):
    """Down, middle and up blocks. Every level but the last ends with half of its rows and columns, rounded up.

    `numbers`: how many `added_numbers` there are.

    Sources: Stable Diffusion (arXiv 2112.10752), and for text and sizes added to the time, XL (arXiv 2307.01952).
    """

    numbers: int

    def __init__(self, network: Any, dtype: torch.dtype, device: torch.device) -> None:
        config = network.config
        levels = len(config["block_out_channels"])
        super().__init__(network, dtype, device, _self_attentions(network, levels))
        self.row_multiple = 2 ** (levels - 1)
        self.latent_channels = config["out_channels"]

    @property
    def inputs(self) -> Mapping[str, int]:
        config = self.network.config
        pooled = config["projection_class_embeddings_input_dim"] - self.numbers * config["addition_time_embed_dim"]
        return {"tokens": config["cross_attention_dim"], "pooled": pooled}

    @property
    def input_channels(self) -> int:
        return self.network.config["in_channels"]

    @abstractmethod
    def added_numbers(self, condition: Condition) -> list[float]:
        """What the network is told of the picture beside the text, such as its size: diffusers' `time_ids`."""

    def forward(self, latent: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        batch = latent.shape[0]
        added = {
            "text_embeds": condition["pooled"].to(self.dtype).expand(batch, -1),
            "time_ids": torch.tensor([self.added_numbers(condition)] * batch, device=latent.device),
        }
        tokens = condition["tokens"].to(self.dtype).expand(batch, -1, -1)
        return self.network(latent.to(self.dtype), timestep, tokens, added_cond_kwargs=added).sample


def _self_attentions(network: Any, levels: int) -> dict[str, int]:
    """The stride of each self-attention, by its module's name."""
    strides = {"mid_block": 2 ** (levels - 1)}
    for level in range(levels):
        strides[f"down_blocks.{level}"] = strides[f"up_blocks.{levels - 1 - level}"] = 2**level
    return {
        f"{part}.{name}": stride
        for part, stride in strides.items()
        for name, _ in network.get_submodule(part).named_modules()
        if name.endswith(".attn1")
    }
