"""Flux.1: what its files look like, and the original (BFL, ComfyUI) names of its weights in those of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...layout.stages import BlockList
from ..spec import Config, Cut, FamilySpec, Input, LatentSpec, LoraName, Rule, Shapes, count_blocks
from .layers import (
    FINAL_LAYER,
    attention_cuts,
    embedder,
    feed_forward,
    feed_forward_cuts,
    projections,
    text_projections,
)
from .shapes import count_channels, count_heads, landmark_shapes, rotary_axes

NORM = {"scale": "weight", "weight": "weight"}
"""Black Forest Labs' files say `scale`, what ComfyUI has saved since 2026 says `weight`."""

LAYERS = ("in_layer", "out_layer")

RULES = (
    Rule("img_in", ("x_embedder",)),
    Rule("txt_in", ("context_embedder",)),
    *embedder("time_in", "time_text_embed.timestep_embedder", LAYERS),
    *embedder("vector_in", "time_text_embed.text_embedder", LAYERS),
    *embedder("guidance_in", "time_text_embed.guidance_embedder", LAYERS),
    Rule("double_blocks.{i}.img_mod.lin", ("transformer_blocks.{i}.norm1.linear",)),
    Rule("double_blocks.{i}.txt_mod.lin", ("transformer_blocks.{i}.norm1_context.linear",)),
    Rule("double_blocks.{i}.img_attn.qkv", projections("transformer_blocks.{i}.attn")),
    Rule("double_blocks.{i}.txt_attn.qkv", text_projections("transformer_blocks.{i}.attn")),
    Rule("double_blocks.{i}.img_attn.norm.query_norm", ("transformer_blocks.{i}.attn.norm_q",), suffixes=NORM),
    Rule("double_blocks.{i}.img_attn.norm.key_norm", ("transformer_blocks.{i}.attn.norm_k",), suffixes=NORM),
    Rule("double_blocks.{i}.txt_attn.norm.query_norm", ("transformer_blocks.{i}.attn.norm_added_q",), suffixes=NORM),
    Rule("double_blocks.{i}.txt_attn.norm.key_norm", ("transformer_blocks.{i}.attn.norm_added_k",), suffixes=NORM),
    Rule("double_blocks.{i}.img_attn.proj", ("transformer_blocks.{i}.attn.to_out.0",)),
    Rule("double_blocks.{i}.txt_attn.proj", ("transformer_blocks.{i}.attn.to_add_out",)),
    *feed_forward("double_blocks.{i}.img_mlp", "transformer_blocks.{i}.ff"),
    *feed_forward("double_blocks.{i}.txt_mlp", "transformer_blocks.{i}.ff_context"),
    Rule("single_blocks.{i}.modulation.lin", ("single_transformer_blocks.{i}.norm.linear",)),
    Rule(
        "single_blocks.{i}.linear1",
        (*projections("single_transformer_blocks.{i}.attn"), "single_transformer_blocks.{i}.proj_mlp"),
    ),
    Rule("single_blocks.{i}.norm.query_norm", ("single_transformer_blocks.{i}.attn.norm_q",), suffixes=NORM),
    Rule("single_blocks.{i}.norm.key_norm", ("single_transformer_blocks.{i}.attn.norm_k",), suffixes=NORM),
    Rule("single_blocks.{i}.linear2", ("single_transformer_blocks.{i}.proj_out",)),
    *FINAL_LAYER,
)

CUTS = (
    *attention_cuts("attn"),
    *feed_forward_cuts("(ff|ff_context)"),
    Cut("proj_mlp", "column"),
    Cut("proj_out", "row", ("heads", "features")),
    Cut(r"(norm1|norm1_context|norm)\.linear", "gathered"),
)

LANDMARKS = {
    "original": {
        "image": "img_in.weight",
        "text": "txt_in.weight",
        "pooled": "vector_in.in_layer.weight",
        "single": "single_blocks.0.linear1.weight",
        "output": "final_layer.linear.weight",
    },
    "diffusers": {
        "image": "x_embedder.weight",
        "text": "context_embedder.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
        "single": "single_transformer_blocks.0.proj_mlp.weight",
        "output": "proj_out.weight",
    },
}
HEAD_NORM = {
    "original": "double_blocks.0.img_attn.norm.query_norm",
    "diffusers": "transformer_blocks.0.attn.norm_added_q",
}
BLOCKS = {
    "original": ("double_blocks", "single_blocks", "guidance_in.in_layer.weight"),
    "diffusers": (
        "transformer_blocks",
        "single_transformer_blocks",
        "time_text_embed.guidance_embedder.linear_1.weight",
    ),
}


def derive_config(layout: str, shapes: Shapes, declared: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of FluxTransformer2DModel from the shapes; `declared` (config.json) gives what shapes cannot.

    That is patch_size (1 if not declared) and axes_dims_rope (see `rotary_axes`).
    """
    name = next((name for name in NORM if f"{HEAD_NORM[layout]}.{name}" in shapes), None)
    if name is None:
        raise UserError(f"The Flux model has no {HEAD_NORM[layout]}.weight.", "Is it a complete model?")
    landmarks = {**LANDMARKS[layout], "head_norm": f"{HEAD_NORM[layout]}.{name}"}
    shape = landmark_shapes("Flux", shapes, landmarks, {"head_norm": 1})
    (hidden, in_channels), (head_dim,) = shape["image"], shape["head_norm"]
    double, single, guidance = BLOCKS[layout]
    patch_size = declared.get("patch_size", 1)
    return {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": count_channels(shape["output"][0], patch_size),
        "num_layers": count_blocks(shapes, double),
        "num_single_layers": count_blocks(shapes, single),
        "attention_head_dim": head_dim,
        "num_attention_heads": count_heads(hidden, head_dim),
        "joint_attention_dim": shape["text"][1],
        "pooled_projection_dim": shape["pooled"][1],
        "guidance_embeds": guidance in shapes,
        "axes_dims_rope": rotary_axes(head_dim, declared.get("axes_dims_rope")),
    }


PATCH = 2
"""Rows and columns of latent cells that files count as channels of a token."""


def host_config(config: Config) -> dict[str, Any]:
    """Returns the config that ComfyUI's detection gives."""
    return {
        "image_model": "flux",
        "in_channels": config["in_channels"] // PATCH**2,
        "out_channels": (config.get("out_channels") or config["in_channels"]) // PATCH**2,
        "patch_size": PATCH,
        "vec_in_dim": config["pooled_projection_dim"],
        "context_in_dim": config["joint_attention_dim"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "mlp_ratio": 4.0,
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": config["guidance_embeds"],
        "txt_ids_dims": [],  # of Flux.2, which ComfyUI builds from the same class since 2026
    }


def residuals(config: Config) -> dict[str, range]:
    double = config["num_layers"]
    return {"input": range(double), "output": range(double, double + config["num_single_layers"])}


SCHNELL = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}

LORA_NAMES = (
    # LyCORIS, after Flux.2's names.
    LoraName("diffusers", r"\.(ff|ff_context)\.net\.0\.proj$", r".\1.linear_in"),
    LoraName("diffusers", r"\.(ff|ff_context)\.net\.2$", r".\1.linear_out"),
    LoraName("diffusers", r"^(single_transformer_blocks\.\d+)\.proj_out$", r"\1.attn.to_out"),
    LoraName(
        "original",
        r"^single_blocks\.(\d+)\.linear1$",
        r"single_transformer_blocks.\1.attn.to_qkv_mlp_proj",
        like="diffusers",
    ),
    LoraName("original", r"\.linear1$", ".linear1_qkv", parts=3),
    # XLabs and USO: attention processors.
    *(
        LoraName("original", rf"^(double_blocks\.\d+)\.{stream}_attn\.{module}$", rf"\1.processor.{name}_lora{number}")
        for number, stream in enumerate(("img", "txt"), 1)
        for module, name in (("qkv", "qkv"), ("proj", "proj"))
    ),
    LoraName("original", r"^(single_blocks\.\d+)\.linear1$", r"\1.processor.qkv_lora", parts=3),
    LoraName("original", r"^(single_blocks\.\d+)\.linear2$", r"\1.processor.proj_lora"),
)

FLUX = FamilySpec(
    name="flux",
    title="Flux.1",
    view="flux:Flux",
    class_name="FluxTransformer2DModel",
    blocks=(
        BlockList(("transformer_blocks",), "num_layers"),
        BlockList(("single_transformer_blocks",), "num_single_layers"),
    ),
    latents=(LatentSpec(channels=16, scale=0.3611, shift=0.1159),),
    inputs=(
        Input("tokens", 3, "text tokens", network="context"),
        Input("pooled", 2, "a pooled vector", entry="pooled_output", network="y"),
    ),
    encoders="CLIP-L and T5-XXL",
    landmarks=LANDMARKS,
    rules=RULES,
    derive_config=derive_config,
    cuts=CUTS,
    host_config=host_config,
    host_params="comfy.ldm.flux.model:FluxParams",
    residuals=residuals,
    reference_places=("offset", "index", "uxo"),
    lora_names=LORA_NAMES,
    teacache={57: (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)},
    published={"flux-dev": {**SCHNELL, "guidance_embeds": True}, "flux-schnell": SCHNELL},
)
