"""The smallest networks of random weights that ComfyUI builds, too."""

from __future__ import annotations

import torch
from diffusers import HunyuanDiT2DModel, MochiTransformer3DModel, PixArtTransformer2DModel


def pixart(takes_size: bool) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=6,
        num_layers=2,
        cross_attention_dim=96,
        caption_channels=20,
        sample_size=64,
        use_additional_conditions=takes_size,
    )


def hunyuandit(takes_size: bool) -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        hidden_size=64,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=40,
        pooled_projection_dim=1024,  # ComfyUI knows no other
        text_len=5,
        text_len_t5=7,
        use_style_cond_and_image_meta_size=takes_size,
    )


def mochi() -> MochiTransformer3DModel:
    """Of a width of which ComfyUI makes as many features as diffusers."""
    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=48,
        num_layers=2,
        pooled_projection_dim=96,
        text_embed_dim=16,
    )
    torch.nn.init.normal_(model.pos_frequencies, 0.0, 0.05)
    return model
