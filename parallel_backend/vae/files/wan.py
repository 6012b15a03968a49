"""The config of a Wan VAE file (2.1, 2.2), from its header."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isqrt

from .autoencoder_kl import Shape, count, renamed

# The original layout on the left: its blocks are numbered through, resamplings among them.
_RENAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    # Wan 2.2: blocks within blocks.
    (r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)\.", r".\1_blocks.\2.\1sampler.\3."),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    # Wan 2.1: all in one row, as its encoder is in diffusers, too.
    (r"\.downsamples\.", ".down_blocks."),
)
_FLAT = re.compile(r"^decoder\.upsamples\.(\d+)\.(?!upsamples)(.*)")


def names(keys: Iterable[str]) -> dict[str, str]:
    """{diffusers' name: key in a file of the original layout}"""
    keys = list(keys)
    resamplings = sorted({int(match[1]) for key in keys if (match := _FLAT.match(key)) and "resample." in match[2]})

    def grouped(key: str) -> str:
        match = _FLAT.match(key)
        if match is None:
            return key
        number = int(match[1])
        before = [each for each in resamplings if each < number]
        first = before[-1] + 1 if before else 0
        part = "upsamplers.0" if number in resamplings else f"resnets.{number - first}"
        return f"decoder.up_blocks.{len(before)}.{part}.{match[2]}"

    return {renamed(grouped(key), _RENAMES): key for key in keys}


def config(shapes: Mapping[str, Shape]) -> dict[str, object]:
    """Derives the config from the shapes of the tensors under diffusers' names."""
    levels = count(shapes, r"decoder\.up_blocks\.(\d+)\.")
    widths = [shapes[f"decoder.up_blocks.{level}.resnets.0.conv1.weight"][0] for level in reversed(range(levels))]
    resamplings = sorted(
        {
            (int(match[1]), match[0])
            for name in shapes
            if (match := re.match(r"encoder\.down_blocks\.(\d+)\.(?:downsampler\.)?(?=resample\.)", name))
        }
    )
    temporal = [f"{place}time_conv.weight" in shapes for _, place in resamplings]
    is_residual = "downsampler" in resamplings[0][1] if resamplings else False
    channels = shapes["encoder.conv_in.weight"][1]
    patch = isqrt(channels // 3)
    return {
        "base_dim": shapes["encoder.conv_in.weight"][0],
        "decoder_base_dim": widths[0],
        "z_dim": shapes["decoder.conv_in.weight"][1],
        "dim_mult": [width // widths[0] for width in widths],
        "num_res_blocks": count(shapes, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        "temperal_downsample": temporal,
        "is_residual": is_residual,
        "in_channels": channels,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "patch_size": patch if patch > 1 else None,
        "scale_factor_spatial": patch * 2 ** (levels - 1),
        "scale_factor_temporal": 2 ** sum(temporal),
    }
