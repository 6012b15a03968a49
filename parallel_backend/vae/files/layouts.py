"""The layouts of files with a VAE of videos: how each is recognised, and its config, derived from the header."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from . import hunyuan, ltx, mochi, wan
from .autoencoder_kl import PREFIXES, Shape, ldm_names


class FileLayout(NamedTuple):
    """Files with all tensors of `signs`. `names`: {diffusers' name: key}; `config` from shapes under those names.

    Where several names have one key, its tensor holds theirs, one after the other.
    """

    name: str
    signs: tuple[str, ...]
    names: Callable[[Iterable[str]], dict[str, str]]
    config: Callable[[Mapping[str, Shape]], dict[str, object]]


def _unchanged(keys: Iterable[str]) -> dict[str, str]:
    return {key: key for key in keys}


LAYOUTS = (
    FileLayout("AutoencoderKLWan", ("decoder.middle.0.residual.0.gamma",), wan.names, wan.config),
    FileLayout("AutoencoderKLWan", ("decoder.mid_block.resnets.0.norm1.gamma",), _unchanged, wan.config),
    FileLayout(
        "AutoencoderKLLTXVideo",
        ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",),
        ltx.names,
        ltx.config,
    ),
    FileLayout(
        "AutoencoderKLLTXVideo",
        ("decoder.mid_block.resnets.0.conv1.conv.weight", "latents_mean"),
        _unchanged,
        ltx.config,
    ),
    FileLayout(
        "AutoencoderKLCogVideoX",
        ("decoder.mid_block.resnets.0.norm1.norm_layer.weight",),
        _unchanged,
        hunyuan.cogvideox,
    ),
    FileLayout(
        "AutoencoderKLCogVideoX",
        ("decoder.mid.block_1.norm1.norm_layer.weight",),
        hunyuan.cogvideox_names,
        hunyuan.cogvideox,
    ),
    *(
        FileLayout("AutoencoderKLMochi", (sign,), mochi.names, mochi.config)
        # Whole or the decoder alone, the encoder alone, and each alone without the name of its side.
        for sign in (
            "decoder.blocks.0.1.stack.0.weight",
            "encoder.layers.1.stack.0.weight",
            "blocks.0.1.stack.0.weight",
            "layers.1.stack.0.weight",
        )
    ),
    FileLayout(
        "AutoencoderKLMochi",
        ("decoder.block_in.resnets.0.norm1.norm_layer.weight",),
        _unchanged,
        mochi.config,
    ),
    FileLayout(
        "AutoencoderKLHunyuanVideo",
        ("decoder.mid.block_1.conv1.conv.weight", "decoder.mid.attn_1.q.weight"),
        ldm_names,
        hunyuan.hunyuan,
    ),
    FileLayout(
        "AutoencoderKLHunyuanVideo",
        ("decoder.mid_block.resnets.0.conv1.conv.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        _unchanged,
        hunyuan.hunyuan,
    ),
)


def find(tensors: Iterable[str]) -> tuple[FileLayout, str] | None:
    """The layout of a file with these tensors, and the prefix of the VAE's; None for any other file."""
    tensors = set(tensors)
    for prefix in PREFIXES:
        for layout in LAYOUTS:
            if all(prefix + sign in tensors for sign in layout.signs):
                return layout, prefix
    return None
