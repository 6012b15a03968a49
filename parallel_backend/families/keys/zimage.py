"""Z-Image and Z-Image Turbo: what their files look like, and ComfyUI's names of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...layout.stages import BlockList
from ..spec import Config, Cut, FamilySpec, HeadGroup, Input, LatentSpec, Rule, Shapes, count_blocks
from .layers import attention_cuts, projections
from .shapes import count_heads, landmark_shapes, neighbour, rotary_axes

PATCH = 2
"""Rows and columns of latent cells to a token."""
PAD_MULTIPLE = 32
"""Text and image are each filled up to a multiple of as many tokens, which are attended to."""
ATTENTIONS = tuple(f"{stack}.{{i}}.attention" for stack in ("noise_refiner", "context_refiner", "layers"))

RULES = (
    Rule("x_embedder", ("all_x_embedder.2-1",)),
    Rule("final_layer.linear", ("all_final_layer.2-1.linear",)),
    Rule("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
    *(
        rule
        for attention in ATTENTIONS
        for rule in (
            Rule(f"{attention}.qkv", projections(attention)),
            Rule(f"{attention}.out", (f"{attention}.to_out.0",)),
            Rule(f"{attention}.q_norm", (f"{attention}.norm_q",)),
            Rule(f"{attention}.k_norm", (f"{attention}.norm_k",)),
        )
    ),
)
"""All others have one name in both layouts."""

CUTS = (
    *attention_cuts("attention"),
    Cut(r"feed_forward\.w[13]", "column"),
    Cut(r"feed_forward\.w2", "row"),
    Cut(r"adaLN_modulation\.0", "gathered"),
)

LANDMARKS = {
    "original": {
        "image": "x_embedder.weight",
        "text": "cap_embedder.1.weight",
        "text_pad": "cap_pad_token",
        "norm": "noise_refiner.0.attention.k_norm.weight",
        "features": "layers.0.feed_forward.w1.weight",
        "output": "final_layer.linear.weight",
    },
    "diffusers": {
        "image": "all_x_embedder.2-1.weight",
        "text": "cap_embedder.1.weight",
        "text_pad": "cap_pad_token",
        "norm": "noise_refiner.0.attention.norm_k.weight",
        "features": "layers.0.feed_forward.w1.weight",
        "output": "all_final_layer.2-1.linear.weight",
    },
}
DIMS = {"norm": 1}

NEIGHBOURS = {
    "siglip_embedder.0.weight": "Z-Image Omni",
    "dec_net.cond_embed.weight": "a Z-Image of pixels",
    "clip_text_pooled_proj.0.weight": "NewBie",
}
"""By keys that only they have."""


def reject(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """Which other model of this architecture it is."""
    return neighbour(NEIGHBOURS, shapes)


def derive_config(layout: str, shapes: Shapes, declared: Config) -> dict[str, Any]:
    """Arguments of ZImageTransformer2DModel from the shapes; `declared` (config.json) tells what shapes cannot.

    That is rotary_axes and what is the same in all published models.
    """
    shape = landmark_shapes("Z-Image", shapes, LANDMARKS[layout], DIMS)
    (hidden, text), (head_dim,), (features, _) = shape["text"], shape["norm"], shape["features"]
    heads = count_heads(hidden, head_dim)
    if features != int(hidden / 3 * 8):
        raise UserError(f"The hidden size {hidden} goes with {int(hidden / 3 * 8)} features; there are {features}.")
    return {
        "all_patch_size": (PATCH,),
        "all_f_patch_size": (1,),
        "in_channels": shape["image"][1] // PATCH**2,
        "dim": hidden,
        "n_layers": count_blocks(shapes, "layers"),
        "n_refiner_layers": count_blocks(shapes, "noise_refiner"),
        "n_heads": heads,
        "n_kv_heads": heads,
        "norm_eps": declared.get("norm_eps", 1e-5),
        "qk_norm": True,
        "cap_feat_dim": text,
        "siglip_feat_dim": None,
        "rope_theta": declared.get("rope_theta", 256.0),
        "t_scale": declared.get("t_scale", 1000.0),
        "axes_dims": rotary_axes(head_dim, declared.get("axes_dims"), side=3 / 8),
        "axes_lens": tuple(declared.get("axes_lens", AXES_LENGTHS)),
    }


AXES_LENGTHS = (1024, 512, 512)
"""Where the tables of diffusers end; here and in ComfyUI positions have no end."""


def host_config(config: Config) -> dict[str, Any]:
    """As ComfyUI's detection says it, and with the number of refiner blocks, for which its network has a default."""
    return {
        "image_model": "lumina2",
        "patch_size": PATCH,
        "in_channels": config["in_channels"],
        "dim": config["dim"],
        "cap_feat_dim": config["cap_feat_dim"],
        "n_layers": config["n_layers"],
        "n_refiner_layers": config["n_refiner_layers"],
        "qk_norm": True,
        "n_heads": config["n_heads"],
        "n_kv_heads": config["n_kv_heads"],
        "axes_dims": list(config["axes_dims"]),
        "axes_lens": [1536, 512, 512],
        "rope_theta": config["rope_theta"],
        "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True,
        "time_scale": config["t_scale"],
        "pad_tokens_multiple": PAD_MULTIPLE,
    }


PUBLISHED = {
    "all_patch_size": (PATCH,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "siglip_feat_dim": None,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": (32, 48, 48),
    "axes_lens": AXES_LENGTHS,
}

ZIMAGE = FamilySpec(
    name="zimage",
    title="Z-Image",
    view="zimage:ZImage",
    class_name="ZImageTransformer2DModel",
    blocks=(BlockList(("noise_refiner", "context_refiner"), "n_refiner_layers"), BlockList(("layers",), "n_layers")),
    latents=(LatentSpec(channels=16, scale=0.3611, shift=0.1159, channels_last=True),),
    inputs=(Input("tokens", 3, "text tokens", network="context"),),
    encoders="Qwen3 4B",
    unread=("attention_mask",),
    landmarks=LANDMARKS,
    reject=reject,
    rules=RULES,
    derive_config=derive_config,
    cuts=CUTS,
    heads={"heads": HeadGroup("n_heads", lambda config: config["dim"] // config["n_heads"])},
    not_weights=("norm_final.weight",),
    host_config=host_config,
    host_class="ZImage",
    published={"z-image": PUBLISHED, "z-image-turbo": PUBLISHED},
)
