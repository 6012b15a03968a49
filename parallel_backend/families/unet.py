"""The U-Net of Stable Diffusion XL and its relatives (diffusers' UNet2DConditionModel) as a plain network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

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

    @property
    def levels(self) -> int:
        return len(self.network.config["block_out_channels"])

    @property
    def channels(self) -> int:
        return self.network.config["block_out_channels"][0]

    @property
    def row_multiple(self) -> int:
        return 2 ** (self.levels - 1)

    def self_attentions(self) -> Mapping[str, int]:
        strides = {"mid_block": self.row_multiple}
        for level in range(self.levels):
            strides[f"down_blocks.{level}"] = strides[f"up_blocks.{self.levels - 1 - level}"] = 2**level
        return {
            f"{part}.{name}": stride
            for part, stride in strides.items()
            for name, _ in self.network.get_submodule(part).named_modules()
            if name.endswith(".attn1")
        }

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
        """The network's numeric inputs, such as the picture's size: diffusers' `time_ids`."""

    def forward(self, latent: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        batch = latent.shape[0]
        added = {
            "text_embeds": condition["pooled"].to(self.dtype).expand(batch, -1),
            "time_ids": torch.tensor([self.added_numbers(condition)] * batch, device=latent.device),
        }
        tokens = condition["tokens"].to(self.dtype).expand(batch, -1, -1)
        return self.network(latent.to(self.dtype), timestep, tokens, added_cond_kwargs=added).sample
