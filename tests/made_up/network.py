"""The network of the made-up family, as plain PyTorch: what its view is compared with.

Two latents: a video whose frames have times of their own, and a sound. A block attends, in one softmax, to learned pads
and the video, to the sound with another weight, to keys of the text that stay for the whole run, and to tokens that
only this block has. Every second block attends within each frame, and over the frames of each place. The sound attends
linearly to itself, is normed in groups and mixed with its neighbours, and attends to itself and the video. There are
fewer key heads than query heads, norms across heads, and a rotary table for each head. The head of the network reads a
layer that lies in block 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VIDEO, SOUND, TEXT = 32, 16, 12
"""Widths of the streams and of the text."""
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
INNER, KV_INNER = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
PAD_MULTIPLE = 4
"""The tokens of the video are made a multiple of as many, by learned pads before them."""
SOUND_WEIGHT = -0.5
"""What is added to the scores of the sound's keys."""
VIDEO_TOKEN, SOUND_TOKEN = 12, 6
"""Numbers in a token of each latent: 3 channels of 2 x 2 cells, 2 channels of 3 columns."""


def sines(time: Tensor) -> Tensor:
    """`[...]` -> `[..., 16]`."""
    angles = time[..., None].float() * torch.arange(1, 9, device=time.device)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Attend(nn.Module):
    """Projections and norms of one stream, of any width: queries of 4 heads, keys and values of 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, INNER)
        self.to_k = nn.Linear(width, KV_INNER)
        self.to_v = nn.Linear(width, KV_INNER)
        self.norm_q = nn.RMSNorm(INNER, eps=1e-6)
        self.norm_k = nn.RMSNorm(KV_INNER, eps=1e-6)
        self.to_out = nn.Linear(INNER, width)


class Block(nn.Module):
    """Number `number` of the blocks. Its transient tokens are projected by its companion."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.by_frame = number % 2 == 1
        self.video, self.sound = Attend(VIDEO), Attend(SOUND)
        self.static = nn.Linear(TEXT, 2 * KV_INNER)
        self.linear = nn.ModuleDict({name: nn.Linear(SOUND, INNER) for name in ("q", "k", "v")})
        self.linear_out = nn.Linear(INNER, SOUND)
        self.group_norm, self.mix = nn.GroupNorm(4, SOUND), nn.Conv1d(SOUND, SOUND, 3, padding=1, groups=SOUND)
        self.modulation = nn.Linear(16, 3 * VIDEO)
        self.sound_modulation = nn.Linear(16, SOUND)
        self.ff_in, self.ff_out = nn.Linear(VIDEO, 48), nn.Linear(48, VIDEO)
        self.head_scale = nn.Linear(16, VIDEO) if number == 0 else None


class Companion(nn.Module):
    """What belongs to a block, and lies in a list of its own: keys and values of the block's own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(TEXT, 2 * KV_INNER)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(tokens)


class MadeUpNetwork(nn.Module):
    """`blocks` with `transient_projections` as companions."""

    def __init__(
        self, num_layers: int = 4, heads: int = HEADS, kv_heads: int = KV_HEADS, head_dim: int = HEAD_DIM
    ) -> None:
        super().__init__()
        assert (heads, kv_heads, head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
        self.config = {"num_layers": num_layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        self.video_in, self.sound_in = nn.Linear(VIDEO_TOKEN, VIDEO), nn.Linear(SOUND_TOKEN, SOUND)
        self.pad = nn.Parameter(torch.randn(VIDEO))
        self.blocks = nn.ModuleList(Block(number) for number in range(num_layers))
        self.transient_projections = nn.ModuleList(Companion() for _ in range(num_layers))
        self.video_out, self.sound_out = nn.Linear(VIDEO, VIDEO_TOKEN), nn.Linear(SOUND, SOUND_TOKEN)

    def forward(self, video: Tensor, sound: Tensor, time: Tensor, next_time: Tensor, text: Tensor, each: Tensor):
        """`video` `[B, 3, T, H, W]`, `sound` `[B, 2, Ta, 3]`, `time` `[B, T]`, `next_time` `[B]`, `text` `[B, S, 12]`,
        `each` `[B, blocks, n, 12]`: the tokens of each block -> the predictions of both latents."""
        frames, height, width = video.shape[2:]
        rows, columns = height // 2, width // 2
        places = rows * columns
        tokens = video.unflatten(3, (rows, 2)).unflatten(5, (columns, 2)).permute(0, 2, 3, 5, 1, 4, 6)
        image = self.video_in(tokens.reshape(len(video), frames * places, VIDEO_TOKEN))
        heard = self.sound_in(sound.permute(0, 2, 1, 3).flatten(2))
        pads = -image.shape[1] % PAD_MULTIPLE
        image = torch.cat((self.pad.expand(len(image), pads, -1), image), dim=1)
        seconds = torch.arange(frames).repeat_interleave(places).float() / 2
        down, across = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
        positions = torch.stack((seconds, down.repeat(frames), across.repeat(frames)), dim=1)
        positions = torch.cat((torch.zeros(pads, 3), positions))
        times = sines(time) + sines(next_time)[:, None]
        own = torch.cat((times.mean(1, keepdim=True).expand(-1, pads, -1), times.repeat_interleave(places, dim=1)), 1)
        for number, block in enumerate(self.blocks):
            static, added = block.static(text), self.transient_projections[number](each[:, number])
            shift, scale, gate = block.modulation(own).chunk(3, dim=2)
            normed = F.layer_norm(image, (VIDEO,)) * (1 + scale) + shift
            heard = heard + block.sound_modulation(times.mean(1))[:, None]
            q, k, v = projected(block.video, normed)
            q, k = turned(q, positions), turned(k, positions)
            _, sound_k, sound_v = projected(block.sound, heard)
            others = [split_kv(static), split_kv(added)]
            if block.by_frame:
                cut = lambda x: x[:, pads:].unflatten(1, (frames, places))  # noqa: E731
                within = attend(*(cut(x).flatten(0, 1) for x in (q, k, v))).unflatten(0, (-1, frames))
                over = attend(*(cut(x).transpose(1, 2).flatten(0, 1) for x in (q, k, v)))
                over = over.unflatten(0, (-1, places)).transpose(1, 2)
                attended = torch.cat((torch.zeros_like(q[:, :pads]), (within + over).flatten(1, 2)), dim=1)
            else:
                keys = torch.cat((k, sound_k, *(each[0] for each in others)), dim=1)
                values = torch.cat((v, sound_v, *(each[1] for each in others)), dim=1)
                bias = torch.zeros(keys.shape[1])
                bias[k.shape[1] : k.shape[1] + sound_k.shape[1]] = SOUND_WEIGHT
                attended = attend(q, keys, values, bias)
            image = image + gate * block.video.to_out(attended.flatten(2))
            image = image + block.ff_out(F.gelu(block.ff_in(F.layer_norm(image, (VIDEO,)))))
            heard = heard + block.linear_out(linear_attention(block, heard))
            heard = heard + block.mix(block.group_norm(heard.transpose(1, 2))).transpose(1, 2)
            sound_q, sound_k, sound_v = projected(block.sound, heard)
            seen = attend(sound_q, torch.cat((sound_k, k), dim=1), torch.cat((sound_v, v), dim=1))
            heard = heard + block.sound.to_out(seen.flatten(2))
        scale = self.blocks[0].head_scale(own[:, pads:])
        predicted = self.video_out(F.layer_norm(image[:, pads:], (VIDEO,)) * (1 + scale))
        predicted = predicted.view(len(video), frames, rows, columns, 3, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        sounds = self.sound_out(heard).unflatten(2, (2, 3)).permute(0, 2, 1, 3)
        return predicted.reshape(video.shape), sounds


def projected(layer: Attend, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, S, 4, 8]`, keys and values `[B, S, 2, 8]`."""
    q, k, v = layer.norm_q(layer.to_q(x)), layer.norm_k(layer.to_k(x)), layer.to_v(x)
    return q.unflatten(2, (-1, HEAD_DIM)), k.unflatten(2, (-1, HEAD_DIM)), v.unflatten(2, (-1, HEAD_DIM))


def split_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, S, 2 * 16]` -> keys and values `[B, S, 2, 8]`."""
    key, value = x.unflatten(2, (2, -1, HEAD_DIM)).unbind(2)
    return key, value


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Pairs of neighbouring channels turned by angles of the head's own: each listens to one axis, by its number."""
    heads = x.shape[2]
    angles = torch.stack([positions[:, head % 3, None] * (1 + head) / torch.arange(1, 5) for head in range(heads)], 1)
    real, imaginary = x.unflatten(3, (-1, 2)).unbind(-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1).flatten(3)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[B, S, H, D]`; two query heads share a key head."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    mask = None if bias is None else bias.expand(q.shape[1], -1)
    attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return attended.transpose(1, 2)


def linear_attention(block: Block, x: Tensor) -> Tensor:
    """`[B, S, 16]` -> `[B, S, 32]` (arXiv 2006.16236, eq. 7)."""
    q, k, v = (block.linear[name](x).unflatten(2, (-1, HEAD_DIM)) for name in ("q", "k", "v"))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    sums = torch.einsum("bshd,bshe->bhde", k, F.pad(v, (0, 1), value=1.0))
    found = torch.einsum("bshd,bhde->bshe", q, sums)
    return (found[..., :-1] / (found[..., -1:] + 1e-6)).flatten(2)
