"""The config of a HunyuanVideo or CogVideoX VAE file, from its header: image autoencoders with a third dimension.

All of them compress by 8 in space and by 4 in time, which no shape shows. Files name their tensors as diffusers does,
or as the original image autoencoders do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .autoencoder_kl import NORM_GROUPS, Shape, count, ldm_names


def _config(shapes: Mapping[str, Shape]) -> dict[str, object]:
    """Derives the config from the shapes of the tensors under diffusers' names."""
    levels = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "block_out_channels": [
            shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight"][0] for level in range(levels)
        ],
        "layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.conv.weight"][1],
        "norm_num_groups": NORM_GROUPS,
    }


def hunyuan(shapes: Mapping[str, Shape]) -> dict[str, object]:
    return _config(shapes) | {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}


def cogvideox_names(keys: Iterable[str]) -> dict[str, str]:
    """{diffusers' name: key in a file of the original (SAT) layout}"""
    return {name.replace("coder.conv_norm_out.", "coder.norm_out."): key for name, key in ldm_names(keys).items()}


def cogvideox(shapes: Mapping[str, Shape]) -> dict[str, object]:
    levels = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    return _config(shapes) | {
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "temporal_compression_ratio": 4,
    }
