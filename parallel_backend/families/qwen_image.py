"""Qwen-Image (arXiv 2508.02324), its Edit models too: joint attention, separate weights for text and image throughout.

Of ComfyUI and diffusers, ComfyUI is the reference where they differ: in positions on odd grids, in where the text's
positions begin if a reference is larger than the picture, and in the time, which is fp32. The pipeline of diffusers
also brings what guidance gives to the length of the positive prediction; that is left to the graph (CFGNorm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import Tensor

from ..sampling.model_sampling import FluxFlow, ModelSampling
from ..tokens.grid import Grid
from ..tokens.plan import Places
from ..tokens.rotary import Rotary, rotations_at
from .condition import Condition, check_widths
from .family import Sites
from .joint import JointFamily, JointSite, Place, own_rotary, places_of_references
from .keys.qwen_image import QWEN_IMAGE
from .state import Evaluation, State


@dataclass(frozen=True)
class Times:
    """The embeddings `[B, h]` of the time, and of time 0 for the image tokens `[S, 1]` that are of `references`.

    Without the last two, all tokens are at one time.
    """

    now: Tensor
    zero: Tensor | None = None
    references: Tensor | None = None


class DoubleBlock:
    """One block; modulation is in halves, before and behind the attention: shift, scale and gate each."""

    def __init__(self, layer: Any, sites: Sites, block: int, head_dim: int) -> None:
        self.layer = layer
        self.site = JointSite(sites, block, head_dim)

    def __call__(self, state: State) -> State:
        layer, times, rotary = self.layer, cast(Times, state.modulation), cast(Rotary, state.rotary)
        image, text = state["image"], state["text"]
        of_text = layer.txt_mod(times.now)[:, None].chunk(2, dim=-1)
        of_image = self._of_image(times)
        image_input, image_gate = _modulated(layer.img_norm1(image), of_image[0])
        text_input, text_gate = _modulated(layer.txt_norm1(text), of_text[0])
        attended, attended_text = self.site(layer.attn, image_input, text_input, None, rotary)
        image, text = image + image_gate * attended, text + text_gate * attended_text
        image_input, image_gate = _modulated(layer.img_norm2(image), of_image[1])
        text_input, text_gate = _modulated(layer.txt_norm2(text), of_text[1])
        image, text = image + image_gate * layer.img_mlp(image_input), text + text_gate * layer.txt_mlp(text_input)
        if image.dtype == torch.float16:
            image, text = image.clip(-65504, 65504), text.clip(-65504, 65504)
        return state.with_streams(text=text, image=image)

    def modulated_input(self, state: State) -> Tensor:
        """What its attention makes its projections of, of the image."""
        return _modulated(self.layer.img_norm1(state["image"]), self._of_image(cast(Times, state.modulation))[0])[0]

    def _of_image(self, times: Times) -> list[Tensor]:
        """The halves of the modulation of the image tokens, `[B, S or 1, 3 * h]` each."""
        now = self.layer.img_mod(times.now)[:, None].chunk(2, dim=-1)
        if times.zero is None or times.references is None:
            return list(now)
        zero = self.layer.img_mod(times.zero)[:, None].chunk(2, dim=-1)
        return [torch.where(times.references, *each) for each in zip(zero, now, strict=True)]


def _modulated(x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """The normed `x` `[B, S, h]` under shift and scale, and the gate, of `modulation` `[B, S or 1, 3 * h]`."""
    shift, scale, gate = modulation.chunk(3, dim=-1)
    return x * (1 + scale) + shift, gate


class QwenImage(JointFamily):
    spec = QWEN_IMAGE

    def adopt_network(self) -> None:
        self.transformer = cast(QwenImageTransformer2DModel, self.transformer)
        config = self.transformer.config
        self.hidden_size = self.transformer.inner_dim
        self.axes: tuple[int, ...] = tuple(config["axes_dims_rope"])
        self.reference_places = "index_timestep_zero" if config["zero_cond_t"] else "index"
        layers = enumerate(self.transformer.transformer_blocks)
        blocks = [DoubleBlock(layer, self.sites, number, config["attention_head_dim"]) for number, layer in layers]
        self.blocks, self.first_block = blocks, blocks[0]
        self._rotary = lru_cache(maxsize=32)(self._compute_rotary)

    def check_condition(self, condition: Condition) -> None:
        check_widths(condition, {"tokens": self.transformer.config["joint_attention_dim"]}, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        return FluxFlow() if shift is None else FluxFlow(shift=shift)

    def embed(self, evaluation: Evaluation) -> State:
        text = self.transformer.txt_in(self.transformer.txt_norm(self.own_text(evaluation)))
        return self.resume(evaluation, {"text": text, "image": self.transformer.img_in(self.own_image(evaluation))})

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> State:
        condition, shard, grid = evaluation.condition, evaluation.shard, evaluation.grids["image"]
        text_length, references = condition["tokens"].shape[1], condition.references
        rule = condition.reference_places or self.reference_places
        places = places_of_references(references, rule, grid, self.latent.patch)
        frames = (Grid.of(reference.shape[2:], self.latent.patch).frames for reference in references)
        rotary = self._rotary(text_length, grid, tuple(zip(places, frames, strict=True)))
        times = Times(self._embedded(evaluation.timestep))
        if references and rule == "index_timestep_zero":
            of_references = torch.arange(len(rotary) - text_length, device=self.device)[shard["image"]] >= grid.count
            times = Times(times.now, self._embedded(torch.zeros_like(evaluation.timestep)), of_references[:, None])
        return State(streams, times, own_rotary(rotary, text_length, shard))

    def modulated_input(self, state: State) -> Tensor:
        return self.first_block.modulated_input(state)

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        image = state["image"][:, predicted["image"]]
        return {"image": self.transformer.proj_out(self.transformer.norm_out(image, state.modulation.now))}

    def _embedded(self, timestep: Tensor) -> Tensor:
        """`[B, h]`; the module looks at nothing but the dtype of its second argument."""
        return self.transformer.time_text_embed(timestep, torch.empty(0, dtype=self.dtype, device=self.device))

    def _compute_rotary(self, text_length: int, grid: Grid, references: tuple[tuple[Place, int], ...]) -> Tensor:
        """Rotations `[St + S, 1, D / 2, 2]`. The centre of every picture is at 0 on the axes of rows and columns; the
        text follows the picture's last row and column on the diagonal of all axes.

        `references`: the place of each, and how many frames it has. Those of several are at their own numbers.
        """
        pictures = [(Place(0, 0, 0, grid.rows, grid.columns), grid.frames), *references]
        start = max(grid.rows // 2, grid.columns // 2)
        ids = [torch.arange(start, start + text_length, device=self.device)[:, None].expand(-1, 3)]
        for place, frames in pictures:
            top, left = place.top - place.rows // 2, place.left - place.columns // 2
            for first in range(frames) if frames > 1 else (place.first,):
                ids.append(place._replace(first=first, top=top, left=left).ids(self.device))
        return rotations_at(torch.cat(ids), self.axes)
