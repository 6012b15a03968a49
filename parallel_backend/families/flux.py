"""Flux.1 (schnell, dev): joint attention; double blocks with separate text and image weights, then single blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from ..sampling.model_sampling import DiscreteFlow, FluxFlow, ModelSampling
from ..tokens.plan import Places
from ..tokens.rotary import rotations
from .blocks import Block
from .condition import Condition, check_widths
from .joint import JointFamily, JointSite, Place, SingleBlock, own_rotary, places_of_references
from .keys.flux import FLUX
from .state import Evaluation, State


class Flux(JointFamily):
    spec = FLUX

    def adopt_network(self) -> None:
        self.transformer = cast(FluxTransformer2DModel, self.transformer)
        self.hidden_size = self.transformer.inner_dim
        double, single = self.transformer.transformer_blocks, self.transformer.single_transformer_blocks
        for number, layer in enumerate(double):
            cast(Any, layer.attn).set_processor(JointSite(self.sites, number, layer.attn.head_dim))
        head_dim = self.transformer.config["attention_head_dim"]
        singles = [SingleBlock(layer, self.sites, number, head_dim) for number, layer in enumerate(single, len(double))]
        self.blocks = [*map(_double_block, double), *singles]
        self.prompt_sites = range(len(double))
        self._rotary = lru_cache(maxsize=32)(self._compute_rotary)

    @property
    def input_channels(self) -> int:
        return self.transformer.config["in_channels"] // math.prod(self.latent.patch)

    def check_condition(self, condition: Condition) -> None:
        config = self.transformer.config
        widths = {"tokens": config["joint_attention_dim"], "pooled": config["pooled_projection_dim"]}
        check_widths(condition, widths, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        # Only dev is distilled with guidance and trained with a shifted clock; schnell's runs straight.
        if self.transformer.config["guidance_embeds"]:
            return FluxFlow() if shift is None else FluxFlow(shift=shift)
        return DiscreteFlow(shift=1.0 if shift is None else shift, multiplier=1.0)

    def embed(self, evaluation: Evaluation) -> State:
        text = self.transformer.context_embedder(self.own_text(evaluation))
        image = self.transformer.x_embedder(self.own_image(evaluation))
        return self.resume(evaluation, {"text": text, "image": image})

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> State:
        model, condition = self.transformer, evaluation.condition
        timestep = evaluation.timestep.to(self.dtype) * 1000
        pooled = condition["pooled"].to(self.dtype).expand(evaluation.batch, -1)
        if not model.config["guidance_embeds"]:
            modulation = model.time_text_embed(timestep, pooled)
        elif condition.guidance is None:
            embed = cast(Any, model.time_text_embed)
            modulation = embed.timestep_embedder(embed.time_proj(timestep).to(self.dtype)) + embed.text_embedder(pooled)
        else:
            guidance = torch.full_like(timestep, condition.guidance) * 1000
            modulation = model.time_text_embed(timestep, guidance, pooled)
        grid, text_length = evaluation.grids["image"], condition["tokens"].shape[1]
        picture, rule = Place(0, 0, 0, grid.rows, grid.columns), condition.reference_places or "offset"
        references = places_of_references(condition.references, rule, grid, self.latent.patch)
        rotary = self._rotary(text_length, (picture, *references))
        return State(streams, modulation, own_rotary(rotary, text_length, evaluation.shard))

    def modulated_input(self, state: State) -> Tensor:
        return cast(Any, self.transformer.transformer_blocks[0]).norm1(state["image"], emb=state.modulation)[0]

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        image = state["image"][:, predicted["image"]]
        return {"image": self.transformer.proj_out(self.transformer.norm_out(image, state.modulation))}

    def _compute_rotary(self, text_length: int, places: tuple[Place, ...]) -> Tensor:
        """Rotations `[St + S, 1, D / 2, 2]`: text tokens sit at position 0, image tokens at their row and column."""
        ids = [torch.zeros(text_length, 3, device=self.device), *(place.ids(self.device) for place in places)]
        return rotations(*self.transformer.pos_embed(torch.cat(ids)))


def _double_block(layer: nn.Module) -> Block:
    def block(state: State) -> State:
        text, image = layer(
            hidden_states=state["image"],
            encoder_hidden_states=state["text"],
            temb=state.modulation,
            image_rotary_emb=state.rotary,
            joint_attention_kwargs={"prompts": state.prompts} if state.prompts else None,
        )
        return state.with_streams(text=text, image=image)

    return block
