"""Qwen-Image and its Edit models: what their files look like. All files have the names of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...layout.stages import BlockList
from ..spec import Config, Cut, FamilySpec, Input, LatentSpec, Shapes, count_blocks
from .layers import attention_cuts, feed_forward_cuts
from .shapes import count_channels, count_heads, landmark_shapes, rotary_axes
from .wan import MEAN, STD

CUTS = (
    *attention_cuts("attn"),
    *feed_forward_cuts("(img|txt)_mlp"),
    Cut(r"(img|txt)_mod\.1", "gathered"),  # a third of the model's weights
)

LANDMARKS = {
    "image": "img_in.weight",
    "text": "txt_in.weight",
    "text_norm": "txt_norm.weight",
    "modulation": "transformer_blocks.0.txt_mod.1.weight",
    "head_norm": "transformer_blocks.0.attn.norm_added_q.weight",
    "output": "proj_out.weight",
}
DIMS = {"text_norm": 1, "head_norm": 1}
PATCH = (1, 2, 2)
CHANNELS = 16
LAYERED = "time_text_embed.addition_t_embedding.weight"
REFERENCES_AT_ZERO = "__index_timestep_zero__"
"""An empty tensor in ComfyUI's files of Edit 2511, whose references are at time 0."""


def reject(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """Which other model of these blocks it is: by a key that only it has, or by its channels."""
    if LAYERED in shapes:
        return "Qwen-Image Layered"
    channels = shapes[LANDMARKS["image"]][-1], shapes[LANDMARKS["output"]][0]
    expected = CHANNELS * PATCH[1] * PATCH[2]
    if channels == (expected, expected):
        return None
    if channels == (128, 128):
        return "Mage-Flow"
    return f"a Qwen-Image that takes {channels[0]} values a token and predicts {channels[1]}"


def derive_config(layout: str, shapes: Shapes, declared: Config) -> dict[str, Any]:
    """Arguments of QwenImageTransformer2DModel from the shapes; `declared` (config.json) gives what shapes cannot.

    That is axes_dims_rope (see `rotary_axes`), and zero_cond_t, of which ComfyUI's files have a mark.
    """
    shape = landmark_shapes("Qwen-Image", shapes, LANDMARKS, DIMS)
    (hidden, in_channels), (head_dim,) = shape["image"], shape["head_norm"]
    return {
        "patch_size": PATCH[1],
        "in_channels": in_channels,
        "out_channels": count_channels(shape["output"][0], PATCH[1]),
        "num_layers": count_blocks(shapes, "transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": count_heads(hidden, head_dim),
        "joint_attention_dim": shape["text"][1],
        "axes_dims_rope": rotary_axes(head_dim, declared.get("axes_dims_rope")),
        "zero_cond_t": REFERENCES_AT_ZERO in shapes or declared.get("zero_cond_t") is True,
    }


def host_config(config: Config) -> dict[str, Any]:
    """As ComfyUI's detection says it, and with the widths for which its network has defaults."""
    said = {
        "image_model": "qwen_image",
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "num_layers": config["num_layers"],
        "attention_head_dim": config["attention_head_dim"],
        "num_attention_heads": config["num_attention_heads"],
        "joint_attention_dim": config["joint_attention_dim"],
        "axes_dims_rope": tuple(config["axes_dims_rope"]),
    }
    return said | ({"default_ref_method": "index_timestep_zero"} if config["zero_cond_t"] else {})


QWEN = {
    "patch_size": PATCH[1],
    "in_channels": 64,
    "out_channels": CHANNELS,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
    "zero_cond_t": False,
}

QWEN_IMAGE = FamilySpec(
    name="qwen-image",
    title="Qwen-Image",
    view="qwen_image:QwenImage",
    class_name="QwenImageTransformer2DModel",
    blocks=(BlockList(("transformer_blocks",)),),
    latents=(LatentSpec(CHANNELS, dims=3, stride=(4, 8, 8), patch=PATCH, mean=MEAN, std=STD),),
    inputs=(Input("tokens", 3, "text tokens", network="context"),),
    encoders="Qwen2.5-VL 7B",
    landmarks={"diffusers": LANDMARKS},
    reject=reject,
    derive_config=derive_config,
    cuts=CUTS,
    not_weights=(REFERENCES_AT_ZERO,),
    host_config=host_config,
    host_params="comfy.ldm.qwen_image.model:QwenImageTransformer2DModel",
    residuals=lambda config: {"input": range(config["num_layers"])},
    reference_places=("index", "index_timestep_zero", "negative_index", "offset"),
    published={"qwen-image": QWEN, "qwen-image-edit-2511": {**QWEN, "zero_cond_t": True}},
)
