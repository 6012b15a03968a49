"""HunyuanVideo, text to video: what its files look like, and the original and ComfyUI's names of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import UserError
from ...layout.stages import BlockList
from ..spec import Config, FamilySpec, Input, LatentSpec, LoraName, Rule, Shapes, count_blocks
from .flux import CUTS, LAYERS, NORM, residuals
from .layers import FINAL_LAYER, embedder, feed_forward, projections, text_projections
from .shapes import count_channels, count_heads, landmark_shapes, neighbour, rotary_axes

PATCH = (1, 2, 2)
CHANNELS = 16
REFINERS = 2
"""Blocks that refine the text; ComfyUI's network has as many."""

EMBEDDERS = {
    "time_in": "time_text_embed.timestep_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
    "txt_in.t_embedder": "context_embedder.time_text_embed.timestep_embedder",
}
STREAMS = {
    "img": ("norm1", "ff", projections, "norm", "to_out.0"),
    "txt": ("norm1_context", "ff_context", text_projections, "norm_added", "to_add_out"),
}
FEATURES = (("fc1", "fc2"), ("0", "2"))
"""What the original and ComfyUI call the layers of a feed-forward."""


def _rules() -> Iterator[Rule]:
    """Of weights with two names the original comes first, then ComfyUI's; norms of old files of it say `scale`."""
    yield Rule("img_in.proj", ("x_embedder.proj",))
    for source, target in EMBEDDERS.items():
        yield from embedder(f"{source}.mlp", target)
        yield from embedder(source, target, LAYERS)
    yield from embedder("vector_in", "time_text_embed.text_embedder", LAYERS)
    for layers in (("linear_1", "linear_2"), LAYERS):
        yield from embedder("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder", layers)
    yield Rule("txt_in.input_embedder", ("context_embedder.proj_in",))
    for number in range(REFINERS):
        source = f"txt_in.individual_token_refiner.blocks.{number}"
        target = f"context_embedder.token_refiner.refiner_blocks.{number}"
        for norm in ("norm1", "norm2"):
            yield Rule(f"{source}.{norm}", (f"{target}.{norm}",))
        for dot in "_.":
            yield Rule(f"{source}.self_attn{dot}qkv", projections(f"{target}.attn"))
            yield Rule(f"{source}.self_attn{dot}proj", (f"{target}.attn.to_out.0",))
        for layers in FEATURES:
            yield from feed_forward(f"{source}.mlp", f"{target}.ff", layers)
        yield Rule(f"{source}.adaLN_modulation.1", (f"{target}.norm_out.linear",))
    for stream, (norm, features, qkv, head_norm, output) in STREAMS.items():
        source, target = f"double_blocks.{{i}}.{stream}", "transformer_blocks.{i}"
        for name in ("linear", "lin"):
            yield Rule(f"{source}_mod.{name}", (f"{target}.{norm}.linear",))
        for dot in "_.":
            yield Rule(f"{source}_attn{dot}qkv", qkv(f"{target}.attn"))
            yield Rule(f"{source}_attn{dot}proj", (f"{target}.attn.{output}",))
        for part, name in (("q", "query"), ("k", "key")):
            yield Rule(f"{source}_attn_{part}_norm", (f"{target}.attn.{head_norm}_{part}",))
            yield Rule(f"{source}_attn.norm.{name}_norm", (f"{target}.attn.{head_norm}_{part}",), suffixes=NORM)
        for layers in FEATURES:
            yield from feed_forward(f"{source}_mlp", f"{target}.{features}", layers)
    source, target = "single_blocks.{i}", "single_transformer_blocks.{i}"
    for name in ("linear", "lin"):
        yield Rule(f"{source}.modulation.{name}", (f"{target}.norm.linear",))
    yield Rule(f"{source}.linear1", (*projections(f"{target}.attn"), f"{target}.proj_mlp"))
    for part, name in (("q", "query"), ("k", "key")):
        yield Rule(f"{source}.{part}_norm", (f"{target}.attn.norm_{part}",))
        yield Rule(f"{source}.norm.{name}_norm", (f"{target}.attn.norm_{part}",), suffixes=NORM)
    yield Rule(f"{source}.linear2", (f"{target}.proj_out",))
    yield from FINAL_LAYER


LANDMARKS = {
    "original": {
        "video": "img_in.proj.weight",
        "text": "txt_in.input_embedder.weight",
        "refiner": "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "pooled": "vector_in.in_layer.weight",
        "single": "single_blocks.0.linear1.weight",
        "output": "final_layer.linear.weight",
    },
    "diffusers": {
        "video": "x_embedder.proj.weight",
        "text": "context_embedder.proj_in.weight",
        "refiner": "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
        "single": "single_transformer_blocks.0.proj_mlp.weight",
        "output": "proj_out.weight",
    },
}
DIMS = {"video": 5, "refiner": 1, "head_norm": 1}
HEAD_NORMS = (
    "single_transformer_blocks.0.attn.norm_q.weight",
    "single_blocks.0.q_norm.weight",
    *(f"single_blocks.0.norm.query_norm.{suffix}" for suffix in NORM),
)
LAYOUTS = {
    "original": ("double_blocks", "single_blocks", "guidance_in."),
    "diffusers": ("transformer_blocks", "single_transformer_blocks", "time_text_embed.guidance_embedder."),
}
"""Of each layout the lists of blocks, and what the keys of the guidance's embedding begin with."""

NEIGHBOURS = {
    "clean_x_embedder.proj.weight": "FramePack",
}
"""By keys that only they have."""
BY_CHANNELS = {33: "HunyuanVideo I2V", 32: "SkyReels-V1 I2V"}
"""By the channels that they take."""


def reject(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """Which other model of this architecture it is: by a key that only it has, or by its channels."""
    if kind := neighbour(NEIGHBOURS, shapes):
        return kind
    layout = next(name for name, keys in LANDMARKS.items() if keys["output"] in shapes)
    patch, output = (shapes[LANDMARKS[layout][fact]] for fact in ("video", "output"))
    if len(patch) < 3 or patch[2:] != PATCH:
        return f"a HunyuanVideo whose tokens are patches of {patch[2:]}"
    channels = patch[1], output[0] // (PATCH[1] * PATCH[2])
    if channels == (CHANNELS, CHANNELS):
        return None
    taken, predicted = channels
    return BY_CHANNELS.get(taken, f"a HunyuanVideo that takes {taken} channels and predicts {predicted}")


def derive_config(layout: str, shapes: Shapes, declared: Config) -> dict[str, Any]:
    """Arguments of HunyuanVideoTransformer3DModel from the shapes; `declared` (config.json) gives what shapes cannot.

    That is rope_axes_dim (see `rotary_axes`). Raises `UserError` for a folder of an image-to-video model, whose
    weights have the same shapes.
    """
    head_norm = next((key for key in HEAD_NORMS if key in shapes), None)
    if head_norm is None:
        raise UserError(f"The HunyuanVideo model has no {HEAD_NORMS[0]}.", "Is it a complete model?")
    shape = landmark_shapes("HunyuanVideo", shapes, {**LANDMARKS[layout], "head_norm": head_norm}, DIMS)
    if declared.get("image_condition_type") is not None:
        raise UserError(
            f"config.json says image_condition_type = {declared['image_condition_type']!r}: a model that is given a "
            "picture, which is not served.",
            "Choose a text-to-video model.",
        )
    (hidden, channels, *_), (head_dim,) = shape["video"], shape["head_norm"]
    double, single, guidance = LAYOUTS[layout]
    features = shape["single"][0] - (3 * hidden if layout == "original" else 0)
    return {
        "in_channels": channels,
        "out_channels": count_channels(shape["output"][0], PATCH[1]),
        "num_attention_heads": count_heads(hidden, head_dim),
        "attention_head_dim": head_dim,
        "num_layers": count_blocks(shapes, double),
        "num_single_layers": count_blocks(shapes, single),
        "num_refiner_layers": count_blocks(shapes, LANDMARKS[layout]["refiner"].removesuffix(".0.norm1.weight")),
        "mlp_ratio": features / hidden,
        "patch_size": PATCH[1],
        "patch_size_t": PATCH[0],
        "guidance_embeds": any(key.startswith(guidance) for key in shapes),
        "text_embed_dim": shape["text"][1],
        "pooled_projection_dim": shape["pooled"][1],
        "rope_theta": declared.get("rope_theta", THETA),
        "rope_axes_dim": rotary_axes(head_dim, declared.get("rope_axes_dim")),
    }


THETA = 256.0


def host_config(config: Config) -> dict[str, Any]:
    """Returns the config that ComfyUI's detection gives."""
    return {
        "image_model": "hunyuan_video",
        "in_channels": config["in_channels"],
        "patch_size": list(PATCH),
        "out_channels": config["out_channels"],
        "vec_in_dim": config["pooled_projection_dim"],
        "axes_dim": list(config["rope_axes_dim"]),
        "meanflow": False,
        "context_in_dim": config["text_embed_dim"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "mlp_ratio": config["mlp_ratio"],
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "theta": int(config["rope_theta"]),
        "qkv_bias": True,
        "byt5": False,
        "guidance_embed": config["guidance_embeds"],
        # Of HunyuanVideo 1.5, which ComfyUI builds from the same class.
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
        "meanflow_sum": False,
    }


LORA_NAMES = (
    # diffusion-pipe: the names of the original files behind the prefixes of diffusers.
    LoraName(
        "original",
        r"^((double|single)_blocks|txt_in|img_in|time_in|vector_in|guidance_in|final_layer)\.",
        r"\g<0>",
        like="diffusers",
    ),
)

HUNYUANVIDEO_T2V = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": REFINERS,
    "mlp_ratio": 4.0,
    "patch_size": PATCH[1],
    "patch_size_t": PATCH[0],
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_theta": THETA,
    "rope_axes_dim": (16, 56, 56),
}

HUNYUANVIDEO = FamilySpec(
    name="hunyuanvideo",
    title="HunyuanVideo T2V",
    view="hunyuanvideo:HunyuanVideo",
    class_name="HunyuanVideoTransformer3DModel",
    blocks=(
        BlockList(("transformer_blocks",), "num_layers"),
        BlockList(("single_transformer_blocks",), "num_single_layers"),
    ),
    latents=(LatentSpec(CHANNELS, dims=3, stride=(4, 8, 8), patch=PATCH, scale=0.476986),),
    inputs=(
        Input("tokens", 3, "text tokens", network="context", mask="mask", trimmed=True),
        Input("mask", 2, "a mask of the text tokens", entry="attention_mask", network="attention_mask", required=False),
        Input("pooled", 2, "a pooled vector", entry="pooled_output", network="y"),
    ),
    encoders="Llama 3 8B and CLIP-L",
    guidance=6.0,
    landmarks=LANDMARKS,
    reject=reject,
    rules=tuple(_rules()),
    derive_config=derive_config,
    cuts=CUTS,
    host_config=host_config,
    host_params="comfy.ldm.hunyuan_video.model:HunyuanVideoParams",
    residuals=residuals,
    lora_names=LORA_NAMES,
    teacache={60: (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02)},
    published={"hunyuanvideo-t2v": HUNYUANVIDEO_T2V, "skyreels-v1-t2v": {**HUNYUANVIDEO_T2V, "guidance_embeds": False}},
)
