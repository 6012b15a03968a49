"""HunyuanDiT: what its files look like, and the original (Tencent, ComfyUI) names of its weights in diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...layout.stages import BlockList
from ..spec import Config, Cut, FamilySpec, Input, LatentSpec, Rule, Shapes, count_blocks
from .layers import FINAL_LAYER, attention_cuts, embedder, feed_forward, feed_forward_cuts, projections
from .shapes import count_heads, landmark_shapes

RULES = (
    Rule("x_embedder.proj", ("pos_embed.proj",)),
    *embedder("mlp_t5", "text_embedder"),
    *embedder("t_embedder.mlp", "time_extra_emb.timestep_embedder"),
    *embedder("extra_embedder", "time_extra_emb.extra_embedder"),
    Rule("style_embedder", ("time_extra_emb.style_embedder",)),
    Rule("pooler", ("time_extra_emb.pooler",), suffixes={"positional_embedding": "positional_embedding"}),
    *(Rule(f"pooler.{part}_proj", (f"time_extra_emb.pooler.{part}_proj",)) for part in "qkvc"),
    Rule("blocks.{i}.norm1", ("blocks.{i}.norm1.norm",)),
    Rule("blocks.{i}.default_modulation.1", ("blocks.{i}.norm1.linear",)),
    # The original numbers its norms in another order.
    Rule("blocks.{i}.norm2", ("blocks.{i}.norm3",)),
    Rule("blocks.{i}.norm3", ("blocks.{i}.norm2",)),
    Rule("blocks.{i}.attn1.Wqkv", projections("blocks.{i}.attn1")),
    Rule("blocks.{i}.attn2.q_proj", ("blocks.{i}.attn2.to_q",)),
    Rule("blocks.{i}.attn2.kv_proj", projections("blocks.{i}.attn2", "kv")),
    *(
        Rule(f"blocks.{{i}}.{attn}.{part}_norm", (f"blocks.{{i}}.{attn}.norm_{part}",))
        for attn in ("attn1", "attn2")
        for part in "qk"
    ),
    *(Rule(f"blocks.{{i}}.{attn}.out_proj", (f"blocks.{{i}}.{attn}.to_out.0",)) for attn in ("attn1", "attn2")),
    *feed_forward("blocks.{i}.mlp", "blocks.{i}.ff", ("fc1", "fc2")),
    *FINAL_LAYER,
)

CUTS = (
    *attention_cuts("attn[12]"),
    *feed_forward_cuts("ff"),
    Cut(r"norm1\.linear|skip_linear", "gathered"),
)

LANDMARKS = {
    "original": {
        "patch": "x_embedder.proj.weight",
        "padding": "text_embedding_padding",
        "text": "blocks.0.attn2.kv_proj.weight",
        "text_2": "mlp_t5.0.weight",
        "pooled": "pooler.c_proj.weight",
        "pooled_positions": "pooler.positional_embedding",
        "head_norm": "blocks.0.attn1.q_norm.weight",
        "feed_forward": "blocks.0.mlp.fc1.weight",
        "output": "final_layer.linear.weight",
    },
    "diffusers": {
        "patch": "pos_embed.proj.weight",
        "padding": "text_embedding_padding",
        "text": "blocks.0.attn2.to_k.weight",
        "text_2": "text_embedder.linear_1.weight",
        "pooled": "time_extra_emb.pooler.c_proj.weight",
        "pooled_positions": "time_extra_emb.pooler.positional_embedding",
        "head_norm": "blocks.0.attn1.norm_q.weight",
        "feed_forward": "blocks.0.ff.net.0.proj.weight",
        "output": "proj_out.weight",
    },
}
STYLE = {"original": "style_embedder.weight", "diffusers": "time_extra_emb.style_embedder.weight"}
DIMS = {"patch": 4, "head_norm": 1}


def derive_config(layout: str, shapes: Shapes, declared: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of HunyuanDiT2DModel from the shapes."""
    shape = landmark_shapes("HunyuanDiT", shapes, LANDMARKS[layout], DIMS)
    (hidden, channels, patch, _), (head_dim,) = shape["patch"], shape["head_norm"]
    layers = count_blocks(shapes, "blocks")
    if layers % 2:
        raise UserError(f"The model has {layers} blocks; those of the second half mirror those of the first.")
    text_length_2 = shape["pooled_positions"][0] - 1
    return {
        "num_attention_heads": count_heads(hidden, head_dim),
        "attention_head_dim": head_dim,
        "hidden_size": hidden,
        "in_channels": channels,
        "patch_size": patch,
        "num_layers": layers,
        "mlp_ratio": _mlp_ratio(hidden, shape["feed_forward"][0], declared.get("mlp_ratio")),
        "learn_sigma": shape["output"][0] == 2 * channels * patch**2,
        "cross_attention_dim": shape["text"][1],
        "cross_attention_dim_t5": shape["text_2"][1],
        "pooled_projection_dim": shape["pooled"][0],
        "text_len": shape["padding"][0] - text_length_2,
        "text_len_t5": text_length_2,
        "use_style_cond_and_image_meta_size": STYLE[layout] in shapes,
    }


def _mlp_ratio(hidden: int, width: int, declared: Any) -> float:
    """A ratio of which the model makes a feed-forward of that `width`, the declared one if it does."""
    if isinstance(declared, int | float) and int(hidden * declared) == width:
        return declared
    return (width + 0.5) / hidden


def host_config(config: Config) -> dict[str, Any]:
    """Returns the config that ComfyUI's detection gives."""
    takes_size = config["use_style_cond_and_image_meta_size"]
    return {
        "image_model": "hydit1" if takes_size else "hydit",
        "size_cond": takes_size,
        "use_style_cond": takes_size,
        "in_channels": config["in_channels"],
        "patch_size": config["patch_size"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "mlp_ratio": config["mlp_ratio"],
        "text_states_dim": config["cross_attention_dim"],
        "text_states_dim_t5": config["cross_attention_dim_t5"],
        "text_len": config["text_len"],
        "text_len_t5": config["text_len_t5"],
    }


def skips(blocks: int) -> dict[int, int]:
    """Maps each block that leaves a skip to the later one that takes it, of `blocks` blocks."""
    return {source: blocks - 1 - source for source in range(blocks // 2 - 1)}


VERSION_1_2 = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "hidden_size": 1408,
    "in_channels": 4,
    "patch_size": 2,
    "num_layers": 40,
    "mlp_ratio": 4.3637,
    "learn_sigma": True,
    "cross_attention_dim": 1024,
    "cross_attention_dim_t5": 2048,
    "pooled_projection_dim": 1024,
    "text_len": 77,
    "text_len_t5": 256,
    "use_style_cond_and_image_meta_size": False,
}

HUNYUANDIT = FamilySpec(
    name="hunyuandit",
    title="HunyuanDiT",
    view="hunyuandit:HunyuanDiT",
    class_name="HunyuanDiT2DModel",
    blocks=(BlockList(("blocks",)),),
    latents=(LatentSpec(channels=4, scale=0.13025),),
    inputs=(
        Input("tokens", 3, "text tokens", network="context", mask="mask"),
        Input("mask", 2, "a mask of the text tokens", entry="attention_mask", network="text_embedding_mask"),
        Input(
            "tokens_2",
            3,
            "text tokens of a second encoder",
            entry="conditioning_mt5xl",
            network="encoder_hidden_states_t5",
            mask="mask_2",
        ),
        Input(
            "mask_2",
            2,
            "a mask of the second encoder's tokens",
            entry="attention_mask_mt5xl",
            network="text_embedding_mask_t5",
        ),
    ),
    encoders="a Chinese CLIP and mT5-XL",
    landmarks=LANDMARKS,
    rules=RULES,
    derive_config=derive_config,
    cuts=CUTS,
    never_fp8=("time_extra_emb.pooler",),
    host_config=host_config,
    residuals=lambda config: {"output": sorted(skips(config["num_layers"]))},
    all_residuals=True,
    published={
        "hunyuandit-1.2": VERSION_1_2,
        "hunyuandit-1.1": {**VERSION_1_2, "use_style_cond_and_image_meta_size": True},
    },
)
