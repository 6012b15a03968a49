"""The made-up family as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from paralleldit.parallel_backend.attention.group_norm import group_norm
from paralleldit.parallel_backend.attention.site import Attention, KeySet
from paralleldit.parallel_backend.families.blocks import Block
from paralleldit.parallel_backend.families.condition import Condition, check_widths
from paralleldit.parallel_backend.families.family import TokenFamily
from paralleldit.parallel_backend.families.spec import (
    Config,
    Cut,
    FamilySpec,
    HeadGroup,
    Input,
    LatentSpec,
    Shapes,
    count_blocks,
)
from paralleldit.parallel_backend.families.state import Evaluation, State
from paralleldit.parallel_backend.layout.stages import BlockList
from paralleldit.parallel_backend.sampling.model_sampling import DiscreteFlow, ModelSampling
from paralleldit.parallel_backend.tokens.grid import Grid
from paralleldit.parallel_backend.tokens.plan import Places, Segment
from paralleldit.parallel_backend.tokens.rotary import Rotary
from paralleldit.tests.made_up.network import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    PAD_MULTIPLE,
    SOUND,
    SOUND_WEIGHT,
    TEXT,
    VIDEO,
    Attend,
    sines,
)
from torch import Tensor, nn

JOINT, HEARD = ("pad", "video"), ("sound",)

GROUPS = {"heads": HeadGroup("heads", "head_dim"), "kv_heads": HeadGroup("kv_heads", "head_dim", serves="heads")}

CUTS = (
    Cut(r"(video|sound)\.to_q|linear\.[qkv]", "column", ("heads",)),
    Cut(r"(video|sound)\.to_[kv]", "column", ("kv_heads",)),
    Cut(r"(video|sound)\.norm_q", "norm", ("heads",)),
    Cut(r"(video|sound)\.norm_k", "norm", ("kv_heads",)),
    Cut(r"(video|sound)\.to_out|linear_out", "row", ("heads",)),
    Cut("static|project", "column", ("kv_heads", "kv_heads")),
    Cut("ff_in", "column"),
    Cut("ff_out", "row"),
)


def derive_config(layout: str, shapes: Shapes, declared: Config) -> dict[str, Any]:
    own = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return {"num_layers": count_blocks(shapes, "blocks"), **own}


@dataclass
class Modulation:
    """`times` `[B, T, 16]` of the frames; `frames` `[S]`: that of each of this rank's tokens of the video."""

    times: Tensor
    frames: Tensor

    def of(self, pads: int) -> Tensor:
        """`[B, S, 16]` of this rank's pads and tokens of the video."""
        of_pads = self.times.mean(1, keepdim=True).expand(-1, pads, -1)
        return torch.cat((of_pads, self.times[:, self.frames]), dim=1)


@dataclass
class MadeUpState(State):
    """`prelude`: the raw text, and what blocks have made of it; `places`: tokens of a frame."""

    prelude: Any = None
    places: int = 0


MADE_UP = FamilySpec(
    name="made-up",
    title="made-up",
    view="paralleldit.tests.made_up.view:MadeUp",
    class_name="paralleldit.tests.made_up.network:MadeUpNetwork",
    blocks=(BlockList(("blocks", "transient_projections"), apart=("blocks.0.head_scale",)),),
    latents=(
        LatentSpec(channels=3, name="video", dims=3, patch=(1, 2, 2), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 0.5)),
        LatentSpec(channels=2, name="sound", dims=2, stride=(1, 1, 1), patch=(1, 1, 3)),
    ),
    inputs=(Input("tokens", 3, "text tokens"), Input("each", 4, "tokens for each block")),
    encoders="none",
    landmarks={"diffusers": {"pads": "pad", "companion": "transient_projections.0.project.weight"}},
    derive_config=derive_config,
    cuts=CUTS,
    heads=GROUPS,
    takes_next_time=True,
)


class MadeUp(TokenFamily):
    spec = MADE_UP
    streams = ("pad", "video", "sound")
    controlled = "video"
    hidden_size = VIDEO

    def adopt_network(self) -> None:
        self.blocks = [self._as_block(number) for number in range(len(self.transformer.blocks))]

    @property
    def widths(self) -> dict[str, int]:
        return {"pad": VIDEO, "video": VIDEO, "sound": SOUND}

    @property
    def carry_dtype(self) -> torch.dtype:
        return torch.float32

    def check_condition(self, condition: Condition) -> None:
        check_widths(condition, {"tokens": TEXT, "each": TEXT}, self.spec)

    def model_sampling(self, shift: float | None) -> ModelSampling:
        return DiscreteFlow(shift=1.0 if shift is None else shift, multiplier=1.0)

    def segments(self, condition: Condition, grids: Mapping[str, Grid]) -> dict[str, list[Segment]]:
        video = grids["video"]
        return {
            "pad": [Segment(-video.count % PAD_MULTIPLE)],
            "video": [Segment.of(video, "video", unit=video.rows * video.columns)],
            "sound": [Segment.of(grids["sound"], "sound")],
        }

    def make_prelude(self, condition: Condition) -> dict[Any, Any]:
        return {"text": condition["tokens"].to(self.dtype), "each": condition["each"].to(self.dtype)}

    def embed(self, evaluation: Evaluation) -> State:
        model, shard, batch = self.transformer, evaluation.shard, evaluation.batch
        of = lambda name: evaluation.tokens[name][:, shard[name]].to(self.dtype)  # noqa: E731
        pads = self.segments(evaluation.condition, evaluation.grids)["pad"][0].count
        streams = {
            "pad": model.pad.expand(batch, pads, -1)[:, shard["pad"]].float(),
            "video": model.video_in(of("video")).float(),
            "sound": model.sound_in(of("sound")).float(),
        }
        return self.resume(evaluation, streams)

    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> State:
        grid, shard = evaluation.grids["video"], evaluation.shard
        places, time, following = grid.rows * grid.columns, evaluation.timestep, evaluation.next_timestep
        time = time if time.ndim == 2 else time[:, None].expand(-1, grid.frames)
        assert following is not None
        frames = (torch.arange(grid.count) // places)[shard["video"]]
        modulation = Modulation(sines(time) + sines(following)[:, None], frames)
        pads = self.segments(evaluation.condition, evaluation.grids)["pad"][0].count
        table = torch.cat((_angles(torch.zeros(pads, 3))[shard["pad"]], _angles(_coordinates(grid))[shard["video"]]))
        prelude = self.prelude(evaluation.condition)
        return MadeUpState(streams, modulation, Rotary(table), prelude=prelude, places=places)

    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        model, times = self.transformer, state.modulation
        video, sound = (state[name][:, predicted[name]] for name in ("video", "sound"))
        own = replace(times, frames=times.frames[predicted["video"]]).of(0)
        scale = model.blocks[0].head_scale(own.to(self.dtype))
        normed = F.layer_norm(video, (VIDEO,)).to(self.dtype) * (1 + scale)
        return {"video": model.video_out(normed), "sound": model.sound_out(sound.to(self.dtype))}

    def _as_block(self, number: int) -> Block:
        layer, companion = self.transformer.blocks[number], self.transformer.transient_projections[number]

        def block(state: State) -> State:
            assert isinstance(state, MadeUpState)
            return self._computed(number, layer, companion, state)

        return block

    def _computed(self, number: int, layer: Any, companion: nn.Module, state: MadeUpState) -> State:
        attention, dtype = self.sites.attention, self.dtype
        pad, video, heard = state["pad"], state["video"], state["sound"]
        pads = pad.shape[1]
        image = torch.cat((pad, video), dim=1)
        shift, scale, gate = layer.modulation(state.modulation.of(pads).to(dtype)).chunk(3, dim=2)
        normed = F.layer_norm(image, (VIDEO,)).to(dtype) * (1 + scale) + shift
        heard = heard + layer.sound_modulation(state.modulation.times.mean(1).to(dtype))[:, None]
        q, k, v = self._projected(layer.video, normed)
        q, k = self._turned(q, state.rotary, "heads"), self._turned(k, state.rotary, "kv_heads")
        _, sound_k, sound_v = self._projected(layer.sound, heard.to(dtype))
        serves = self._serves()
        joint = KeySet(attention.send(k, JOINT, serves), attention.send(v, JOINT, serves))
        if layer.by_frame:
            frames = lambda x: x[:, pads:].unflatten(1, (-1, state.places)).flatten(0, 1)  # noqa: E731
            repeated = [q, *(x[:, :, serves] for x in (k, v))]
            within = attention.local(*map(frames, repeated)).unflatten(0, (len(q), -1)).flatten(1, 2)
            of_video = [attention.send(x[:, pads:], ("video",), serves) for x in (k, v)]
            keys = KeySet(*of_video, places=state.places)
            over = attention((number, "over frames"), attention.send(q[:, pads:], ("video",)), keys)
            attended = torch.cat((torch.zeros_like(q[:, :pads]), within + over), dim=1)
        else:
            sound = KeySet(attention.send(sound_k, HEARD, serves), attention.send(sound_v, HEARD, serves), SOUND_WEIGHT)
            extra = self._extra_kv(number, layer, companion, state.prelude, len(q))
            query = attention.send(q, JOINT)
            attended = attention((number, "joint"), query, joint, sound, extra_kv=extra)
        image = image + gate * layer.video.to_out(attended.flatten(2))
        image = image + layer.ff_out(F.gelu(layer.ff_in(F.layer_norm(image, (VIDEO,)).to(dtype))))
        heard = heard + layer.linear_out(self._linear(number, layer, attention, heard.to(dtype)))
        normed = group_norm(attention, (number, "norm"), "sound", heard.to(dtype), layer.group_norm)
        runs = attention.halo((number, "mix"), "sound", normed, 1)
        mixed = [_mixed(layer.mix, run) for run in runs]
        heard = heard + torch.cat(mixed, dim=1)
        q, k, v = self._projected(layer.sound, heard.to(dtype))
        own = KeySet(attention.send(k, HEARD, serves), attention.send(v, HEARD, serves))
        seen = attention((number, "sound"), attention.send(q, HEARD), own, joint)
        heard = heard + layer.sound.to_out(seen.flatten(2))
        pad, video = image.split((pads, video.shape[1]), dim=1)
        return state.with_streams(pad=pad, video=video, sound=heard)

    def _projected(self, layer: Attend, x: Tensor) -> list[Tensor]:
        """Queries, keys and values `[B, S, H, 8]`, of this rank's heads."""
        parts = layer.norm_q(layer.to_q(x)), layer.norm_k(layer.to_k(x)), layer.to_v(x)
        return [part.unflatten(2, (-1, HEAD_DIM)) for part in parts]

    def _turned(self, x: Tensor, rotary: Rotary | None, group: str) -> Tensor:
        assert rotary is not None
        return rotary.heads(self.own_heads(group)).rotate(x)

    def _serves(self) -> list[int]:
        """For each of this rank's query heads, which of its own key heads serves it."""
        return list(self.heads.serves("kv_heads"))

    def _extra_kv(
        self, number: int, layer: Any, companion: nn.Module, prelude: dict[Any, Any], batch: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, which stay for the run, and of the tokens that only this block has."""
        if number not in prelude:
            raw = layer.static(prelude["text"]), companion(prelude["each"][:, number])
            width = max(len(each) for each in raw)
            own = torch.cat([each.expand(width, -1, -1) for each in raw], dim=1).unflatten(2, (2, -1, HEAD_DIM))
            prelude[number] = own[:, :, :, self._serves()].unbind(2)
        keys, values = (each.expand(batch, -1, -1, -1) for each in prelude[number])
        return keys, values

    def _linear(self, number: int, layer: Any, attention: Attention, x: Tensor) -> Tensor:
        q, k, v = (layer.linear[name](x).unflatten(2, (-1, HEAD_DIM)) for name in ("q", "k", "v"))
        q, k, v = F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0)
        products = lambda own: torch.einsum("bshd,bshe->bhde", k[:, own].float(), v[:, own].float())  # noqa: E731
        sums = attention.total((number, "linear"), "sound", products)
        found = torch.einsum("bshd,bhde->bshe", q.float(), sums)
        return (found[..., :-1] / (found[..., -1:] + 1e-6)).flatten(2).to(x.dtype)


def _mixed(layer: nn.Conv1d, run: Tensor) -> Tensor:
    """The convolution of `[B, S + 2, C]`, in which the neighbours of both ends stand: `[B, S, C]`."""
    if run.shape[1] == 2:
        return run[:, :0]
    return F.conv1d(run.transpose(1, 2), layer.weight, layer.bias, groups=layer.groups).transpose(1, 2)


def _coordinates(grid: Grid) -> Tensor:
    """Half seconds, rows and columns, `[S, 3]`."""
    axes = torch.arange(grid.frames) / 2, torch.arange(float(grid.rows)), torch.arange(float(grid.columns))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def _angles(coordinates: Tensor) -> Tensor:
    """The table `[S, 4, 4, 2]` of the query heads, whose first ones are the key heads'."""
    heads: Sequence[Tensor] = [
        coordinates[:, head % 3, None] * (1 + head) / torch.arange(1, 5) for head in range(HEADS)
    ]
    angles = torch.stack(heads, dim=1)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)
