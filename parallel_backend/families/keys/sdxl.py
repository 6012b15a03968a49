"""Stable Diffusion XL and its refiner: what their files look like, and the original names of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ...errors import UserError
from ...layout.capabilities import ROWS_ALONE
from ...layout.stages import BlockList
from ..spec import Config, FamilySpec, Input, LatentSpec, LoraName, Rule, Shapes, count_blocks
from .layers import embedder
from .shapes import neighbour

CHANNELS = 4
LAYERS = 2
"""Residual blocks of a level on the way down; on the way up there is one more."""
LEVELS = 4
"""The most levels of a model; all but the last end with half of their rows and columns."""
DEPTH = 10
"""The most transformer blocks of one attention."""
HEAD_DIM = 64
NORM_GROUPS = 32
NUMBER_WIDTH = 256
"""Of the embedding of one number that the model is told."""
V_PREDICTION, ZERO_TERMINAL = "v_pred", "ztsnr"
"""Keys beside the weights of models that predict the velocity, and of those among them that begin at pure noise."""

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = (
    "norm",
    "proj_in",
    "proj_out",
    *(
        f"transformer_blocks.{number}.{layer}"
        for number in range(DEPTH)
        for layer in (
            *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
            *(f"attn{which}.to_{part}" for which in (1, 2) for part in ("q", "k", "v", "out.0")),
        )
    ),
)


def _resnet(source: str, target: str) -> Iterator[Rule]:
    yield from (Rule(f"{source}.{old}", (f"{target}.{new}",)) for old, new in RESNET.items())


def _attention(source: str, target: str) -> Iterator[Rule]:
    yield from (Rule(f"{source}.{layer}", (f"{target}.{layer}",)) for layer in ATTENTION)


def _rules() -> Iterator[Rule]:
    yield Rule("input_blocks.0.0", ("conv_in",))
    for source, target in (("time_embed", "time_embedding"), ("label_emb.0", "add_embedding")):
        yield from embedder(source, target)
    for level in range(LEVELS):
        down, up = 1 + level * (LAYERS + 1), level * (LAYERS + 1)
        for layer in range(LAYERS):
            yield from _resnet(f"input_blocks.{down + layer}.0", f"down_blocks.{level}.resnets.{layer}")
            yield from _attention(f"input_blocks.{down + layer}.1", f"down_blocks.{level}.attentions.{layer}")
        yield Rule(f"input_blocks.{down + LAYERS}.0.op", (f"down_blocks.{level}.downsamplers.0.conv",))
        for layer in range(LAYERS + 1):
            yield from _resnet(f"output_blocks.{up + layer}.0", f"up_blocks.{level}.resnets.{layer}")
            yield from _attention(f"output_blocks.{up + layer}.1", f"up_blocks.{level}.attentions.{layer}")
        # It stands behind the attention, where there is one.
        for place in (2, 1):
            yield Rule(f"output_blocks.{up + LAYERS}.{place}.conv", (f"up_blocks.{level}.upsamplers.0.conv",))
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    yield Rule("out.0", ("conv_norm_out",))
    yield Rule("out.2", ("conv_out",))


RULES = tuple(_rules())
RENAMED = {f"{rule.source}.weight": f"{target}.weight" for rule in RULES for target in rule.targets}

LANDMARKS = {
    "original": {"input": "input_blocks.0.0.weight", "added": "label_emb.0.0.weight", "output": "out.2.weight"},
    "diffusers": {"input": "conv_in.weight", "added": "add_embedding.linear_1.weight", "output": "conv_out.weight"},
}
FOURTH_LEVEL = {"original": "input_blocks.10.0.in_layers.0.weight", "diffusers": "down_blocks.3.resnets.0.norm1.weight"}
REFINER_LANDMARKS = {layout: {**keys, "level": FOURTH_LEVEL[layout]} for layout, keys in LANDMARKS.items()}

NEIGHBOURS = {
    "input_blocks.1.0.time_stack.in_layers.0.weight": "Stable Video Diffusion",
    "down_blocks.0.attentions.0.norm.weight": "a Stable Diffusion 2 that takes a picture as its prompt",
    "edm_mean": "Playground 2.5",
    "edm_vpred.sigma_max": "an SDXL of continuous noise levels",
}
"""By keys that only they have, weights as diffusers names them."""
MARKS = (V_PREDICTION, ZERO_TERMINAL, "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""Keys that stand beside a model's in its file."""
OF_CHANNELS = {8: "an SDXL that edits pictures", 9: "an SDXL for inpainting"}
"""By how many channels they take."""
DISTILLED = "an SDXL with fewer blocks (SSD-1B, Segmind Vega, KOALA)"


def reject(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """Which other model of this architecture it is."""
    shapes = _named(shapes)
    if kind := neighbour(NEIGHBOURS, shapes):
        return kind
    channels = _shape(shapes, "conv_in.weight", 4)[1]
    if channels != CHANNELS:
        return OF_CHANNELS.get(channels, f"an SDXL that takes {channels} channels")
    depths = _depths(shapes)
    middle = count_blocks(shapes, f"{MIDDLE}.transformer_blocks")
    is_whole = all(len(set(each)) == 1 for each in depths) and middle and middle == (depths[-1][0] or middle)
    is_left = any(key.startswith(("input_blocks.", "output_blocks.")) for key in shapes)
    return None if is_whole and not is_left else DISTILLED


MIDDLE = "mid_block.attentions.0"


def _named(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Of weights by their names in diffusers, whatever the layout."""
    return {RENAMED.get(key, key): shape for key, shape in shapes.items() if not key.endswith(".bias")}


def _shape(shapes: Shapes, key: str, dims: int) -> tuple[int, ...]:
    """Raises `UserError` for a tensor that is missing, or of other than `dims`."""
    shape = shapes.get(key, ())
    if len(shape) != dims or not all(shape):
        raise UserError(f"The tensors of this U-Net have unexpected shapes: {key} {list(shape)}, not of {dims} dims.")
    return shape


def _depths(shapes: Shapes) -> list[list[int]]:
    """How many transformer blocks each attention of each level has, on both ways; `shapes` as `_named`."""
    levels = count_blocks(shapes, "down_blocks")
    return [
        [
            count_blocks(shapes, f"{way}_blocks.{place}.attentions.{layer}.transformer_blocks")
            for way, place, layers in (("down", level, LAYERS), ("up", levels - 1 - level, LAYERS + 1))
            for layer in range(layers)
        ]
        for level in range(levels)
    ]


def derive_config(layout: str, shapes: Shapes, declared: Config) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel from the shapes; `declared` (config.json) tells what shapes cannot.

    That is the number of heads (of 64 channels each, if not declared), the groups of norms, and how many transformer
    blocks a level without attention would have. `_marks`: which marks of a kind of prediction the file has, or what its
    pipeline's scheduler says of it.
    """
    named = _named(shapes)
    depths = [first for first, *_ in _depths(named)]
    widths = tuple(_shape(named, f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(len(depths)))
    return {
        "in_channels": _shape(named, "conv_in.weight", 4)[1],
        "out_channels": _shape(named, "conv_out.weight", 4)[0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        "block_out_channels": widths,
        "layers_per_block": LAYERS,
        "transformer_layers_per_block": _layers(named, depths, declared.get("transformer_layers_per_block")),
        "attention_head_dim": _heads(widths, depths, declared.get("attention_head_dim")),
        "norm_num_groups": declared.get("norm_num_groups", NORM_GROUPS),
        "cross_attention_dim": _shape(named, f"{MIDDLE}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "use_linear_projection": len(named.get(f"{MIDDLE}.proj_in.weight", ())) == 2,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": declared.get("addition_time_embed_dim", NUMBER_WIDTH),
        "projection_class_embeddings_input_dim": _shape(named, "add_embedding.linear_1.weight", 2)[1],
        "_marks": _marks(shapes, declared.get("_scheduler", {})),
    }


def _marks(shapes: Shapes, scheduler: Config) -> tuple[str, ...]:
    """Those that the file has, or would have if it were made of a pipeline with such a scheduler.

    Raises `UserError` for a scheduler of a kind of model that is not served.
    """
    kind, name = scheduler.get("prediction_type", "epsilon"), scheduler.get("_class_name", "")
    if kind not in ("epsilon", "v_prediction") or str(name).startswith("EDM"):
        raise UserError(
            f"scheduler_config.json says {name} and prediction_type={kind!r}, which is not served for SDXL.",
            "Take a model that predicts the noise or the velocity, at discrete noise levels.",
        )
    predicts_velocity = V_PREDICTION in shapes or kind == "v_prediction"
    ends_at_noise = ZERO_TERMINAL in shapes or scheduler.get("rescale_betas_zero_snr") is True
    return (V_PREDICTION, *[ZERO_TERMINAL] * ends_at_noise) if predicts_velocity else ()


def _layers(shapes: Shapes, depths: Sequence[int], declared: Any) -> int | tuple[int, ...]:
    """The transformer blocks of each level: as declared, where that is true of those with attention.

    The middle has as many as the last level, or would have.
    """
    middle = count_blocks(shapes, f"{MIDDLE}.transformer_blocks")
    found = [*depths[:-1], middle]
    said = [declared] * len(found) if isinstance(declared, int) else declared
    if not isinstance(said, list | tuple) or len(said) != len(found):
        said = found
    if all(depth in (0, own) for depth, own in zip(found, said, strict=True)):
        return declared if isinstance(declared, int) else tuple(own or 1 for own in said)
    return tuple(depth or 1 for depth in found)


def _heads(widths: Sequence[int], depths: Sequence[int], declared: Any) -> int | tuple[int, ...]:
    """The heads of each level, which diffusers calls their dim. Raises `UserError` for those that do not fit."""
    heads = tuple(declared) if isinstance(declared, list) else declared or tuple(width // HEAD_DIM for width in widths)
    of_levels = heads if isinstance(heads, tuple) else (heads,) * len(widths)
    has_attention = [*map(bool, depths[:-1]), True]
    fits = len(of_levels) == len(widths) and all(
        not attends or (type(own) is int and own > 0 and width % own == 0)
        for own, width, attends in zip(of_levels, widths, has_attention, strict=True)
    )
    if not fits:
        raise UserError(f"The widths {widths} of the levels do not fit {heads} heads.")
    return heads


def depths_of(config: Config) -> list[int]:
    """How many transformer blocks the attentions of each level have, and those of the middle."""
    types, layers = config["down_block_types"], config["transformer_layers_per_block"]
    of_levels = [layers] * len(types) if isinstance(layers, int) else list(layers)
    return [depth if kind.startswith("Cross") else 0 for kind, depth in zip(types, of_levels, strict=True)] + [
        of_levels[-1]
    ]


def host_config(config: Config) -> dict[str, Any]:
    """As ComfyUI's detection says it."""
    widths, (*depths, middle) = config["block_out_channels"], depths_of(config)
    return {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "num_classes": "sequential",
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "num_res_blocks": [LAYERS] * len(widths),
        "transformer_depth": [depth for depth in depths for _ in range(LAYERS)],
        "transformer_depth_output": [depth for depth in depths for _ in range(LAYERS + 1)],
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth_middle": middle,
        "use_linear_in_transformer": config["use_linear_projection"],
        "context_dim": config["cross_attention_dim"],
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }


def _count(config: Config, level: int, upwards: bool) -> int:
    """Of the transformer blocks of one attention."""
    depths = depths_of(config)[:-1]
    return (depths[::-1] if upwards else depths)[level] if level < len(depths) else 0


BLOCKS = (
    *(
        BlockList(
            (f"down_blocks.{level}.attentions.{layer}.transformer_blocks",), partial(_count, level=level, upwards=False)
        )
        for level in range(LEVELS)
        for layer in range(LAYERS)
    ),
    BlockList((f"{MIDDLE}.transformer_blocks",), lambda config: depths_of(config)[-1]),
    *(
        BlockList(
            (f"up_blocks.{level}.attentions.{layer}.transformer_blocks",), partial(_count, level=level, upwards=True)
        )
        for level in range(LEVELS)
        for layer in range(LAYERS + 1)
    ),
)
"""The transformer blocks, which hold nine tenths of the weights."""

LORA_NAMES = (
    LoraName("diffusers", r"^add_embedding\.(linear_[12])$", r"class_embedding.\1"),
    LoraName("diffusers", r"(attn[12])\.to_([qkv])$", r"\1.processor.to_\2"),
    LoraName("diffusers", r"(attn[12])\.to_out\.0$", r"\1.processor.to_out"),
)
"""ComfyUI's of the embedding, and those of early diffusers, which kept layers of LoRAs in attention's processors."""

BASE = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": LAYERS,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "norm_num_groups": NORM_GROUPS,
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": NUMBER_WIDTH,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    **BASE,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (384, 768, 1536, 1536),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}


def _family(name: str, title: str, encoders: str, **own: Any) -> FamilySpec:
    return FamilySpec(
        name=name,
        title=title,
        class_name="UNet2DConditionModel",
        blocks=BLOCKS,
        latents=(LatentSpec(CHANNELS, patch=(1, 1, 1), scale=0.13025),),
        inputs=(
            Input("tokens", 3, "text tokens", network="context"),
            # ComfyUI gives its network the embedded sizes with it.
            Input("pooled", 2, "a pooled vector", entry="pooled_output", network="y"),
        ),
        encoders=encoders,
        reject=reject,
        rules=RULES,
        derive_config=derive_config,
        marks=MARKS,
        heads={},
        host_config=host_config,
        lora_names=LORA_NAMES,
        can=ROWS_ALONE,
        **own,
    )


SDXL = _family(
    "sdxl",
    "Stable Diffusion XL",
    "CLIP-L and OpenCLIP bigG",
    view="sdxl:SDXL",
    landmarks=LANDMARKS,
    host_class="SDXL",
    published={"sdxl": BASE},
)
SDXL_REFINER = _family(
    "sdxl-refiner",
    "Stable Diffusion XL refiner",
    "OpenCLIP bigG",
    view="sdxl:SDXLRefiner",
    landmarks=REFINER_LANDMARKS,
    host_class="SDXLRefiner",
    aesthetic_scores={"positive": 6.0, "negative": 2.5},
    published={"sdxl-refiner": REFINER},
)
"""Before the base model in the registry, whose landmarks it has, too."""
