"""PixArt-alpha and -Sigma: what their files look like, and the original names of their weights in diffusers'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...layout.stages import BlockList
from ..spec import Config, FamilySpec, Input, LatentSpec, Rule, Shapes, count_blocks
from .layers import attention_cuts, embedder, feed_forward, feed_forward_cuts, projections
from .shapes import count_channels, landmark_shapes

HEADS = 16
"""The heads of every published model; no shape depends on their number."""
TABLE = {"scale_shift_table": "scale_shift_table"}

RULES = (
    Rule("x_embedder.proj", ("pos_embed.proj",)),
    *embedder("y_embedder.y_proj", "caption_projection", ("fc1", "fc2")),
    *embedder("t_embedder.mlp", "adaln_single.emb.timestep_embedder"),
    *embedder("csize_embedder.mlp", "adaln_single.emb.resolution_embedder"),
    *embedder("ar_embedder.mlp", "adaln_single.emb.aspect_ratio_embedder"),
    Rule("t_block.1", ("adaln_single.linear",)),
    Rule("blocks.{i}", ("transformer_blocks.{i}",), suffixes=TABLE),
    Rule("blocks.{i}.attn.qkv", projections("transformer_blocks.{i}.attn1")),
    Rule("blocks.{i}.attn.proj", ("transformer_blocks.{i}.attn1.to_out.0",)),
    Rule("blocks.{i}.cross_attn.q_linear", ("transformer_blocks.{i}.attn2.to_q",)),
    Rule("blocks.{i}.cross_attn.kv_linear", projections("transformer_blocks.{i}.attn2", "kv")),
    Rule("blocks.{i}.cross_attn.proj", ("transformer_blocks.{i}.attn2.to_out.0",)),
    *feed_forward("blocks.{i}.mlp", "transformer_blocks.{i}.ff", ("fc1", "fc2")),
    Rule("final_layer.linear", ("proj_out",)),
    Rule("final_layer", ("",), suffixes=TABLE),
)

CUTS = (*attention_cuts("attn[12]"), *feed_forward_cuts("ff"))

SIGMA_LANDMARKS = {
    "original": {
        "patch": "x_embedder.proj.weight",
        "caption": "y_embedder.y_proj.fc1.weight",
        "modulation": "t_block.1.weight",
        "cross": "blocks.0.cross_attn.kv_linear.weight",
        "output": "final_layer.linear.weight",
    },
    "diffusers": {
        "patch": "pos_embed.proj.weight",
        "caption": "caption_projection.linear_1.weight",
        "modulation": "adaln_single.linear.weight",
        "cross": "transformer_blocks.0.attn2.to_k.weight",
        "output": "proj_out.weight",
    },
}
RESOLUTION = {
    "original": "csize_embedder.mlp.0.weight",
    "diffusers": "adaln_single.emb.resolution_embedder.linear_1.weight",
}
ALPHA_LANDMARKS = {
    layout: {**landmarks, "resolution": RESOLUTION[layout]} for layout, landmarks in SIGMA_LANDMARKS.items()
}
BLOCKS = {"original": "blocks", "diffusers": "transformer_blocks"}
NOT_WEIGHTS = ("pos_embed", "pos_embed.pos_embed", "y_embedder.y_embedding", "caption_projection.y_embedding")
"""A table that is computed, and the text that was left out in training."""
SAMPLE_SIZE = 128


def derive_config(layout: str, shapes: Shapes, declared: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of PixArtTransformer2DModel from the shapes; `declared` (config.json) gives what shapes cannot.

    That is the number of heads (16 if not declared), and the side that positions are spread over (that of the table of
    positions where the file holds it, else 128 cells).
    """
    shape = landmark_shapes("PixArt", shapes, SIGMA_LANDMARKS[layout], {"patch": 4})
    hidden, channels, patch, _ = shape["patch"]
    heads = declared.get("num_attention_heads", HEADS)
    if type(heads) is not int or heads < 1 or not hidden or hidden % heads:
        raise UserError(f"The hidden size {hidden} is not a multiple of {heads!r} heads.")
    sample_size = declared.get("sample_size") or _table_side(shapes) * patch or SAMPLE_SIZE
    return {
        "num_attention_heads": heads,
        "attention_head_dim": hidden // heads,
        "in_channels": channels,
        "out_channels": count_channels(shape["output"][0], patch),
        "num_layers": count_blocks(shapes, BLOCKS[layout]),
        "cross_attention_dim": shape["cross"][1],
        "caption_channels": shape["caption"][1],
        "patch_size": patch,
        "sample_size": sample_size,
        "interpolation_scale": declared.get("interpolation_scale") or max(sample_size // 64, 1),
        "use_additional_conditions": RESOLUTION[layout] in shapes,
    }


def _table_side(shapes: Shapes) -> int:
    """Rows of the table of positions `[1, rows * rows, hidden]`; 0 without one."""
    table = shapes.get("pos_embed", ())
    return math.isqrt(table[1]) if len(table) == 3 else 0


def host_config(config: Config) -> dict[str, Any]:
    """Returns the config that ComfyUI's detection gives."""
    takes_size = config["use_additional_conditions"]
    return {
        "image_model": "pixart_alpha" if takes_size else "pixart_sigma",
        "micro_condition": takes_size,
        "in_channels": config["in_channels"],
        "patch_size": config["patch_size"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "caption_channels": config["caption_channels"],
        "input_size": config["sample_size"],
        "pe_interpolation": config["interpolation_scale"],
    }


PUBLISHED = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "patch_size": 2,
    "sample_size": 128,
    "interpolation_scale": 2,
}


def _family(
    name: str, title: str, view: str, landmarks: Mapping[str, Mapping[str, str]], scale: float, takes_size: bool
) -> FamilySpec:
    return FamilySpec(
        name=name,
        title=title,
        view=view,
        class_name="PixArtTransformer2DModel",
        blocks=(BlockList(("transformer_blocks",)),),
        latents=(LatentSpec(channels=4, scale=scale),),
        inputs=(
            Input("tokens", 3, "text tokens", network="context", mask="mask"),
            Input("mask", 2, "a mask of the text tokens", entry="attention_mask", required=False),
        ),
        encoders="T5-XXL",
        landmarks=landmarks,
        rules=RULES,
        derive_config=derive_config,
        cuts=CUTS,
        older_class_names=("Transformer2DModel",),
        not_weights=NOT_WEIGHTS,
        host_config=host_config,
        published={name: {**PUBLISHED, "use_additional_conditions": takes_size}},
    )


PIXART_ALPHA = _family("pixart-alpha", "PixArt-alpha", "pixart:PixArtAlpha", ALPHA_LANDMARKS, 0.18215, takes_size=True)
"""Its 1024 px models take the size of the picture. Other files count as Sigma's."""
PIXART_SIGMA = _family("pixart-sigma", "PixArt-Sigma", "pixart:PixArtSigma", SIGMA_LANDMARKS, 0.13025, takes_size=False)
