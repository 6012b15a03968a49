"""Stable Diffusion 3 and 3.5: what their files look like, and the original names of their weights in diffusers'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...layout.stages import BlockList
from ..spec import Config, Cut, FamilySpec, Input, LatentSpec, Rule, Shapes, count_blocks
from .layers import (
    FINAL_LAYER,
    attention_cuts,
    embedder,
    feed_forward,
    feed_forward_cuts,
    projections,
    text_projections,
)
from .shapes import count_channels, count_heads, landmark_shapes

HEAD_DIM = 64
"""The head width of every published model, unless a config.json or the norms of the heads give another."""

RULES = (
    Rule("pos_embed", ("pos_embed.pos_embed",), suffixes={"": ""}),
    Rule("x_embedder.proj", ("pos_embed.proj",)),
    Rule("context_embedder", ("context_embedder",)),
    *embedder("t_embedder.mlp", "time_text_embed.timestep_embedder"),
    *embedder("y_embedder.mlp", "time_text_embed.text_embedder"),
    Rule("joint_blocks.{i}.x_block.adaLN_modulation.1", ("transformer_blocks.{i}.norm1.linear",)),
    Rule("joint_blocks.{i}.context_block.adaLN_modulation.1", ("transformer_blocks.{i}.norm1_context.linear",)),
    # Of the last block's text only shift and scale are left, which diffusers keeps as scale and shift.
    Rule(
        "joint_blocks.{last}.context_block.adaLN_modulation.1",
        ("transformer_blocks.{last}.norm1_context.linear",),
        swap_halves=True,
    ),
    Rule("joint_blocks.{i}.x_block.attn.qkv", projections("transformer_blocks.{i}.attn")),
    Rule("joint_blocks.{i}.x_block.attn2.qkv", projections("transformer_blocks.{i}.attn2")),
    Rule("joint_blocks.{i}.context_block.attn.qkv", text_projections("transformer_blocks.{i}.attn")),
    Rule("joint_blocks.{i}.x_block.attn.ln_q", ("transformer_blocks.{i}.attn.norm_q",)),
    Rule("joint_blocks.{i}.x_block.attn.ln_k", ("transformer_blocks.{i}.attn.norm_k",)),
    Rule("joint_blocks.{i}.context_block.attn.ln_q", ("transformer_blocks.{i}.attn.norm_added_q",)),
    Rule("joint_blocks.{i}.context_block.attn.ln_k", ("transformer_blocks.{i}.attn.norm_added_k",)),
    Rule("joint_blocks.{i}.x_block.attn2.ln_q", ("transformer_blocks.{i}.attn2.norm_q",)),
    Rule("joint_blocks.{i}.x_block.attn2.ln_k", ("transformer_blocks.{i}.attn2.norm_k",)),
    Rule("joint_blocks.{i}.x_block.attn.proj", ("transformer_blocks.{i}.attn.to_out.0",)),
    Rule("joint_blocks.{i}.context_block.attn.proj", ("transformer_blocks.{i}.attn.to_add_out",)),
    Rule("joint_blocks.{i}.x_block.attn2.proj", ("transformer_blocks.{i}.attn2.to_out.0",)),
    *feed_forward("joint_blocks.{i}.x_block.mlp", "transformer_blocks.{i}.ff", ("fc1", "fc2")),
    *feed_forward("joint_blocks.{i}.context_block.mlp", "transformer_blocks.{i}.ff_context", ("fc1", "fc2")),
    *FINAL_LAYER,
)

CUTS = (
    *attention_cuts("attn2?"),
    *feed_forward_cuts("(ff|ff_context)"),
    Cut(r"(norm1|norm1_context)\.linear", "gathered"),
)

LANDMARKS = {
    "original": {
        "image": "x_embedder.proj.weight",
        "positions": "pos_embed",
        "text": "context_embedder.weight",
        "pooled": "y_embedder.mlp.0.weight",
        "joint": "joint_blocks.0.context_block.attn.qkv.weight",
        "output": "final_layer.linear.weight",
    },
    "diffusers": {
        "image": "pos_embed.proj.weight",
        "positions": "pos_embed.pos_embed",
        "text": "context_embedder.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
        "joint": "transformer_blocks.0.attn.add_q_proj.weight",
        "output": "proj_out.weight",
    },
}
DIMS = {"image": 4, "positions": 3}
BLOCKS = {
    "original": ("joint_blocks", "x_block.attn.ln_q.weight", "x_block.attn2.qkv.weight"),
    "diffusers": ("transformer_blocks", "attn.norm_q.weight", "attn2.to_q.weight"),
}


def derive_config(layout: str, shapes: Shapes, declared: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of SD3Transformer2DModel from the shapes; `declared` (config.json) gives what shapes cannot.

    That is sample_size, and attention_head_dim of a model without norms in its heads.
    """
    shape = landmark_shapes("Stable Diffusion 3", shapes, LANDMARKS[layout], DIMS)
    blocks, head_norm, second_site = BLOCKS[layout]
    hidden, channels, patch, _ = shape["image"]
    count, side = count_blocks(shapes, blocks), math.isqrt(shape["positions"][1])
    normed = shapes.get(f"{blocks}.0.{head_norm}")
    head_dim = normed[0] if normed else declared.get("attention_head_dim", HEAD_DIM)
    if side**2 != shape["positions"][1]:
        raise UserError(f"{shape['positions'][1]} positions are no square.")
    return {
        "sample_size": declared.get("sample_size", 128),
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": count_channels(shape["output"][0], patch),
        "num_layers": count,
        "attention_head_dim": head_dim,
        "num_attention_heads": count_heads(hidden, head_dim),
        "joint_attention_dim": shape["text"][1],
        "caption_projection_dim": shape["text"][0],
        "pooled_projection_dim": shape["pooled"][1],
        "pos_embed_max_size": side,
        "dual_attention_layers": tuple(
            number for number in range(count) if f"{blocks}.{number}.{second_site}" in shapes
        ),
        "qk_norm": "rms_norm" if normed else None,
    }


def host_config(config: Config) -> dict[str, Any]:
    """Returns the config that ComfyUI's detection gives, without `input_size` and `pos_embed_scaling_factor`."""
    text = {"in_features": config["joint_attention_dim"], "out_features": config["caption_projection_dim"]}
    side = config["pos_embed_max_size"]
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "patch_size": config["patch_size"],
        "depth": config["num_attention_heads"] * config["attention_head_dim"] // HEAD_DIM,
        "num_blocks": config["num_layers"],
        "input_size": None,
        "adm_in_channels": config["pooled_projection_dim"],
        "context_embedder_config": {"target": "torch.nn.Linear", "params": text},
        "num_patches": side**2,
        "pos_embed_max_size": side,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms" if config["qk_norm"] else None,
        "x_block_self_attn_layers": list(config["dual_attention_layers"]),
    }


MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
    "qk_norm": None,
}

SD3 = FamilySpec(
    name="sd3",
    title="Stable Diffusion 3",
    view="sd3:SD3",
    class_name="SD3Transformer2DModel",
    blocks=(BlockList(("transformer_blocks",)),),
    latents=(LatentSpec(channels=16, scale=1.5305, shift=0.0609),),
    inputs=(
        Input("tokens", 3, "text tokens", network="context"),
        Input("pooled", 2, "a pooled vector", entry="pooled_output", network="y"),
    ),
    encoders="CLIP-L, CLIP-G and T5-XXL",
    landmarks=LANDMARKS,
    rules=RULES,
    derive_config=derive_config,
    cuts=CUTS,
    host_config=host_config,
    host_reads=("x_embedder", "y_embedder"),  # Stability's for 3.5
    residuals=lambda config: {"output": range(config["num_layers"])},
    published={
        "sd3-medium": MEDIUM,
        "sd3.5-medium": {
            **MEDIUM,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "sd3.5-large": {
            **MEDIUM,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "qk_norm": "rms_norm",
        },
    },
)
