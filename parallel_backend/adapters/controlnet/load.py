"""The weights of a ControlNet on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ...files.controlnet import ControlNetInfo, read_controlnet
from ...weights.load import empty_module


def load_controlnet(
    path: str | Path, device: torch.device, dtype: torch.dtype, check_cancelled: Callable[[], None] = lambda: None
) -> tuple[ControlNetInfo, nn.Module]:
    """The module in eval mode, all of it in `dtype`, on the device. `check_cancelled` is called before each tensor is
    read. Raises `UserError` for weights that do not fit."""
    info = read_controlnet(path)
    module = empty_module(info.format.class_name, dict(info.config))
    pieces = info.pieces({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
    weights = {}
    for name, own in pieces.items():
        check_cancelled()
        parts = [info.checkpoint.tensor(piece.key)[piece.start : piece.stop].to(device, dtype) for piece in own]
        weights[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    module.load_state_dict(weights, assign=True)
    return info, module.to(device).eval().requires_grad_(False)
