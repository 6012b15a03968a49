"""CogVideoX 2B and 5B, and 1.5 5B, text to video: what their files look like, and ComfyUI's names of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...layout.stages import BlockList
from ..spec import Config, Cut, FamilySpec, Input, LatentSpec, Rule, Shapes, count_blocks
from .layers import attention_cuts, feed_forward_cuts
from .shapes import count_heads, landmark_shapes, neighbour

CHANNELS = 16
HEADS_OF_5B = 48
"""Models with as many heads turn queries and keys by their positions, and have a VAE of another scale than 2B's."""

RULES = (
    Rule("time_embedding_linear_1", ("time_embedding.linear_1",)),
    Rule("time_embedding_linear_2", ("time_embedding.linear_2",)),
    *(
        Rule(f"blocks.{{i}}.{source}", (f"transformer_blocks.{{i}}.{target}",))
        for source, target in (
            ("norm1.linear", "norm1.linear"),
            ("norm1.norm", "norm1.norm"),
            ("norm2.linear", "norm2.linear"),
            ("norm2.norm", "norm2.norm"),
            ("q", "attn1.to_q"),
            ("k", "attn1.to_k"),
            ("v", "attn1.to_v"),
            ("norm_q", "attn1.norm_q"),
            ("norm_k", "attn1.norm_k"),
            ("attn_out", "attn1.to_out.0"),
            ("ff_proj", "ff.net.0.proj"),
            ("ff_out", "ff.net.2"),
        )
    ),
)
"""All others have one name in both layouts."""

CUTS = (
    *attention_cuts("attn1"),
    *feed_forward_cuts("ff"),
    Cut(r"norm[12]\.linear", "gathered"),
)

SHARED = {
    "video": "patch_embed.proj.weight",
    "text": "patch_embed.text_proj.weight",
    "final_norm": "norm_final.weight",
    "output": "proj_out.weight",
}
LANDMARKS = {
    "original": {
        **SHARED,
        "modulation": "blocks.0.norm1.linear.weight",
        "head_norm": "blocks.0.norm_q.weight",
    },
    "diffusers": {
        **SHARED,
        "modulation": "transformer_blocks.0.norm1.linear.weight",
        "head_norm": "transformer_blocks.0.attn1.norm_q.weight",
    },
}
BLOCKS = {"original": "blocks", "diffusers": "transformer_blocks"}
NEIGHBOURS = {"local_facial_extractor.latents": "ConsisID"}
BY_CHANNELS = {32: "CogVideoX I2V", 33: "CogVideoX Fun", 48: "CogVideoX Fun"}
"""Other kinds by the channels that they take."""
POSITIONS = "patch_embed.pos_embedding"
"""A table that some files of 2B hold; it is computed here."""


def _of_frames(frames: int) -> Any:
    """`reject` of the models whose tokens are patches of so many frames."""

    def reject(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
        if kind := neighbour(NEIGHBOURS, shapes):
            return kind
        video, output = shapes[SHARED["video"]], shapes[SHARED["output"]][0]
        # 1.5 has a matrix over the values of a token, the others a convolution over those of one frame.
        found = 2 if len(video) == 2 else 1
        channels = video[1] // 8 if found == 2 else video[1]
        predicted = output // (4 * found)
        if (channels, predicted) != (CHANNELS, CHANNELS):
            return BY_CHANNELS.get(channels, f"a CogVideoX that takes {channels} channels and predicts {predicted}")
        return None if found == frames else f"a CogVideoX of {found} frames to a token"

    return reject


def derive_config(layout: str, shapes: Shapes, declared: Config) -> dict[str, Any]:
    """Arguments of CogVideoXTransformer3DModel from the shapes; `declared` (config.json) gives what shapes cannot.

    That is whether positions turn queries and keys (those of 48 heads do), and the size for which they were trained.
    """
    dims = {"video": len(shapes[SHARED["video"]]), "final_norm": 1, "head_norm": 1}
    shape = landmark_shapes("CogVideoX", shapes, LANDMARKS[layout], dims)
    (hidden,), (head_dim,) = shape["final_norm"], shape["head_norm"]
    heads, is_newer = count_heads(hidden, head_dim), len(shape["video"]) == 2
    rotary = declared.get("use_rotary_positional_embeddings", is_newer or heads >= HEADS_OF_5B)
    if declared.get("use_learned_positional_embeddings") or (not rotary and is_newer):
        raise UserError(
            "config.json says that this CogVideoX has other positions than the models that are served.",
            "Choose a text-to-video model.",
        )
    sizes = NEWER_SIZES if is_newer else SIZES
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": shape["modulation"][1],
        "text_embed_dim": shape["text"][1],
        "num_layers": count_blocks(shapes, BLOCKS[layout]),
        "patch_size": 2,
        "patch_size_t": 2 if is_newer else None,
        "use_rotary_positional_embeddings": rotary,
        **{name: declared.get(name, value) for name, value in sizes.items()},
    }


SIZES = {
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
    "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0,
}
NEWER_SIZES = {**SIZES, "sample_height": 300, "sample_width": 300, "sample_frames": 81}


def host_config(config: Config) -> dict[str, Any]:
    """Returns the config that ComfyUI's detection gives: of 2B it is wrong about the positions."""
    said = {
        "image_model": "cogvideox",
        "num_attention_heads": config["num_attention_heads"],
        "attention_head_dim": config["attention_head_dim"],
        "time_embed_dim": config["time_embed_dim"],
        "num_layers": config["num_layers"],
        "in_channels": config["in_channels"],
        "patch_size": config["patch_size"],
        "text_embed_dim": config["text_embed_dim"],
        "use_learned_positional_embeddings": False,
        "use_rotary_positional_embeddings": True,
    }
    return said | ({} if config["patch_size_t"] is None else {"patch_size_t": config["patch_size_t"]})


def latent_scale(config: Config) -> float:
    """By the model's width, as ComfyUI has it."""
    return 0.7 if config["num_attention_heads"] >= HEADS_OF_5B else 1.15258426


def _published(heads: int, layers: int, newer: bool = False) -> Config:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 512,
        "text_embed_dim": 4096,
        "num_layers": layers,
        "patch_size": 2,
        "patch_size_t": 2 if newer else None,
        "use_rotary_positional_embeddings": heads >= HEADS_OF_5B,
        **(NEWER_SIZES if newer else SIZES),
    }


def _family(name: str, title: str, view: str, frames: int, published: Mapping[str, Config]) -> FamilySpec:
    return FamilySpec(
        name=name,
        title=title,
        view=view,
        class_name="CogVideoXTransformer3DModel",
        blocks=(BlockList(("transformer_blocks",)),),
        latents=(LatentSpec(CHANNELS, dims=3, stride=(4, 8, 8), patch=(frames, 2, 2), scale=1.15258426),),
        latent_scale=latent_scale,
        inputs=(Input("tokens", 3, "text tokens", network="context"),),
        encoders="T5-XXL",
        landmarks=LANDMARKS,
        reject=_of_frames(frames),
        rules=RULES,
        derive_config=derive_config,
        cuts=CUTS,
        not_weights=(POSITIONS,),
        host_config=host_config,
        host_class="CogVideoX_T2V",
        published=published,
    )


COGVIDEOX = _family(
    "cogvideox",
    "CogVideoX",
    "cogvideox:CogVideoX",
    1,
    {"cogvideox-2b": _published(30, 30), "cogvideox-5b": _published(48, 42)},
)
COGVIDEOX15 = _family(
    "cogvideox-1.5",
    "CogVideoX 1.5",
    "cogvideox:CogVideoX15",
    2,
    {"cogvideox1.5-5b": _published(48, 42, newer=True)},
)
