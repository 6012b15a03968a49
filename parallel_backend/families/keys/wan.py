"""Wan 2.1, text to video: what its files look like, and the original (and ComfyUI's) names of its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...layout.stages import BlockList
from ..spec import Config, Cut, FamilySpec, Input, LatentSpec, Rule, Shapes, count_blocks
from .layers import attention_cuts, embedder, feed_forward, feed_forward_cuts
from .shapes import count_channels, count_heads, landmark_shapes, neighbour

HEAD_DIM = 128
"""The head width of every published model: norms are over all heads, so that no shape depends on it."""
PATCH = (1, 2, 2)
TABLE = {"modulation": "scale_shift_table"}
SITES = {"self_attn": "attn1", "cross_attn": "attn2"}

RULES = (
    *embedder("text_embedding", "condition_embedder.text_embedder"),
    *embedder("time_embedding", "condition_embedder.time_embedder"),
    Rule("time_projection.1", ("condition_embedder.time_proj",)),
    Rule("blocks.{i}", ("blocks.{i}",), suffixes=TABLE),
    *(
        Rule(f"blocks.{{i}}.{site}.{part}", (f"blocks.{{i}}.{attn}.to_{part}",))
        for site, attn in SITES.items()
        for part in "qkv"
    ),
    *(
        Rule(f"blocks.{{i}}.{site}.norm_{part}", (f"blocks.{{i}}.{attn}.norm_{part}",))
        for site, attn in SITES.items()
        for part in "qk"
    ),
    *(Rule(f"blocks.{{i}}.{site}.o", (f"blocks.{{i}}.{attn}.to_out.0",)) for site, attn in SITES.items()),
    # The original counts its norms in another order; the two others of a block have no weights.
    Rule("blocks.{i}.norm3", ("blocks.{i}.norm2",)),
    *feed_forward("blocks.{i}.ffn", "blocks.{i}.ffn"),
    Rule("head", ("",), suffixes=TABLE),
    Rule("head.head", ("proj_out",)),
)
"""`patch_embedding` has one name in both layouts."""

CUTS = (
    *attention_cuts("attn[12]"),
    Cut(r"attn[12]\.norm_[qk]", "norm", ("heads",)),
    *feed_forward_cuts("ffn"),
)

LANDMARKS = {
    "original": {
        "patch": "patch_embedding.weight",
        "text": "text_embedding.0.weight",
        "time": "time_embedding.0.weight",
        "norm": "blocks.0.self_attn.norm_q.weight",
        "features": "blocks.0.ffn.0.weight",
        "table": "head.modulation",
        "output": "head.head.weight",
    },
    "diffusers": {
        "patch": "patch_embedding.weight",
        "text": "condition_embedder.text_embedder.linear_1.weight",
        "time": "condition_embedder.time_embedder.linear_1.weight",
        "norm": "blocks.0.attn1.norm_q.weight",
        "features": "blocks.0.ffn.net.0.proj.weight",
        "table": "scale_shift_table",
        "output": "proj_out.weight",
    },
}
"""All kinds of Wan have these: `reject` tells the others."""
DIMS = {"patch": 5, "norm": 1, "table": 3}
CROSS_NORM = {"original": "blocks.0.norm3.weight", "diffusers": "blocks.0.norm2.weight"}

NEIGHBOURS = {
    "vace_patch_embedding.weight": "Wan VACE",
    "control_adapter.conv.weight": "Wan Fun Camera",
    "casual_audio_encoder.encoder.final_linear.weight": "Wan S2V",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Wan Animate",
    "face_adapter.0.norm_k.weight": "Wan Animate",
    "patch_embedding_mask.weight": "SCAIL-2",
    "patch_embedding_pose.weight": "SCAIL",
    "patch_embedding_global.weight": "Wan Dancer",
    "ref_conv.weight": "Wan Fun Control",
    "img_emb.emb_pos": "Wan FLF2V",
    "condition_embedder.image_embedder.pos_embed": "Wan FLF2V",
    "img_emb.proj.0.bias": "Wan 2.1 I2V",
    "condition_embedder.image_embedder.norm1.bias": "Wan 2.1 I2V",
}
"""Other kinds of Wan by keys that only they have; the first match counts."""
BY_CHANNELS = {(36, 16): "Wan 2.2 I2V", (48, 16): "Wan Fun Control", (48, 48): "Wan 2.2 TI2V 5B"}
"""Other kinds without a key of their own, by the channels that they take and predict."""


def reject(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """Which other kind of Wan it is: by its keys, by what its file says of itself, by its channels."""
    if kind := neighbour(NEIGHBOURS, shapes):
        return kind
    said = _said(metadata)
    if said.get("causal_ar"):
        return "Wan Causal Forcing"
    if said.get("model_type", "t2v") != "t2v":
        return f"Wan {said['model_type']}"
    layout = next(name for name, keys in LANDMARKS.items() if keys["output"] in shapes)
    patch, output = (shapes[LANDMARKS[layout][fact]] for fact in ("patch", "output"))
    channels = patch[1] if len(patch) > 1 else 0, output[0] // (PATCH[1] * PATCH[2])
    if channels == (16, 16):
        return None
    return BY_CHANNELS.get(channels, f"a Wan that takes {channels[0]} channels and predicts {channels[1]}")


def _said(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """The transformer's part of `config` in a file's header."""
    try:
        config = json.loads(metadata.get("config", "{}"))
    except ValueError as error:
        raise UserError(f"The header's metadata has a config that is no JSON: {error}.") from error
    said = config.get("transformer") if isinstance(config, dict) else None
    return said if isinstance(said, dict) else {}


def derive_config(layout: str, shapes: Shapes, declared: Config) -> dict[str, Any]:
    """Arguments of WanTransformer3DModel from the shapes; `declared` (config.json) gives what shapes cannot.

    That is the width of a head (128 if not declared) and the norms' eps.
    """
    shape = landmark_shapes("Wan", shapes, LANDMARKS[layout], DIMS)
    hidden, channels, *patch = shape["patch"]
    if tuple(patch) != PATCH:
        raise UserError(f"This Wan model has tokens of {tuple(patch)} cells, not of {PATCH}.")
    head_dim = declared.get("attention_head_dim", HEAD_DIM)
    heads = count_heads(hidden, head_dim)
    if head_dim < 6 or head_dim % 2:
        raise UserError(f"The head dim {head_dim} is no even number of at least 6, as rotary embeddings need it.")
    return {
        "patch_size": PATCH,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": count_channels(shape["output"][0], PATCH[1]),
        "text_dim": shape["text"][1],
        "freq_dim": shape["time"][1],
        "ffn_dim": shape["features"][0],
        "num_layers": count_blocks(shapes, "blocks"),
        "cross_attn_norm": CROSS_NORM[layout] in shapes,
        "eps": declared.get("eps", 1e-6),
    }


def host_config(config: Config) -> dict[str, Any]:
    """Returns the config that ComfyUI's detection gives, and the text's width, which has a default there."""
    return {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "out_dim": config["out_channels"],
        "num_heads": config["num_attention_heads"],
        "ffn_dim": config["ffn_dim"],
        "num_layers": config["num_layers"],
        "patch_size": tuple(config["patch_size"]),
        "freq_dim": config["freq_dim"],
        "window_size": (-1, -1),
        "qk_norm": True,
        "cross_attn_norm": config["cross_attn_norm"],
        "eps": config["eps"],
        "in_dim": config["in_channels"],
        "text_dim": config["text_dim"],
    }


# fmt: off
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


def _published(heads: int, layers: int, features: int) -> Config:
    return {
        "patch_size": PATCH,
        "num_attention_heads": heads,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": features,
        "num_layers": layers,
        "cross_attn_norm": True,
        "eps": 1e-6,
    }


WAN = FamilySpec(
    name="wan",
    title="Wan 2.1 T2V",
    view="wan:Wan",
    class_name="WanTransformer3DModel",
    blocks=(BlockList(("blocks",)),),
    latents=(LatentSpec(16, "video", dims=3, stride=(4, 8, 8), patch=PATCH, mean=MEAN, std=STD),),
    inputs=(Input("tokens", 3, "text tokens", network="context"),),
    encoders="umt5-xxl",
    landmarks=LANDMARKS,
    reject=reject,
    rules=RULES,
    derive_config=derive_config,
    cuts=CUTS,
    host_config=host_config,
    teacache={
        30: (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
        40: (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    },
    published={"wan2.1-t2v-1.3b": _published(12, 30, 8960), "wan2.1-t2v-14b": _published(40, 40, 13824)},
)
