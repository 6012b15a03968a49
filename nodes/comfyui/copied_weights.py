"""Weights that ComfyUI's ControlNets copy out of a model's network, whose own are on torch's meta device."""

# pyright: reportMissingImports=false
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.lora
from torch import Tensor

from ...parallel_backend.files.originals import read_originals
from ..handles import ModelHandle


def keep_readable(model: Any, handle: ModelHandle) -> None:
    """Makes the modules of the network that its family's spec lists give real weights when they are asked for theirs.

    They are read from the model's file each time, with the patches of the MODEL that samples.
    """
    for name in handle.spec.host_reads:
        module = model.diffusion_model.get_submodule(name)
        module.register_state_dict_post_hook(partial(_fill, model, Path(handle.ref.path), name))


def _fill(
    model: Any, path: Path, name: str, module: Any, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """Puts the file's weights into what `module.state_dict()` returns. Of the whole network only names are asked."""
    if prefix:
        return
    patches = {} if model.current_patcher is None else model.current_patcher.patches
    for key, weight in read_originals(path, name).items():
        place = f"diffusion_model.{name}.{key}"
        own = patches.get(place)
        state[key] = comfy.lora.calculate_weight(own, weight, place) if own else weight
