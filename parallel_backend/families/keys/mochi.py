"""Mochi 1: what its files look like, and the original (and ComfyUI's) names of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...errors import UserError
from ...layout.stages import BlockList
from ..spec import Config, Cut, FamilySpec, Input, LatentSpec, Rule, Shapes, count_blocks
from .layers import attention_cuts, embedder, projections, text_projections
from .shapes import count_channels, count_heads, landmark_shapes

PATCH = 2
CHANNELS = 12
POOL = "time_embed.pooler"


def _rules() -> Iterator[Rule]:
    yield Rule("x_embedder.proj", ("patch_embed.proj",))
    yield from embedder("t_embedder.mlp", "time_embed.timestep_embedder")
    yield from (Rule(f"t5_y_embedder.{layer}", (f"{POOL}.{layer}",)) for layer in ("to_kv", "to_q", "to_out"))
    yield Rule("t5_yproj", ("time_embed.caption_proj",))
    source, target = "blocks.{i}", "transformer_blocks.{i}"
    yield Rule("blocks.{last}.mod_y", ("transformer_blocks.{last}.norm1_context.linear_1",))
    yield Rule(f"{source}.mod_x", (f"{target}.norm1.linear",))
    yield Rule(f"{source}.mod_y", (f"{target}.norm1_context.linear",))
    for stream, qkv, norm, output, feed_forward in (
        ("x", projections(f"{target}.attn1"), "norm", "to_out.0", "ff"),
        ("y", text_projections(f"{target}.attn1"), "norm_added", "to_add_out", "ff_context"),
    ):
        yield Rule(f"{source}.attn.qkv_{stream}", qkv)
        for part in "qk":
            yield Rule(f"{source}.attn.{part}_norm_{stream}", (f"{target}.attn1.{norm}_{part}",))
        yield Rule(f"{source}.attn.proj_{stream}", (f"{target}.attn1.{output}",))
        # The gate comes first there.
        yield Rule(f"{source}.mlp_{stream}.w1", (f"{target}.{feed_forward}.net.0.proj",), swap_halves=True)
        yield Rule(f"{source}.mlp_{stream}.w2", (f"{target}.{feed_forward}.net.2",))
    yield Rule("final_layer.mod", ("norm_out.linear",), swap_halves=True)  # shift, scale -> scale, shift
    yield Rule("final_layer.linear", ("proj_out",))


CUTS = (
    *attention_cuts("attn1"),
    Cut(r"(ff|ff_context)\.net\.0\.proj", "column", ("features", "features")),
    Cut(r"(ff|ff_context)\.net\.2", "row"),
    Cut(r"norm1\.linear|norm1_context\.linear(_1)?", "gathered"),
)

LANDMARKS = {
    "original": {
        "video": "x_embedder.proj.weight",
        "text": "t5_yproj.weight",
        "time": "t_embedder.mlp.0.weight",
        "frequencies": "pos_frequencies",
        "norm": "blocks.0.attn.q_norm_y.weight",
        "output": "final_layer.linear.weight",
    },
    "diffusers": {
        "video": "patch_embed.proj.weight",
        "text": "time_embed.caption_proj.weight",
        "time": "time_embed.timestep_embedder.linear_1.weight",
        "frequencies": "pos_frequencies",
        "norm": "transformer_blocks.0.attn1.norm_added_q.weight",
        "output": "proj_out.weight",
    },
}
DIMS = {"video": 4, "frequencies": 3, "norm": 1}
BLOCKS = {"original": "blocks", "diffusers": "transformer_blocks"}


def derive_config(layout: str, shapes: Shapes, declared: Config) -> dict[str, Any]:
    """Arguments of MochiTransformer3DModel from the shapes."""
    shape = landmark_shapes("Mochi", shapes, LANDMARKS[layout], DIMS)
    (hidden, channels, *patch), (head_dim,) = shape["video"], shape["norm"]
    if patch != [PATCH, PATCH]:
        raise UserError(f"The tokens of this Mochi model are patches of {patch}; {[PATCH, PATCH]} are served.")
    return {
        "patch_size": PATCH,
        "num_attention_heads": count_heads(hidden, head_dim),
        "attention_head_dim": head_dim,
        "num_layers": count_blocks(shapes, BLOCKS[layout]),
        "pooled_projection_dim": shape["text"][0],
        "in_channels": channels,
        "out_channels": count_channels(shape["output"][0], PATCH),
        "text_embed_dim": shape["text"][1],
        "time_embed_dim": shape["time"][1],
    }


def host_config(config: Config) -> dict[str, Any]:
    """Returns the config that ComfyUI's detection gives, which takes the widths of the published model for given."""
    return {
        "image_model": "mochi_preview",
        "depth": config["num_layers"],
        "patch_size": config["patch_size"],
        "num_heads": config["num_attention_heads"],
        "hidden_size_x": config["num_attention_heads"] * config["attention_head_dim"],
        "hidden_size_y": config["pooled_projection_dim"],
        "mlp_ratio_x": 4.0,
        "mlp_ratio_y": 4.0,
        "learn_sigma": False,
        "in_channels": config["in_channels"],
        "qk_norm": True,
        "qkv_bias": False,
        "out_bias": True,
        "attn_drop": 0.0,
        "patch_embed_bias": True,
        "posenc_preserve_area": True,
        "timestep_mlp_bias": True,
        "attend_to_padding": False,
        "timestep_scale": 1000.0,
        "use_t5": True,
        "t5_feat_dim": config["text_embed_dim"],
        "t5_token_length": 256,
        "rope_theta": 10000.0,
    }


# fmt: off
MEAN = (-0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561,
        0.012767231469026969, -0.04703542746246419, 0.043896967884726704, -0.09346305707025976,
        -0.09918314763016893, -0.008729793427399178, -0.011931556316503654, -0.0321993391887285)
STD = (0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592,
       0.8244560132752793, 0.917259975397747, 0.9294154431013696, 1.3720942357788521,
       0.881393668867029, 0.9168315692124348, 0.9185249279345552, 0.9274757570805041)
# fmt: on

MOCHI = FamilySpec(
    name="mochi",
    title="Mochi 1",
    view="mochi:Mochi",
    class_name="MochiTransformer3DModel",
    blocks=(BlockList(("transformer_blocks",)),),
    latents=(LatentSpec(CHANNELS, dims=3, stride=(6, 8, 8), patch=(1, PATCH, PATCH), mean=MEAN, std=STD),),
    inputs=(
        Input("tokens", 3, "text tokens", network="context", mask="mask", trimmed=True),
        Input("mask", 2, "a mask of the text tokens", entry="attention_mask", network="attention_mask", required=False),
    ),
    encoders="T5-XXL",
    landmarks=LANDMARKS,
    rules=tuple(_rules()),
    derive_config=derive_config,
    cuts=CUTS,
    host_config=host_config,
    published={
        "mochi-1-preview": {
            "patch_size": PATCH,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 48,
            "pooled_projection_dim": 1536,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "text_embed_dim": 4096,
            "time_embed_dim": 256,
        }
    },
)
