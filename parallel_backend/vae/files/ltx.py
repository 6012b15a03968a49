"""The config of an LTX-Video VAE file (0.9, 0.9.1, 0.9.5 and later), from its header.

The original layout numbers all blocks of a side through: stacks of residual blocks, and what changes the size or the
number of channels between them. diffusers puts the latter into the level of a stack, and calls one stack `mid_block`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isqrt

from .autoencoder_kl import Shape, count, renamed

_RENAMES = (
    (r"\.res_blocks\.", ".resnets."),
    (r"\.conv_shortcut\.(?!conv\.)", ".conv_shortcut.conv."),
    (r"\.norm3\.norm\.", ".norm3."),
    (r"\.last_time_embedder\.", ".time_embedder."),
    (r"\.last_scale_shift_table$", ".scale_shift_table"),
    (r"^per_channel_statistics\.mean-of-means$", "latents_mean"),
    (r"^per_channel_statistics\.std-of-means$", "latents_std"),
)
_UNUSED = re.compile(r"^per_channel_statistics\.(channel|mean-of-stds)")
_BLOCK = re.compile(r"^(encoder\.down_blocks|decoder\.up_blocks)\.(\d+)\.")


def names(keys: Iterable[str]) -> dict[str, str]:
    """{diffusers' name: key in a file of the original layout}"""
    keys = [key for key in keys if not _UNUSED.match(key)]
    places = _places(keys)
    moved = {key: _BLOCK.sub(lambda match: f"{places[match[1], int(match[2])]}.", key) for key in keys}
    return {renamed(name, _RENAMES): key for key, name in moved.items()}


def _places(keys: Iterable[str]) -> dict[tuple[str, int], str]:
    """Maps side and number of a block in the file to its place in diffusers."""
    parts: dict[tuple[str, int], set[str]] = {}
    for key in keys:
        if match := _BLOCK.match(key):
            parts.setdefault((match[1], int(match[2])), set()).add(key[match.end() :].split(".")[0])
    places = {}
    for side, at_the_end, single in (
        ("encoder.down_blocks", True, "conv_out"),
        ("decoder.up_blocks", False, "conv_in"),
    ):
        numbers = sorted(number for which, number in parts if which == side)
        stacks = [number for number in numbers if "res_blocks" in parts[side, number]]
        middle = stacks.pop(-1 if at_the_end else 0)
        places[side, middle] = f"{side.split('.')[0]}.mid_block"
        for number in numbers:
            if number == middle:
                continue
            # In the encoder what changes the size belongs to the stack before it, in the decoder to the one after.
            level = sum(stack <= number for stack in stacks) - 1 if at_the_end else sum(s < number for s in stacks)
            part = "" if number in stacks else f".{single}" if "conv1" in parts[side, number] else _sampler(side)
            places[side, number] = f"{side}.{level}{part}"
    return places


def _sampler(side: str) -> str:
    return ".downsamplers.0" if side.startswith("encoder") else ".upsamplers.0"


def config(shapes: Mapping[str, Shape]) -> dict[str, object]:
    """Derives the config from the shapes of the tensors under diffusers' names."""
    down = [f"encoder.down_blocks.{n}" for n in range(count(shapes, r"encoder\.down_blocks\.(\d+)\."))]
    up = [f"decoder.up_blocks.{n}" for n in reversed(range(count(shapes, r"decoder\.up_blocks\.(\d+)\.")))]
    stacks = [*down, "encoder.mid_block"], [*up, "decoder.mid_block"]
    widths, decoder_widths = ([shapes[f"{stack}.resnets.0.conv1.conv.weight"][0] for stack in side] for side in stacks)
    scaling, decoder_scaling = (
        [any(name.startswith(f"{block}.{part}.") for name in shapes) for block in side]
        for side, part in ((down, "downsamplers"), (up, "upsamplers"))
    )
    factors = [_factor(shapes, block) if scaled else 1 for block, scaled in zip(up, decoder_scaling, strict=True)]
    by_space_and_time = f"{down[0]}.downsamplers.0.conv.conv.weight" in shapes
    kinds = [_downsampling(shapes, block, wider) for block, wider in zip(down, widths[1:], strict=True)]
    patch = isqrt(shapes["encoder.conv_in.conv.weight"][1] // 3)
    layers, decoder_layers = ([count(shapes, rf"{stack}\.resnets\.(\d+)\.") for stack in side] for side in stacks)
    return {
        "latent_channels": shapes["decoder.conv_in.conv.weight"][1],
        "block_out_channels": widths if by_space_and_time else widths[:-1],
        "decoder_block_out_channels": [
            width * factor for width, factor in zip(decoder_widths[:-1], factors, strict=True)
        ],
        "down_block_types": ["LTXVideo095DownBlock3D" if by_space_and_time else "LTXVideoDownBlock3D"] * len(down),
        "downsample_type": kinds if by_space_and_time else ["conv"] * len(down),
        "layers_per_block": layers,
        "decoder_layers_per_block": decoder_layers,
        "spatio_temporal_scaling": scaling,
        "decoder_spatio_temporal_scaling": decoder_scaling,
        "decoder_inject_noise": [f"{stack}.resnets.0.per_channel_scale1" in shapes for stack in stacks[1]],
        "upsample_factor": factors,
        "upsample_residual": [factor > 1 for factor in factors],
        "timestep_conditioning": "decoder.scale_shift_table" in shapes,
        "patch_size": patch,
        "spatial_compression_ratio": patch * 2 ** sum(kind.startswith("spati") for kind in kinds),
        "temporal_compression_ratio": 2 ** sum(kind.endswith("temporal") for kind in kinds),
    }


def _factor(shapes: Mapping[str, Shape], block: str) -> int:
    """The factor by which an upsampling divides the channels; it makes eight pixels of one."""
    given, taken = shapes[f"{block}.upsamplers.0.conv.conv.weight"][:2]
    return 8 * taken // given


def _downsampling(shapes: Mapping[str, Shape], block: str, wider: int) -> str:
    """What a downsampling makes one of, "" where there is none. It gives `wider` channels, from so many pixels."""
    if f"{block}.downsamplers.0.conv.weight" in shapes:
        return "spatiotemporal"
    name = f"{block}.downsamplers.0.conv.conv.weight"
    return {2: "temporal", 4: "spatial", 8: "spatiotemporal"}[wider // shapes[name][0]] if name in shapes else ""
