"""The ranks' memory as ComfyUI's memory management sees it."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch

from .remote_model import RemotePatcher


class RanksMemory(RemotePatcher):
    """Stands for all that the ranks hold, among the models that ComfyUI has loaded and may unload."""

    def __init__(self, unload: Callable[[], None]) -> None:
        super().__init__(
            torch.nn.Module(),
            comfy.model_management.get_torch_device(),
            comfy.model_management.unet_offload_device(),
        )
        self._unload = unload

    @property
    def entry(self) -> Any:
        """Its entry in ComfyUI's list of loaded models, at whose end it is put where it is missing."""
        loaded = comfy.model_management.current_loaded_models
        mine = comfy.model_management.LoadedModel(self)
        if mine not in loaded:
            mine.model_load()
            loaded.append(mine)
        return loaded[loaded.index(mine)]

    def detach(self, unpatch_all: bool = True, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI unloads it: a user has asked for that, or another model needs the room."""
        model = super().detach(unpatch_all, *args, **kwargs)
        if unpatch_all:
            self._unload()
        return model
