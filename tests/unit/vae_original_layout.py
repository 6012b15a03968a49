"""Random VAE weights in the layout of the original (LDM) files, written down independently of what loads them."""

from __future__ import annotations

import torch
from torch import Tensor


def original_state(widths, layers: int, latent: int, quant: bool, attention: bool) -> dict[str, Tensor]:
    """Random tensors under the names and shapes of the original (LDM) layout."""
    generator = torch.Generator().manual_seed(7)
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        scale = max(1, torch.Size(shape[1:]).numel()) ** -0.5
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def resnet(name: str, into: int, out: int) -> None:
        put(f"{name}.norm1", into)
        put(f"{name}.conv1", out, into, 3, 3)
        put(f"{name}.norm2", out)
        put(f"{name}.conv2", out, out, 3, 3)
        if into != out:
            put(f"{name}.nin_shortcut", out, into, 1, 1)

    def middle(name: str, width: int) -> None:
        resnet(f"{name}.mid.block_1", width, width)
        if attention:
            put(f"{name}.mid.attn_1.norm", width)
            for part in ("q", "k", "v", "proj_out"):
                put(f"{name}.mid.attn_1.{part}", width, width, 1, 1)
        resnet(f"{name}.mid.block_2", width, width)

    top = len(widths) - 1
    put("encoder.conv_in", widths[0], 3, 3, 3)
    before = widths[0]
    for level, width in enumerate(widths):
        for block in range(layers):
            resnet(f"encoder.down.{level}.block.{block}", before, width)
            before = width
        if level < top:
            put(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    middle("encoder", before)
    put("encoder.norm_out", before)
    put("encoder.conv_out", 2 * latent, before, 3, 3)
    put("decoder.conv_in", before, latent, 3, 3)
    middle("decoder", before)
    for level, width in reversed(list(enumerate(widths))):
        for block in range(layers + 1):
            resnet(f"decoder.up.{level}.block.{block}", before, width)
            before = width
        if level:
            put(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    put("decoder.norm_out", before)
    put("decoder.conv_out", 3, before, 3, 3)
    if quant:
        put("quant_conv", 2 * latent, 2 * latent, 1, 1)
        put("post_quant_conv", latent, latent, 1, 1)
    return state
