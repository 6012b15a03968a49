"""The U-Net of Stable Diffusion XL and its relatives (diffusers' UNet2DConditionModel) as a plain network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .condition import Condition, check_widths
from .plain import PlainFamily
from .spec import LatentSpec


class UNet(PlainFamily):
    """Down, middle and up blocks. Every level but the last ends with half of its rows and columns, rounded up.

    `numbers`: how many `added_numbers` there are. They are embedded once a condition: the network is given them so.

    Sources: Stable Diffusion (arXiv 2112.10752), and for text and sizes added to the time, XL (arXiv 2307.01952).
    """

    numbers: int

    def __init__(
        self,
        network: Any,
        dtype: torch.dtype,
        device: torch.device,
        latents: tuple[LatentSpec, ...] | None = None,
    ) -> None:
        super().__init__(network, dtype, device, latents)
        self._embed = network.add_time_proj
        network.add_time_proj = nn.Identity()

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
    def _added_width(self) -> int:
        """Of the pooled vector with the embedded numbers behind it."""
        return self.network.config["projection_class_embeddings_input_dim"]

    @property
    def _pooled_width(self) -> int:
        return self._added_width - self.numbers * self.network.config["addition_time_embed_dim"]

    @property
    def input_channels(self) -> int:
        return self.network.config["in_channels"]

    def check_condition(self, condition: Condition) -> None:
        """The pooled vector may have the embedded numbers behind it already."""
        pooled = condition.get("pooled")
        is_whole = pooled is not None and pooled.shape[-1] == self._added_width
        widths = {"tokens": self.network.config["cross_attention_dim"], "pooled": self._pooled_width}
        check_widths(condition, {"tokens": widths["tokens"]} if is_whole else widths, self.spec)

    @abstractmethod
    def added_numbers(self, condition: Condition) -> list[float]:
        """What the network is told in numbers, such as the picture's size: diffusers' `time_ids`."""

    def make_prelude(self, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """The text tokens `[b, S, C]`, the pooled vector and the embedded numbers `[b, …]`; b is 1 or the batch."""
        pooled = condition["pooled"]
        if pooled.shape[-1] == self._added_width:
            text, embedded = pooled.split((self._pooled_width, self._added_width - self._pooled_width), dim=1)
        else:
            numbers = torch.tensor(self.added_numbers(condition), device=self.device)
            text, embedded = pooled, self._embed(numbers).flatten().expand(len(pooled), -1)
        return condition["tokens"].to(self.dtype), text.to(self.dtype), embedded

    def forward(self, latent: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        batch = latent.shape[0]
        tokens, text, embedded = (each.expand(batch, *each.shape[1:]) for each in self.prelude(condition))
        added = {"text_embeds": text, "time_ids": embedded}
        return self.network(latent.to(self.dtype), timestep, tokens, added_cond_kwargs=added).sample

    def uninstall(self) -> None:
        super().uninstall()
        self.network.add_time_proj = self._embed
