"""A MODEL of ComfyUI whose weights are in the ranks: the family's own BaseModel around a network without memory.

Sampling settings, latent format and LoRA keys are ComfyUI's; the network itself is on torch's meta device.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ..parallel_backend.errors import UserError
from .handles import ATTACHMENT, ModelHandle

META = torch.device("meta")
HANDLED_OPTIONS = ("transformer_options", "disable_cfg1_optimization")
PATCHER_TABLES = ("hook_patches", "additional_models", "injections", "wrappers", "callbacks")


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """Nothing of this model is in the memory of ComfyUI's process, so there is nothing to move, patch or free."""

    def model_size(self, *args: Any, **kwargs: Any) -> int:
        return 1

    def load(self, *args: Any, **kwargs: Any) -> None:
        self.model.model_loaded_weight_memory = self.model_size()
        self.model.current_weight_patches_uuid = self.patches_uuid

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True, *args: Any, **kwargs: Any) -> None:
        super().unpatch_model(None, False)
        if unpatch_weights:
            self.model.model_loaded_weight_memory = 0
            self.model.current_weight_patches_uuid = None

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def model_patches_to(self, device: Any) -> None:
        """Only dtypes are set on patches; there are none on the meta device."""


def new_model(handle: ModelHandle) -> RemotePatcher:
    """The MODEL that carries `handle`."""
    config = comfy.model_detection.model_config_from_unet_config(UNET_CONFIGS[handle.family](handle.config))
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model({}, device=META)
    model.diffusion_model.forward = MethodType(_refuse_stock_sampler, model.diffusion_model)
    patcher = RemotePatcher(
        model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )
    patcher.set_attachments(ATTACHMENT, handle)
    return patcher


def with_handle(patcher: RemotePatcher, handle: ModelHandle) -> RemotePatcher:
    """A MODEL of the same network and patches that carries `handle`."""
    clone = patcher.clone()
    clone.set_attachments(ATTACHMENT, handle)
    return clone


def check_patches(patcher: Any) -> None:
    """Raises `UserError` naming what other nodes have put on the model and a run in the ranks cannot obey."""
    options = patcher.model_options
    found = [
        *(name for name in patcher.object_patches if name != "model_sampling"),
        *(name for name, value in options.items() if value and name not in HANDLED_OPTIONS),
        *_set_names(options["transformer_options"], "transformer_options"),
        *(name for table in PATCHER_TABLES for name in _set_names(getattr(patcher, table, {}), table)),
    ]
    if found:
        raise UserError(
            f"The model carries {', '.join(found)}, which Parallel Sampler cannot send to the ranks.",
            "Remove the nodes between Parallel Loader and Parallel Sampler that set this.",
        )


def patched_shift(patcher: Any) -> float | None:
    """The flow shift that a node such as ModelSamplingFlux has set; None where the model keeps its own."""
    patched = patcher.object_patches.get("model_sampling")
    if patched is None:
        return None
    own = patcher.model.model_sampling
    if _kind(patched) != _kind(own):
        raise UserError(
            f"The model's sampling was replaced by {_kind(patched)}, but the ranks sample this model as {_kind(own)}.",
            "Remove the node that replaced it, or use the one of the model's own kind.",
        )
    if not hasattr(patched, "shift"):
        raise UserError(
            f"The model's sampling was replaced by another {_kind(patched)}, which cannot travel to the ranks.",
            "Remove the node that replaced it.",
        )
    return float(patched.shift)


def _kind(model_sampling: Any) -> str:
    """Prediction type and clock, by the names of ComfyUI's classes for them."""
    names = " + ".join(base.__name__ for base in type(model_sampling).__bases__)
    return f"{names} (multiplier {model_sampling.multiplier:g})" if hasattr(model_sampling, "multiplier") else names


def _set_names(table: dict[Any, Any], path: str) -> list[str]:
    """The places of all that a table of the host, possibly of empty tables, holds."""
    names = []
    for name, value in table.items():
        place = f"{path}.{name}"
        names += _set_names(value, place) if isinstance(value, dict) else [place] * bool(value)
    return names


def _refuse_stock_sampler(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    raise UserError(
        "This model's weights are in the ranks, where ComfyUI's own samplers cannot reach them.",
        "Use Parallel Sampler instead of KSampler.",
    )


def _flux(config: dict[str, Any]) -> dict[str, Any]:
    patch = 2
    head_dim = config["attention_head_dim"]
    return {
        "image_model": "flux",
        "in_channels": config["in_channels"] // patch**2,
        "out_channels": (config.get("out_channels") or config["in_channels"]) // patch**2,
        "patch_size": patch,
        "vec_in_dim": config["pooled_projection_dim"],
        "context_in_dim": config["joint_attention_dim"],
        "hidden_size": config["num_attention_heads"] * head_dim,
        "mlp_ratio": 4.0,
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": config["guidance_embeds"],
    }


def _sd3(config: dict[str, Any]) -> dict[str, Any]:
    head_dim, side = 64, config["pos_embed_max_size"]  # ComfyUI counts the width in heads
    text = {"in_features": config["joint_attention_dim"], "out_features": config["caption_projection_dim"]}
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "patch_size": config["patch_size"],
        "depth": config["num_attention_heads"] * config["attention_head_dim"] // head_dim,
        "num_blocks": config["num_layers"],
        "input_size": None,
        "adm_in_channels": config["pooled_projection_dim"],
        "context_embedder_config": {"target": "torch.nn.Linear", "params": text},
        "num_patches": side**2,
        "pos_embed_max_size": side,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms" if config["qk_norm"] else None,
        "x_block_self_attn_layers": list(config["dual_attention_layers"]),
    }


def _pixart(config: dict[str, Any]) -> dict[str, Any]:
    told_size = config["use_additional_conditions"]
    return {
        "image_model": "pixart_alpha" if told_size else "pixart_sigma",
        "micro_condition": told_size,
        "in_channels": config["in_channels"],
        "patch_size": config["patch_size"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "caption_channels": config["caption_channels"],
        "input_size": config["sample_size"],
        "pe_interpolation": config["interpolation_scale"],
    }


def _hunyuandit(config: dict[str, Any]) -> dict[str, Any]:
    told_size = config["use_style_cond_and_image_meta_size"]
    return {
        "image_model": "hydit1" if told_size else "hydit",
        "size_cond": told_size,
        "use_style_cond": told_size,
        "in_channels": config["in_channels"],
        "patch_size": config["patch_size"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "mlp_ratio": config["mlp_ratio"],
        "text_states_dim": config["cross_attention_dim"],
        "text_states_dim_t5": config["cross_attention_dim_t5"],
        "text_len": config["text_len"],
        "text_len_t5": config["text_len_t5"],
    }


UNET_CONFIGS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "flux": _flux,
    "sd3": _sd3,
    "pixart-alpha": _pixart,
    "pixart-sigma": _pixart,
    "hunyuandit": _hunyuandit,
}
"""Per family: what ComfyUI's detection would say of a model with this diffusers config."""
