"""ControlNets in diffusers' layout, as single files or folders: their class and config, and the weights on a device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .checkpoint import Checkpoint, open_checkpoint
from .flux_keys import FLUX
from .keymap import Shapes, count_blocks
from .load import empty_module
from .sd3_keys import SD3

COMPONENT = "controlnet"
CONFIG = "config.json"


@dataclass(frozen=True)
class ControlNetInfo:
    """A ControlNet for models of `family`: `config` are the arguments of the diffusers class `class_name`."""

    checkpoint: Checkpoint
    family: str
    class_name: str
    config: Mapping[str, Any]

    @property
    def modes(self) -> int:
        """How many kinds of control picture a union ControlNet tells apart; 0 for one of a single kind."""
        return self.config.get("num_mode") or 0


def read_controlnet(path: str | Path) -> ControlNetInfo:
    """What a file or folder holds, from its header and the config beside it. Raises `UserError` for anything else."""
    checkpoint = open_checkpoint(path, COMPONENT)
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    declared = checkpoint.config or _config_beside(Path(path))
    for is_one, derive in (
        ("controlnet_x_embedder.weight" in shapes, _flux),
        ("pos_embed_input.proj.weight" in shapes, _sd3),
        ("input_block.weight" in shapes and "time_extra_emb.timestep_embedder.linear_1.weight" in shapes, _hunyuandit),
    ):
        if is_one:
            try:
                family, class_name, config = derive(shapes, declared)
            except UserError as error:
                raise UserError(f"{checkpoint.source}: {error.message}", error.hint) from error
            return ControlNetInfo(checkpoint, family, class_name, config)
    raise UserError(
        f"{checkpoint.source} holds no ControlNet that is known: its {len(shapes)} tensors begin with "
        f"{', '.join(sorted(shapes)[:3])}.",
        "Choose a ControlNet for Flux.1, Stable Diffusion 3 or HunyuanDiT in the diffusers layout.",
    )


def load_controlnet(path: str | Path, device: torch.device, dtype: torch.dtype) -> tuple[ControlNetInfo, nn.Module]:
    """The module in eval mode, all of it in `dtype`, on the device. Raises `UserError` for weights that do not fit."""
    info = read_controlnet(path)
    module = empty_module(info.class_name, dict(info.config))
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {key: each.shape for key, each in info.checkpoint.tensors.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise UserError(
            f"{info.checkpoint.source}: {len(wrong)} tensors do not fit a {info.class_name}, such as {wrong[0]}: "
            f"{found.get(wrong[0], 'missing')}, expected {expected.get(wrong[0], 'none')}.",
            "Is it a complete ControlNet, with its own config.json?",
        )
    weights = {key: info.checkpoint.tensor(key).to(device, dtype) for key in expected}
    module.load_state_dict(weights, assign=True)
    return info, module.to(device).eval().requires_grad_(False)


def _config_beside(path: Path) -> dict[str, Any]:
    file = path.parent / CONFIG
    if not path.is_file() or not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON.", "Download or copy it again.") from error
    return config if isinstance(config, dict) else {}


def _flux(shapes: Shapes, declared: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    if any(key.startswith("input_hint_block.") for key in shapes):
        raise UserError(
            "It takes the control picture's pixels (XLabs), which is not read yet.",
            "Use a ControlNet that takes its latent, such as those of InstantX or Shakker Labs.",
        )
    hidden, channels = shapes["x_embedder.weight"]
    # A ControlNet has no last layer, and perhaps no single blocks.
    missing = {
        "proj_out.weight": (channels, hidden),
        "single_transformer_blocks.0.proj_mlp.weight": (4 * hidden, hidden),
    }
    config = FLUX.derive_config("diffusers", {**missing, **shapes}, declared)
    del config["out_channels"]
    config["num_single_layers"] = count_blocks(shapes, "single_transformer_blocks")
    modes = shapes.get("controlnet_mode_embedder.weight")
    return "flux", "FluxControlNetModel", config | {"num_mode": modes[0] if modes else None}


def _sd3(shapes: Shapes, declared: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    if "context_embedder.weight" not in shapes or "pos_embed.proj.weight" not in shapes:
        raise UserError(
            "It has no text or no positions of its own (Stability's for 3.5 Large), which is not read yet.",
            "Use a ControlNet that has both, such as those of InstantX.",
        )
    hidden, channels, patch, _ = shapes["pos_embed.proj.weight"]
    config = SD3.derive_config("diffusers", {"proj_out.weight": (channels * patch**2, hidden), **shapes}, declared)
    extra = shapes["pos_embed_input.proj.weight"][1] - channels
    if extra:
        raise UserError(
            f"It takes {extra} channels beside the control picture's latent (inpainting), which is not read yet.",
            "Use a ControlNet that takes a control picture alone.",
        )
    zeros = declared.get("force_zeros_for_pooled_projection", True)
    return "sd3", "SD3ControlNetModel", config | {"force_zeros_for_pooled_projection": zeros}


def _hunyuandit(shapes: Shapes, declared: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    name = "HunyuanDiT2DControlNetModel"
    if declared.get("_class_name") != name:
        raise UserError(
            f"A HunyuanDiT ControlNet needs its config.json, which names the class {name}.",
            "Put it beside the weights, as diffusers does.",
        )
    return "hunyuandit", name, {key: value for key, value in declared.items() if not key.startswith("_")}
