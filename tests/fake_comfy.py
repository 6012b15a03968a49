"""Stands in for ComfyUI's modules, as far as the pack's host and its MODEL use them, with an interrupt flag."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class InterruptProcessingException(BaseException):
    """As ComfyUI's: no `except Exception` stops it."""


class ModelPatcher:
    """What the pack calls of ComfyUI's ModelPatcher, and what ComfyUI's memory manager calls of it."""

    def __init__(self, model: Any, load_device: Any, offload_device: Any) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.patches: dict[str, Any] = {}
        self.patches_uuid = 0
        self.object_patches: dict[str, Any] = {}
        self.injections: dict[str, Any] = {}
        self.attachments: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all:
            self.unpatch_model(self.offload_device, unpatch_weights=unpatch_all)
        return self.model

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        """As ComfyUI's, of what is there."""

    def load(self, device_to: Any) -> None:
        """As ComfyUI's, of what is there."""

    def pre_run(self) -> None:
        """As ComfyUI's, of what is there."""

    def cleanup(self) -> None:
        """As ComfyUI's, of what is there."""

    def get_model_object(self, name: str) -> Any:
        return SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)

    def __del__(self) -> None:
        self.detach(unpatch_all=False)


@dataclass
class LoadedModel:
    """An entry of ComfyUI's list of loaded models."""

    model: ModelPatcher
    currently_used: bool = True

    def model_load(self) -> None:
        self.model.load("cpu")


class Flag:
    """ComfyUI's interrupt flag. `throw` ends a prompt where it is set."""

    def __init__(self) -> None:
        self.is_set = False

    def throw(self) -> None:
        if self.is_set:
            self.is_set = False
            raise InterruptProcessingException


def install(monkeypatch: Any) -> Flag:
    """Puts the modules in the place of ComfyUI's for one test, and forgets what the pack has made of others."""
    flag = Flag()
    disable_weight_init = type("disable_weight_init", (), {"Linear": torch.nn.Linear})
    cpu = torch.device("cpu")
    modules: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.cli_args": {"args": SimpleNamespace(multi_user=False)},
        "comfy.k_diffusion": {},
        "comfy.k_diffusion.sampling": {"default_noise_sampler": lambda x, seed: lambda *_: torch.zeros(1)},
        "comfy.lora": {},
        "comfy.model_detection": {},
        "comfy.model_management": {
            "processing_interrupted": lambda: flag.is_set,
            "throw_exception_if_processing_interrupted": flag.throw,
            "InterruptProcessingException": InterruptProcessingException,
            "current_loaded_models": [],
            "LoadedModel": LoadedModel,
            "get_torch_device": lambda: cpu,
            "unet_offload_device": lambda: cpu,
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.ops": {"disable_weight_init": disable_weight_init},
        "comfy.samplers": {},
        "comfy.supported_models": {},
        "comfy.utils": {"ProgressBar": lambda total: SimpleNamespace(update_absolute=lambda *_: flag.throw())},
        "folder_paths": {"folder_names_and_paths": {}, "models_dir": "models"},
        "latent_preview": {"get_previewer": lambda *_: None},
        "server": {"PromptServer": SimpleNamespace(instance=SimpleNamespace(last_node_id=None))},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in modules:
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, sys.modules[name])
    for name in [each for each in sys.modules if each.startswith("paralleldit.nodes.comfyui.")]:
        monkeypatch.delitem(sys.modules, name)
    return flag
