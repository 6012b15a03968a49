"""IP-Adapters (arXiv 2308.06721): pictures as prompts, which a model's attention sites attend to like the text.

Every rank has the picture's few keys and values: nothing is sent for them but, with tensor parallelism, what Flux adds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection
from torch import Tensor, nn

from ..attention.site import Attention, KeySet, SiteId
from ..distributed.axis import Axis
from ..errors import UserError
from ..families.family import Family, with_tokens
from ..families.spec import count_blocks
from ..files.ip_adapter import PROJECTION, SITES, IPAdapterInfo, read_ip_adapter
from ..layout.stages import Stage
from ..weights.tensor_cuts import TensorCuts

LIKE = "transformer_blocks.0.attn.to_k"
"""The layer of the model that an adapter's keys and values are cut like."""
CUT = ("to_k_ip", "to_v_ip")


@dataclass(frozen=True)
class Seen:
    """A picture's tokens `[B, n, C]` and, for an adapter that takes it, an embedding of the time `[B, Ct]`."""

    tokens: Tensor
    time: Tensor | None = None


class IPAdapter(ABC):
    """A loaded IP-Adapter: all of what makes tokens of a picture, and this rank's part of the rest.

    `sites`: of this rank's blocks, by the numbers of the model's sites; of their keys and values this rank's heads.
    `extents`: how many columns each tensor-parallel rank has of these.
    """

    picture_dims: int

    def __init__(
        self, info: IPAdapterInfo, projection: nn.Module, sites: Mapping[int, Any], extents: list[int]
    ) -> None:
        self.info = info
        self.projection = projection
        self.sites = sites
        self.extents = extents
        self.bytes = sum(each.nbytes for module in (projection, *sites.values()) for each in module.parameters())

    @classmethod
    @abstractmethod
    def projection_of(cls, info: IPAdapterInfo) -> nn.Module:
        """What makes tokens of a picture, without its weights."""

    @classmethod
    @abstractmethod
    def site_of(cls, info: IPAdapterInfo) -> nn.Module:
        """What shows them to a site, without its weights."""

    @abstractmethod
    def see(self, picture: Tensor, timestep: Tensor) -> Seen:
        """`picture` `[B, …]`, as an image encoder gives it, at the times `timestep` `[B]`."""

    @abstractmethod
    def attended(
        self, site: SiteId, number: int, seen: Seen, own: Sequence[Tensor], attention: Attention, tensor: Axis
    ) -> Tensor:
        """Returns `TimedImagePrompt.added` at weight 1; `tensor`: the ranks that each hold some of the heads."""

    def check_picture(self, picture: Tensor, batch: int) -> None:
        """Raise `UserError` for a picture of another image encoder, or for as many as there are not in the batch."""
        shape, width = list(picture.shape), self.info.picture_width
        if len(shape) != self.picture_dims or not all(shape) or shape[0] not in (1, batch) or shape[-1] != width:
            raise UserError(
                f"{self.info.name} takes the embedding of 1 picture or of {batch}, of {self.picture_dims} dims and "
                f"width {width}; it is given one of the shape {shape}.",
                "Encode the picture with the vision model that belongs to the IP-Adapter.",
            )


class FluxIPAdapter(IPAdapter):
    """XLabs' for Flux.1: the image's queries attend to the picture alone, and what they find is added to the tokens."""

    picture_dims = 2

    @classmethod
    def projection_of(cls, info: IPAdapterInfo) -> nn.Module:
        width = info.shapes["sites.0.to_k_ip.weight"][1]
        return ImageProjection(info.picture_width, width, info.shapes["projection.image_embeds.weight"][0] // width)

    @classmethod
    def site_of(cls, info: IPAdapterInfo) -> nn.Module:
        hidden, width = info.shapes["sites.0.to_k_ip.weight"]
        return nn.ModuleDict({name: nn.Linear(width, hidden) for name in CUT})

    def see(self, picture: Tensor, timestep: Tensor) -> Seen:
        return Seen(self.projection(picture))

    def attended(
        self, site: SiteId, number: int, seen: Seen, own: Sequence[Tensor], attention: Attention, tensor: Axis
    ) -> Tensor:
        (query,) = own
        key, value = (self.sites[number][name](seen.tokens).unflatten(-1, (-1, query.shape[-1])) for name in CUT)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        # A rank without image tokens or heads has nothing to compute, and kernels crash on empty input.
        found = F.scaled_dot_product_attention(query, key, value) if query.numel() else torch.empty_like(query)
        found = found.transpose(1, 2).flatten(2)
        return tensor.all_gather(found, self.extents, dim=-1) if tensor.size > 1 else found


class SD3IPAdapter(IPAdapter):
    """InstantX's for Stable Diffusion 3.5: the image attends once more, to itself and the picture, with other norms.

    The picture's tokens depend on the time.
    """

    picture_dims = 3

    @classmethod
    def projection_of(cls, info: IPAdapterInfo) -> nn.Module:
        shapes = {key.removeprefix(PROJECTION): shape for key, shape in info.shapes.items()}
        (hidden, embed), head_dim = shapes["proj_in.weight"], 64
        return IPAdapterTimeImageProjection(
            embed_dim=embed,
            output_dim=shapes["proj_out.weight"][0],
            hidden_dim=hidden,
            depth=count_blocks(shapes, "layers"),
            dim_head=head_dim,
            heads=shapes["layers.0.attn.to_q.weight"][0] // head_dim,
            num_queries=shapes["latents"][1],
            ffn_ratio=shapes["layers.0.ff.net.0.proj.weight"][0] // hidden,
            timestep_in_dim=shapes["time_embedding.linear_1.weight"][1],
        )

    @classmethod
    def site_of(cls, info: IPAdapterInfo) -> nn.Module:
        hidden, width = info.shapes["sites.0.to_k_ip.weight"]
        return SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=hidden,
            ip_hidden_states_dim=width,
            head_dim=info.shapes["sites.0.norm_q.weight"][0],
            timesteps_emb_dim=info.shapes["sites.0.norm_ip.linear.weight"][1],
        )

    def see(self, picture: Tensor, timestep: Tensor) -> Seen:
        return Seen(*self.projection(picture, timestep))

    def attended(
        self, site: SiteId, number: int, seen: Seen, own: Sequence[Tensor], attention: Attention, tensor: Axis
    ) -> Tensor:
        layer, (value, key, query) = self.sites[number], own
        normed = layer.norm_ip(seen.tokens, temb=seen.time)
        picture_key, picture_value = (getattr(layer, name)(normed).unflatten(-1, (-1, query.shape[-1])) for name in CUT)
        sent = [attention.send(each, ("image",)) for each in (value, layer.norm_k(key), layer.norm_q(query))]
        extra_kv = layer.norm_ip_k(picture_key), picture_value
        return attention(site, sent[2], KeySet(sent[1], sent[0]), extra_kv=extra_kv).flatten(2).to(query.dtype)


IP_ADAPTERS: dict[str, type[IPAdapter]] = {"flux": FluxIPAdapter, "sd3": SD3IPAdapter}
"""IP-Adapters by the family of their models."""


@dataclass(frozen=True)
class ActiveImagePrompt:
    """A picture `[B or 1, …]`, as an image encoder gives it, and the IP-Adapter that shows it.

    It works while the model's clock is from `start` down to `end`. `tensor`: the ranks that share the heads.
    """

    adapter: IPAdapter
    picture: Tensor
    weight: float
    start: float
    end: float
    tensor: Axis

    def part(self, part: slice, batch: int) -> ActiveImagePrompt:
        return replace(self, picture=self.picture[part] if len(self.picture) == batch else self.picture[:1])

    def is_active(self, timestep: float) -> bool:
        return self.weight != 0.0 and self.end <= timestep <= self.start

    def at(self, timestep: Tensor, place: int) -> TimedPrompt:
        picture = self.picture.expand(len(timestep), *self.picture.shape[1:])
        weight = self.weight if self.is_active(float(timestep[0])) else 0.0
        return TimedPrompt(self.adapter, self.adapter.see(picture, timestep), weight, self.tensor, place)


@dataclass(frozen=True)
class TimedPrompt:
    """A picture at one moment of a run. `place`: which of its condition's pictures it is."""

    adapter: IPAdapter
    seen: Seen
    weight: float
    tensor: Axis
    place: int

    def added(self, site: SiteId, number: int, own: Sequence[Tensor], attention: Attention) -> Tensor:
        place = (*site, "picture", self.place)
        return self.weight * self.adapter.attended(place, number, self.seen, own, attention, self.tensor)


def check_family(info: IPAdapterInfo, family: Family) -> None:
    """Raise `UserError` for a model that the IP-Adapter was not made for."""
    width = with_tokens(family, f"The IP-Adapter {info.name}").hidden_size
    theirs = (family.name, width, len(family.prompt_sites))
    if (info.family, info.width, info.sites) != theirs:
        raise UserError(
            f"{info.name} is an IP-Adapter for {info.family} models of width {info.width} and {info.sites} attention "
            f"sites; this {family.name} model has the width {width} and {len(family.prompt_sites)} sites "
            "that can be shown a picture.",
            "Choose an IP-Adapter that was trained for the model.",
        )


def open_ip_adapter(path: Path, family: Family, cuts: TensorCuts, stage: Stage) -> IPAdapter:
    """Loads the part of an IP-Adapter for the blocks of `stage` and the heads of `cuts`. Raises `UserError`."""
    info = read_ip_adapter(path)
    check_family(info, family)
    kind = IP_ADAPTERS[info.family]
    own = stage.blocks(family.block_parameters)
    with torch.device("meta"):
        modules = {PROJECTION: kind.projection_of(info)}
        modules |= {f"{SITES}.{number}.": kind.site_of(info) for number in range(info.sites)}
    _check_shapes(info, modules)
    sites = {}
    for number, block in enumerate(family.prompt_sites):
        if own.start <= block < own.stop:
            prefix = f"{SITES}.{number}."
            sites[number] = _with_weights(info, modules[prefix], prefix, family, cuts)
    projection = _with_weights(info, modules[PROJECTION], PROJECTION, family, cuts)
    cut = cuts.cut_of(LIKE)
    return kind(info, projection, sites, cuts.extents(cut, info.width) if cut else [info.width])


def _check_shapes(info: IPAdapterInfo, modules: Mapping[str, nn.Module]) -> None:
    expected = {
        prefix + name: tuple(tensor.shape)
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    found = info.shapes
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise UserError(
            f"{info.checkpoint.source}: {len(wrong)} tensors do not fit an IP-Adapter for {info.family}, such as "
            f"{info.keys.get(wrong[0], wrong[0])}: {found.get(wrong[0], 'missing')}, expected "
            f"{expected.get(wrong[0], 'none')}.",
            "Is it a complete IP-Adapter?",
        )


def _with_weights(info: IPAdapterInfo, module: nn.Module, prefix: str, family: Family, cuts: TensorCuts) -> nn.Module:
    for name in module.state_dict():
        tensor = info.checkpoint.tensor(info.keys[prefix + name])
        layer, _, leaf = name.rpartition(".")
        slices = cuts.slices(f"{LIKE}.{leaf}", tensor.shape) if layer in CUT else None
        own = (slices.of(tensor) if slices else tensor).to(family.device, family.dtype)
        setattr(module.get_submodule(layer), leaf, nn.Parameter(own, requires_grad=False))
    return module.eval()
