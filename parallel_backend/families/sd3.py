"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): joint attention, separate weights for text and image.

The last block gives no text. The first blocks of 3.5-medium have a second attention site, over the image alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from ..attention.site import KeySet, Sent
from ..sampling.model_sampling import DiscreteFlow, ModelSampling
from ..tokens.grid import Grid
from ..tokens.plan import Places
from .blocks import Block
from .condition import Condition, TimedImagePrompt, check_widths
from .family import Sites
from .joint import STREAMS, JointFamily
from .keys import sd3 as keys
from .state import Evaluation, State

SHIFT = 3.0


class Site:
    """The attention processor of one site: projections and norms here, the rest in `sites`.

    Without text it attends over the image alone. Values, keys and queries are sent in that order, each while the next
    is computed. Picture prompts are given those of the image, without their norms.
    """

    def __init__(self, sites: Sites, head_dim: int, block: int, name: str, number: int) -> None:
        """`name`: which of its block's sites it is; `number`: which of the model's."""
        self.sites = sites
        self.head_dim = head_dim
        self.block = block
        self.name = name
        self.number = number

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompts: tuple[TimedImagePrompt, ...] = (),
    ) -> Tensor | tuple[Tensor, Tensor]:
        image, text, attention = hidden_states, encoder_hidden_states, self.sites.attention
        own: list[Tensor] = []

        def heads(x: Tensor, project: nn.Module) -> Tensor:
            return project(x).unflatten(-1, (-1, self.head_dim))

        def normed(x: Tensor, norm: nn.Module | None) -> Tensor:
            return x if norm is None else norm(x)

        def send(project: Any, norm: Any, text_project: Any, text_norm: Any) -> Sent:
            of_image = heads(image, project)
            if prompts:
                own.append(of_image)
            of_image = normed(of_image, norm)
            if text is None:
                return attention.send(of_image, ("image",))
            of_text = normed(heads(text, text_project), text_norm)
            return attention.send(torch.cat((of_text, of_image), dim=1), STREAMS)

        value = send(attn.to_v, None, attn.add_v_proj, None)
        key = send(attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k)
        query = send(attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q)
        attended = attention((self.block, self.name), query, KeySet(key, value)).flatten(2).to(image.dtype)
        text_length = attended.shape[1] - image.shape[1]
        attended_text, attended_image = attended.split((text_length, image.shape[1]), dim=1)
        for prompt in prompts:
            site = (self.block, self.name)
            attended_image = attended_image + prompt.added(site, self.number, own, attention)
        if text is None:
            return attn.to_out[0](attended_image)
        # The last block has no use for what the text has attended to.
        return attn.to_out[0](attended_image), attended_text if attn.context_pre_only else attn.to_add_out(
            attended_text
        )


class SD3(JointFamily):
    spec = keys.SD3

    def adopt_network(self) -> None:
        self.transformer = cast(SD3Transformer2DModel, self.transformer)
        self.max_side = self.transformer.config["pos_embed_max_size"]
        self.hidden_size = self.transformer.inner_dim
        self.blocks = [_as_block(layer) for layer in self.transformer.transformer_blocks]
        head_dim, found = self.transformer.config["attention_head_dim"], self.attentions()
        self.prompt_sites = [block for block, _, _ in found]
        for number, (block, name, attn) in enumerate(found):
            attn.set_processor(Site(self.sites, head_dim, block, name, number))
        self._positions = lru_cache(maxsize=2)(self._crop_positions)

    def check_condition(self, condition: Condition) -> None:
        config = self.transformer.config
        widths = {"tokens": config["joint_attention_dim"], "pooled": config["pooled_projection_dim"]}
        check_widths(condition, widths, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        return DiscreteFlow(shift=SHIFT if shift is None else shift)

    def embed(self, evaluation: Evaluation) -> State:
        text = self.transformer.context_embedder(self.own_text(evaluation))
        return self.resume(evaluation, {"text": text, "image": self.embed_image(evaluation)})

    def embed_image(self, evaluation: Evaluation) -> Tensor:
        """The image tokens in the shard, embedded and with their positions."""
        image = self.embed_patches(self.transformer.pos_embed.proj, self.own_image(evaluation))
        return image + self._positions(evaluation.grids["image"])[evaluation.shard["image"]]

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> State:
        pooled = evaluation.condition["pooled"].to(self.dtype).expand(evaluation.batch, -1)
        return State(streams, self.transformer.time_text_embed(evaluation.timestep, pooled))

    def modulated_input(self, state: State) -> Tensor:
        return cast(Any, self.transformer.transformer_blocks[0]).norm1(state["image"], emb=state.modulation)[0]

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        image = state["image"][:, predicted["image"]]
        return {
            "image": self.latent_tokens(self.transformer.proj_out(self.transformer.norm_out(image, state.modulation)))
        }

    def attentions(self) -> list[tuple[int, str, Any]]:
        """The attention sites in the order of computation: the block's number, the name in it, and the layer."""
        return [
            (block, name, attn)
            for block, layer in enumerate(self.transformer.transformer_blocks)
            for name in ("attn", "attn2")
            if (attn := getattr(layer, name)) is not None
        ]

    def _crop_positions(self, grid: Grid) -> Tensor:
        """`[S, h]`: the middle of the square of positions that the model was trained with."""
        side = cast(int, self.max_side)
        top, left = ((side - extent) // 2 for extent in (grid.rows, grid.columns))
        table = cast(Tensor, self.transformer.pos_embed.pos_embed)[0].unflatten(0, (side, side))
        return table[top : top + grid.rows, left : left + grid.columns].flatten(0, 1).to(self.dtype)


def _as_block(layer: nn.Module) -> Block:
    block = cast(JointTransformerBlock, layer)

    def run(state: State) -> State:
        text, image = block(
            hidden_states=state["image"],
            encoder_hidden_states=state["text"],
            temb=state.modulation,
            joint_attention_kwargs={"prompts": state.prompts} if state.prompts else None,
        )
        return state.with_streams(image=image) if text is None else state.with_streams(text=text, image=image)

    return run
