"""ControlNets, as single files or folders: which one a file holds, and how its keys are called. Reads headers only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..families.keys.flux import FLUX
from ..families.keys.hunyuandit import HUNYUANDIT
from ..families.keys.sd3 import HEAD_DIM, SD3
from ..families.spec import FamilySpec, Rule, Shapes, count_blocks
from .checkpoint import Checkpoint, open_checkpoint
from .key_map import Piece, ruled_map
from .recognise import refuse_others
from .regular import open_regular

COMPONENT = "controlnet"
CONFIG = "config.json"
TYPE = "control_type"
"""The key under which Stability's files store the kind of picture that they take."""

UNUSED_EMBEDDER = ("pos_embed.proj.weight", "pos_embed.proj.bias")
"""Of Stability's for 3.5 Large: its network has an embedder of its own, but its code gives it the latent as the model
embeds it, with the model's table of positions, and so do diffusers' pipelines."""

XLABS_RULES = (
    *FLUX.rules,
    Rule("pos_embed_input", ("controlnet_x_embedder",)),
    # Between its convolutions, the original counts activations too.
    Rule("input_hint_block.0", ("input_hint_block.conv_in",)),
    *(Rule(f"input_hint_block.{2 + 2 * block}", (f"input_hint_block.blocks.{block}",)) for block in range(6)),
    Rule("input_hint_block.14", ("input_hint_block.conv_out",)),
)
STABILITY_RULES = (
    Rule("transformer_blocks.{i}.adaLN_modulation.1", ("transformer_blocks.{i}.norm1.linear",)),
    Rule("transformer_blocks.{i}.attn.qkv", tuple(f"transformer_blocks.{{i}}.attn.to_{part}" for part in "qkv")),
    Rule("transformer_blocks.{i}.attn.proj", ("transformer_blocks.{i}.attn.to_out.0",)),
    Rule("transformer_blocks.{i}.mlp.fc1", ("transformer_blocks.{i}.ff.net.0.proj",)),
    Rule("transformer_blocks.{i}.mlp.fc2", ("transformer_blocks.{i}.ff.net.2",)),
)
TENCENT_RULES = (
    *HUNYUANDIT.rules,
    Rule("before_proj", ("input_block",)),
    Rule("after_proj_list.{i}", ("controlnet_blocks.{i}",)),
)

Derive = Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]
"""Maps a file's shapes and its declared config to the arguments of the diffusers class."""


@dataclass(frozen=True)
class Format:
    """How a kind of ControlNet is written: the keys that only it has together, and `rules` to diffusers' names.

    `not_weights`: keys that the module does not need.
    """

    kind: str
    class_name: str
    landmarks: tuple[str, ...]
    derive: Derive
    rules: tuple[Rule, ...] = ()
    not_weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class ControlNetInfo:
    """A ControlNet for models of `family`, of which there may be several kinds.

    `config`: the arguments of the diffusers class.
    """

    checkpoint: Checkpoint
    format: Format
    config: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.format.kind

    @property
    def family(self) -> str:
        return self.kind.split()[0]

    @property
    def name(self) -> str:
        return self.checkpoint.source.name

    @property
    def modes(self) -> int:
        """How many kinds of control picture a union ControlNet distinguishes; 0 for one of a single kind."""
        return self.config.get("num_mode") or 0

    @property
    def takes_pixels(self) -> bool:
        """Whether it takes the control picture itself, not its latent."""
        return bool(self.config.get("conditioning_embedding_channels"))

    @property
    def picture_type(self) -> int | None:
        """The number of the kind of control picture, where a file stores one (0 blurred, 1 edges, 2 depth)."""
        found = self.checkpoint.tensors.get(TYPE)
        return None if found is None else round(float(self.checkpoint.tensor(TYPE).reshape(-1)[0]))

    def pieces(self, expected: Shapes) -> dict[str, list[Piece]]:
        """The pieces of the file that make each parameter in `expected` (diffusers names). Raises `UserError` if keys
        do not fit."""
        shapes = {key: info.shape for key, info in self.checkpoint.tensors.items()}
        own = {key: shape for key, shape in shapes.items() if key not in self.format.not_weights}
        try:
            pieces = ruled_map(self.format.rules, own, expected)
        except UserError as error:
            raise UserError(
                f"{self.checkpoint.source}: {error.message}", "Is it a complete ControlNet, with its own config.json?"
            ) from error
        if any(piece.companions for own in pieces.values() for piece in own):
            raise UserError(f"{self.checkpoint.source} holds scaled fp8 weights.", "Use the file in 16 bits.")
        return pieces


def read_controlnet(path: str | Path) -> ControlNetInfo:
    """Describes a ControlNet's file or folder, from header and config.json. Raises `UserError` for any other file."""
    checkpoint = open_checkpoint(path, COMPONENT)
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    declared = checkpoint.config or _config_beside(Path(path))
    for row in FORMATS:
        if all(key in shapes for key in row.landmarks):
            try:
                return ControlNetInfo(checkpoint, row, row.derive(shapes, declared))
            except UserError as error:
                raise UserError(f"{checkpoint.source}: {error.message}", error.hint) from error
    refuse_others(checkpoint, "a ControlNet")
    raise UserError(
        f"{checkpoint.source} holds no ControlNet that is known: its {len(shapes)} tensors begin with "
        f"{', '.join(sorted(shapes)[:3])}.",
        "Choose a ControlNet for Flux.1, Stable Diffusion 3 or 3.5, or HunyuanDiT.",
    )


def _config_beside(path: Path) -> dict[str, Any]:
    file = path.parent / CONFIG
    if not path.is_file() or not file.is_file():
        return {}
    try:
        with open_regular(file) as opened:
            config = json.loads(opened.read())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON.", "Download or copy it again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object.", "Download or copy it again.")
    return config


def _derived(
    row: FamilySpec, layout: str, absent: Mapping[str, tuple[int, ...]], shapes: Shapes, declared: Mapping[str, Any]
) -> dict[str, Any]:
    """The config of a model of the same widths. `absent`: the shapes of tensors that only a model has, and that its
    config needs."""
    missing = [key for key in row.landmarks[layout].values() if key not in shapes and key not in absent]
    if missing:
        raise UserError(f"It has no {missing[0]}.", "Is it a complete ControlNet?")
    return row.derive_config(layout, {**absent, **shapes}, declared)


def _flux(shapes: Shapes, declared: Mapping[str, Any]) -> dict[str, Any]:
    hidden, channels = shapes.get("x_embedder.weight", (0, 0))
    absent = {
        "proj_out.weight": (channels, hidden),
        "single_transformer_blocks.0.proj_mlp.weight": (4 * hidden, hidden),
    }
    config = _derived(FLUX, "diffusers", absent, shapes, declared)
    modes, hint = (
        shapes[key][0] if key in shapes else None
        for key in ("controlnet_mode_embedder.weight", "input_hint_block.conv_out.weight")
    )
    return _flux_config(config, shapes, "single_transformer_blocks", modes, hint)


def _xlabs(shapes: Shapes, declared: Mapping[str, Any]) -> dict[str, Any]:
    hidden, channels = shapes.get("img_in.weight", (0, 0))
    absent = {"final_layer.linear.weight": (channels, hidden), "single_blocks.0.linear1.weight": (7 * hidden, hidden)}
    config = _derived(FLUX, "original", absent, shapes, declared)
    return _flux_config(config, shapes, "single_blocks", None, shapes["input_hint_block.14.weight"][0])


def _flux_config(
    config: dict[str, Any], shapes: Shapes, single: str, modes: int | None, hint: int | None
) -> dict[str, Any]:
    del config["out_channels"]
    own = {"num_mode": modes, "conditioning_embedding_channels": hint}
    return config | own | {"num_single_layers": count_blocks(shapes, single)}


def _mistoline(shapes: Shapes, declared: Mapping[str, Any]) -> dict[str, Any]:
    raise UserError(
        "It is Mistoline's for Flux.1, which is not read.", "Use one of XLabs, InstantX or Shakker Labs for edges."
    )


def _sd3(shapes: Shapes, declared: Mapping[str, Any]) -> dict[str, Any]:
    hidden, channels, patch, _ = shapes.get("pos_embed.proj.weight", (0, 0, 1, 1))
    config = _derived(SD3, "diffusers", {"proj_out.weight": (channels * patch**2, hidden)}, shapes, declared)
    _check_channels(shapes, channels)
    zeros = declared.get("force_zeros_for_pooled_projection", True)
    return config | {"force_zeros_for_pooled_projection": zeros}


def _sd3_image(shapes: Shapes, declared: Mapping[str, Any]) -> dict[str, Any]:
    """Derives the config of Stability's for 3.5 Large: its blocks see no text, it takes the model's embedded tokens."""
    hidden, channels, patch, _ = shapes["pos_embed_input.proj.weight"]
    pooled = shapes.get("time_text_embed.text_embedder.linear_1.weight", (0, 0))[1]
    head_dim = declared.get("attention_head_dim", HEAD_DIM)
    if not hidden or pooled in (0, hidden) or type(head_dim) is not int or head_dim < 1 or hidden % head_dim:
        raise UserError(
            f"Its text vector has the width {pooled}, its tokens {hidden}, its heads {head_dim}: no such ControlNet is "
            "read.",
            "Use one of those for Stable Diffusion 3.5 Large.",
        )
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": count_blocks(shapes, "transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": None,
        "pooled_projection_dim": pooled,
        "pos_embed_type": None,
        "use_pos_embed": False,
        "force_zeros_for_pooled_projection": False,
    }


def _check_channels(shapes: Shapes, channels: int) -> None:
    extra = shapes["pos_embed_input.proj.weight"][1] - channels
    if extra:
        raise UserError(
            f"It takes {extra} channels beside the control picture's latent (inpainting), which is not read yet.",
            "Use a ControlNet that takes a control picture alone.",
        )


def _hunyuandit(layout: str, projection: str, output: str) -> Derive:
    """`projection`: the key of what makes tokens; `output`: of a model's last layer."""

    def derive(shapes: Shapes, declared: Mapping[str, Any]) -> dict[str, Any]:
        hidden, channels, patch, _ = shapes.get(projection, (0, 0, 1, 1))
        # It has the blocks of a model's first half but one, those before the skips turn back.
        count = 2 * (count_blocks(shapes, "blocks") + 1)
        absent = {f"blocks.{number}.norm2.weight": (hidden,) for number in range(count)}
        config = _derived(HUNYUANDIT, layout, absent | {output: (channels * patch**2, hidden)}, shapes, declared)
        del config["learn_sigma"]
        return config | {"transformer_num_layers": config.pop("num_layers")}

    return derive


FORMATS = (
    Format(
        "flux",
        "FluxControlNetModel",
        ("double_blocks.0.img_attn.qkv.weight", "pos_embed_input.weight", "input_hint_block.14.weight"),
        _xlabs,
        XLABS_RULES,
    ),
    Format("flux", "FluxControlNetModel", ("controlnet_blocks.0.linear.weight",), _mistoline),
    Format("flux", "FluxControlNetModel", ("controlnet_x_embedder.weight", "x_embedder.weight"), _flux),
    Format(
        "sd3 image",
        "SD3ControlNetModel",
        ("pos_embed_input.proj.weight", "transformer_blocks.0.adaLN_modulation.1.weight"),
        _sd3_image,
        STABILITY_RULES,
        not_weights=(TYPE, *UNUSED_EMBEDDER),
    ),
    Format("sd3", "SD3ControlNetModel", ("pos_embed_input.proj.weight", "pos_embed.proj.weight"), _sd3),
    Format("sd3 image", "SD3ControlNetModel", ("pos_embed_input.proj.weight",), _sd3_image),
    Format(
        "hunyuandit",
        "HunyuanDiT2DControlNetModel",
        ("before_proj.weight", "after_proj_list.0.weight", "mlp_t5.0.weight"),
        _hunyuandit("original", "x_embedder.proj.weight", "final_layer.linear.weight"),
        TENCENT_RULES,
    ),
    Format(
        "hunyuandit",
        "HunyuanDiT2DControlNetModel",
        ("input_block.weight", "time_extra_emb.timestep_embedder.linear_1.weight"),
        _hunyuandit("diffusers", "pos_embed.proj.weight", "proj_out.weight"),
    ),
)
"""Layouts in the order in which they are tried."""
