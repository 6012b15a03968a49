"""The config of a Mochi VAE file, from its header.

The original layout comes whole, or as its decoder or its encoder alone, whose names then lack the side. Either side
numbers its blocks through: residual blocks, blocks that change the size, residual blocks again. The encoder's
attentions store query, key and value as one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .autoencoder_kl import Shape, count, renamed

# The names of the numbered blocks identify the side.
_SIDES = {"blocks": "decoder", "layers": "encoder"}
_BLOCK = re.compile(r"^(?:decoder\.blocks|encoder\.layers)\.(\d+)\.(.*)")
_RESAMPLING = re.compile(r"(?:blocks|layers|proj)\.")

_RENAMES = (
    (r"\.stack\.0\.", ".norm1.norm_layer."),
    (r"\.stack\.2\.", ".conv1.conv."),
    (r"\.stack\.3\.", ".norm2.norm_layer."),
    (r"\.stack\.5\.", ".conv2.conv."),
    (r"\.resnets\.(\d+)\.attn_block\.norm\.", r".norms.\1.norm_layer."),
    (r"\.resnets\.(\d+)\.attn_block\.attn\.out\.", r".attentions.\1.to_out.0."),
    (r"\.resnets\.(\d+)\.attn_block\.attn\.", r".attentions.\1."),
    (r"\.output_norm\.", ".norm_out.norm_layer."),
    (r"\.output_proj\.", ".proj_out."),
)
_FUSED = ".qkv."

FEATURES = 5
"""Per channel of a picture, of the encoder's input: the channel, its sine and its cosine at two frequencies."""


def names(keys: Iterable[str]) -> dict[str, str]:
    """{diffusers' name: key in a file of the original layout}; query, key and value name the same key."""
    keys = list(keys)
    alone = next((side for part, side in _SIDES.items() if any(key.startswith(f"{part}.") for key in keys)), None)
    sided = {f"{alone}.{key}" if alone else key: key for key in keys}
    resamplings = {side: _resamplings(sided, side) for side in _SIDES.values()}
    found = {}
    for name, key in sided.items():
        name = renamed(_placed(name, resamplings.get(name.split(".")[0], [])), _RENAMES)
        for part in ("q", "k", "v") if _FUSED in name else ("",):
            found[name.replace(_FUSED, f".to_{part}.")] = key
    return found


def _resamplings(names: Iterable[str], side: str) -> list[int]:
    """The numbers of the blocks that change the size."""
    blocks = (match for name in names if name.startswith(side) and (match := _BLOCK.match(name)))
    return sorted({int(match[1]) for match in blocks if _RESAMPLING.match(match[2])})


def _placed(name: str, resamplings: list[int]) -> str:
    """`name` with the place of its block in diffusers."""
    match = _BLOCK.match(name)
    if match is None or not resamplings:
        return name
    number, rest = int(match[1]), match[2]
    if name.startswith("decoder"):
        level = number - resamplings[0]
        if number in resamplings:
            return f"decoder.up_blocks.{level}.{rest.replace('blocks.', 'resnets.', 1)}"
        if level >= 0:
            return f"decoder.block_out.resnets.{rest}"
        return _after_convolution(rest, "decoder.block_in.", "decoder.conv_in.")
    if number in resamplings:
        block = f"encoder.down_blocks.{number - resamplings[0]}."
        return _after_convolution(rest.removeprefix("layers."), block, f"{block}conv_in.conv.")
    if number > resamplings[-1]:
        return f"encoder.block_out.resnets.{number - resamplings[-1] - 1}.{rest}"
    return _after_convolution(f"{number}.{rest}", "encoder.block_in.", "encoder.proj_in.")


def _after_convolution(rest: str, block: str, convolution: str) -> str:
    """The name of a part of a block whose part 0 is a convolution, the others residual blocks."""
    number, rest = rest.split(".", 1)
    return f"{block}resnets.{int(number) - 1}.{rest}" if int(number) else f"{convolution}{rest}"


def config(shapes: Mapping[str, Shape]) -> dict[str, object]:
    """Derives the config from the shapes of the tensors under diffusers' names. Values of an absent side equal the
    other side's."""
    stacks = {
        "encoder": ["encoder.block_in", *_levels(shapes, "encoder.down_blocks"), "encoder.block_out"],
        "decoder": ["decoder.block_out", *reversed(_levels(shapes, "decoder.up_blocks")), "decoder.block_in"],
    }
    held = [side for side in stacks if any(name.startswith(f"{side}.") for name in shapes)]
    widths = {side: [shapes[f"{stack}.resnets.0.conv1.conv.weight"][0] for stack in stacks[side][:-1]] for side in held}
    any_stacks, any_widths = stacks[held[0]], widths[held[0]]
    if "encoder" in held:
        latent_channels, channels = shapes["encoder.proj_out.weight"][0] // 2, shapes["encoder.proj_in.weight"][1]
        kernels = [shapes[f"{stack}.conv_in.conv.weight"][2:] for stack in any_stacks[1:-1]]
    else:
        latent_channels, channels = shapes["decoder.conv_in.weight"][1], FEATURES * shapes["decoder.proj_out.weight"][0]
        # An upsampling makes the pixels of `temporal` frames, twice as many rows and columns, of the channels of one.
        rows = [shapes[f"{stack}.proj.weight"][0] for stack in any_stacks[1:-1]]
        kernels = [(each // (4 * width), 2) for each, width in zip(rows, any_widths, strict=False)]
    return {
        "in_channels": channels,
        "out_channels": channels // FEATURES,
        "latent_channels": latent_channels,
        "encoder_block_out_channels": widths.get("encoder", any_widths),
        "decoder_block_out_channels": widths.get("decoder", any_widths),
        "layers_per_block": [count(shapes, rf"{stack}\.resnets\.(\d+)\.") for stack in any_stacks],
        "temporal_expansions": [kernel[0] for kernel in kernels],
        "spatial_expansions": [kernel[1] for kernel in kernels],
        "add_attention_block": [f"{stack}.norms.0.norm_layer.weight" in shapes for stack in any_stacks],
    }


def _levels(shapes: Mapping[str, Shape], blocks: str) -> list[str]:
    return [f"{blocks}.{level}" for level in range(count(shapes, rf"{blocks}\.(\d+)\."))]
