"""What families share whose text and pictures, references among them, attend to each other at one site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..attention.site import KeySet
from ..tokens.grid import Grid, Patch, tokenise
from ..tokens.plan import Segment, Shard
from ..tokens.rotary import Rotary
from .condition import Condition, TimedImagePrompt
from .family import Sites, TokenFamily
from .state import Evaluation, State

STREAMS = ("text", "image")
"""The streams of every site, in this order."""


class JointFamily(TokenFamily):
    """Its streams are the text, and the picture with the tokens of its references behind its own."""

    def segments(self, condition: Condition, grids: Mapping[str, Grid]) -> dict[str, list[Segment]]:
        references = (Segment(Grid.of(each.shape[2:], self.latent.patch).count) for each in condition.references)
        return {
            "text": [Segment(condition["tokens"].shape[1])],
            "image": [Segment.of(grids["image"], "image"), *references],
        }

    def own_text(self, evaluation: Evaluation) -> Tensor:
        """The text's tokens in the shard, `[B, S, C]`, in the network's dtype."""
        own = evaluation.condition["tokens"][:, evaluation.shard["text"]]
        return own.to(self.dtype).expand(evaluation.batch, -1, -1)

    def own_image(self, evaluation: Evaluation) -> Tensor:
        """The tokens of the latent and of its references in the shard, `[B, S, C * pt * ph * pw]`, likewise."""
        tokens = evaluation.tokens["image"]
        if references := evaluation.condition.references:
            latents = (each.to(tokens).expand(evaluation.batch, *each.shape[1:]) for each in references)
            patch, channels_last = self.latent.patch, self.latent.channels_last
            tokens = torch.cat([tokens, *(tokenise(each, patch, channels_last=channels_last) for each in latents)], 1)
        return tokens[:, evaluation.shard["image"]].to(self.dtype)


def own_rotary(rotations: Tensor, text_length: int, shard: Shard) -> Rotary:
    """Of the tokens in the shard, from the `rotations` `[St + S, 1, D / 2, 2]` of all, the text's first."""
    return Rotary(torch.cat((rotations[:text_length][shard["text"]], rotations[text_length:][shard["image"]])))


def join(state: State) -> Tensor:
    """Text and image as one sequence, `[B, St + S, h]`."""
    return torch.cat((state["text"], state["image"]), dim=1)


def part(state: State, joined: Tensor) -> State:
    """The state with the streams that `join` would make `joined` of."""
    text, image = joined.split((state["text"].shape[1], state["image"].shape[1]), dim=1)
    return state.with_streams(text=text, image=image)


class JointSite:
    """The attention processor of a double block: projections, norms and rotary embedding here, the rest in `sites`.

    Values, keys and queries are sent in that order, each while the next is computed. Picture prompts are given the
    image's queries with their norm, and before their turn.
    """

    def __init__(self, sites: Sites, block: int, head_dim: int) -> None:
        self.sites = sites
        self.block = block
        self.head_dim = head_dim

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
        image_rotary_emb: Rotary,
        prompts: tuple[TimedImagePrompt, ...] = (),
    ) -> tuple[Tensor, ...]:
        text, image, attention = encoder_hidden_states, hidden_states, self.sites.attention
        rotate = image_rotary_emb.rotate

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim))

        value = attention.send(torch.cat((heads(attn.add_v_proj(text)), heads(attn.to_v(image))), dim=1), STREAMS)
        text_key = attn.norm_added_k(heads(attn.add_k_proj(text)))
        key = attention.send(rotate(torch.cat((text_key, attn.norm_k(heads(attn.to_k(image)))), dim=1)), STREAMS)
        text_query, own_query = attn.norm_added_q(heads(attn.add_q_proj(text))), attn.norm_q(heads(attn.to_q(image)))
        query = attention.send(rotate(torch.cat((text_query, own_query), dim=1)), STREAMS)
        attended = attention((self.block, "joint"), query, KeySet(key, value)).flatten(2).to(image.dtype)
        attended_text, attended_image = attended.split((text.shape[1], image.shape[1]), dim=1)
        if not attn.context_pre_only:  # the last block of some models has no use for what the text has attended to
            attended_text = attn.to_add_out(attended_text)
        outputs = attn.to_out[0](attended_image), attended_text
        added = [each.added((self.block, "joint"), self.block, [own_query], attention) for each in prompts]
        # The block adds a third output to the image tokens when it is done with them.
        return (*outputs, sum(added[1:], start=added[0])) if added else outputs


class SingleBlock:
    """A single block with its feed-forward between sending and attending: the exchange goes on behind it."""

    def __init__(self, layer: Any, sites: Sites, block: int, head_dim: int) -> None:
        self.layer = layer
        self.sites = sites
        self.block = block
        self.head_dim = head_dim

    def __call__(self, state: State) -> State:
        layer, attention = self.layer, self.sites.attention
        attn, rotary = layer.attn, cast(Rotary, state.rotary)
        hidden = join(state)
        normed, gate = layer.norm(hidden, emb=state.modulation)

        def heads(project: nn.Module) -> Tensor:
            return project(normed).unflatten(-1, (-1, self.head_dim))

        value = attention.send(heads(attn.to_v), STREAMS)
        key = attention.send(rotary.rotate(attn.norm_k(heads(attn.to_k))), STREAMS)
        query = attention.send(rotary.rotate(attn.norm_q(heads(attn.to_q))), STREAMS)
        feed_forward = layer.act_mlp(layer.proj_mlp(normed))
        attended = attention((self.block, "joint"), query, KeySet(key, value)).flatten(2).to(hidden.dtype)
        hidden = hidden + gate.unsqueeze(1) * layer.proj_out(torch.cat((attended, feed_forward), dim=2))
        if hidden.dtype == torch.float16:
            hidden = hidden.clip(-65504, 65504)
        return part(state, hidden)


class Place(NamedTuple):
    """The positions of a picture's tokens: `first` on the first axis of positions, rows and columns on the others."""

    first: int
    top: int
    left: int
    rows: int
    columns: int

    def ids(self, device: torch.device) -> Tensor:
        """`[rows * columns, 3]`, row by row."""
        ids = torch.empty(self.rows, self.columns, 3, device=device)
        ids[..., 0] = self.first
        ids[..., 1] = torch.arange(self.top, self.top + self.rows, device=device)[:, None]
        ids[..., 2] = torch.arange(self.left, self.left + self.columns, device=device)
        return ids.flatten(0, 1)


def places_of_references(references: Sequence[Tensor], rule: str, grid: Grid, patch: Patch) -> Iterator[Place]:
    """The positions of `references` `[B, C, ..., h, w]` beside a picture of `grid`, by the `rule` of that name.

    "index": each at the picture's own rows and columns, at the next position of the first axis; "index_timestep_zero"
    likewise, and "negative_index" at the position before. "offset": all at position 1, each right of those before or
    below them, whichever keeps the whole smaller. "uxo" (UNO, arXiv 2504.02160): each right below the one before, the
    first right below the picture.
    """
    size = patch[1]
    bottom = right = 0
    for number, reference in enumerate(references, start=1):
        height, width = reference.shape[-2:]
        first = top = left = 0
        if rule in ("index", "index_timestep_zero"):
            first = number
        elif rule == "negative_index":
            first = -number
        elif rule == "uxo":
            top, left = grid.rows * size + bottom, grid.columns * size + right
            bottom, right = bottom + height, right + width
        else:
            first = 1
            top, left = (0, right) if height + bottom > width + right else (bottom, 0)
            bottom, right = max(bottom, height + top), max(right, width + left)
        yield Place(first, *(-(-cells // size) for cells in (top, left, height, width)))
