"""Which patches and options of a MODEL the ranks can obey."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NoReturn

from ...parallel_backend.errors import UserError
from ...parallel_backend.layout.layout import AttentionKernel
from ..handles import OWN_LOADER
from ..layout_choice import LayoutChoice

AFTER_CFG = "sampler_post_cfg_function"
CFG_NORM = "CFGNorm.execute.<locals>.cfg_norm"
"""ComfyUI's function behind the guidance that the ranks know."""
HANDLED_OPTIONS = ("transformer_options", "disable_cfg1_optimization")
PATCHER_TABLES = ("hook_patches", "additional_models", "injections", "wrappers", "callbacks")
NETWORK_OPTIONS = ("patches", "patches_replace", "optimized_attention_override", "rope_options")
"""The entries of `transformer_options` that ComfyUI's networks obey: functions and settings for absent layers."""
KERNEL_CHOICES = re.compile(r"set_model_optimized_attention\.|attention_override_sage|patch_attention_(en|dis)able")
"""Functions by which nodes choose an attention kernel: of ComfyUI's Model Attention Backend, of KJNodes' Sage."""
RANKS_KERNELS: Mapping[str, AttentionKernel] = {
    "attention_pytorch": "sdpa",
    "attention_sage": "sage",
    "attention_flash": "flash2",
}
"""By ComfyUI's functions, the ranks' kernels of the same kind."""


def check_stepwise(patcher: Any) -> None:
    """Raises `UserError` naming what other nodes have put on the model and its layers in the ranks cannot obey."""
    found = [
        *(name for name in patcher.object_patches if name.startswith("diffusion_model.")),
        *_set_names(getattr(patcher, "weight_wrapper_patches", {}), "weight_wrapper_patches"),
        *_set_names(patcher.injections, "injections"),
    ]
    if found:
        raise UserError(
            f"The model carries {', '.join(found)}, which cannot be sent to the ranks.",
            f"Remove the nodes after Parallel Loader that set this, or {OWN_LOADER}",
        )


def check_patches(patcher: Any) -> None:
    """Raises `UserError` naming what other nodes have put on the model and a run in the ranks cannot obey."""
    options = patcher.model_options
    handled = HANDLED_OPTIONS if cfg_norm(patcher) is None else (*HANDLED_OPTIONS, AFTER_CFG)
    found = [
        *(name for name in patcher.object_patches if name != "model_sampling"),
        *(name for name, value in options.items() if value and name not in handled),
        *_set_names(options["transformer_options"], "transformer_options"),
        *(name for table in PATCHER_TABLES for name in _set_names(getattr(patcher, table, {}), table)),
    ]
    if found:
        raise UserError(
            f"The model carries {', '.join(found)}, which Parallel Sampler cannot send to the ranks.",
            "Remove the nodes between Parallel Loader and Parallel Sampler that set this.",
        )


def cfg_norm(patcher: Any) -> float | None:
    """The strength of ComfyUI's CFGNorm, where nothing else works behind the guidance; None otherwise."""
    functions: list[Callable[..., Any]] = patcher.model_options.get(AFTER_CFG) or []
    if [getattr(each, "__qualname__", "") for each in functions] != [CFG_NORM]:
        return None
    strength = inspect.getclosurevars(functions[0]).nonlocals.get("strength")
    return float(strength) if isinstance(strength, int | float) else None


EXPONENTIAL, LINEAR = "ModelSamplingFlux + CONST", "ModelSamplingDiscreteFlow + CONST (multiplier 1)"
SHIFTS = {(EXPONENTIAL, LINEAR): math.log, (LINEAR, EXPONENTIAL): math.exp}
"""Of kinds with the same noise levels and clock, the model's own and the node's: the model's shift for the node's."""


def patched_shift(patcher: Any) -> float | None:
    """The flow shift that a node such as ModelSamplingFlux has set; None where the model keeps its own."""
    patched = patcher.object_patches.get("model_sampling")
    if patched is None:
        return None
    # A sampler of ComfyUI leaves the patched one in the model that all MODELs share, and keeps the model's own aside.
    own = patcher.object_patches_backup.get("model_sampling", patcher.model.model_sampling)
    if (_kind(own), _kind(patched)) in SHIFTS:
        return _converted(patched.shift, SHIFTS[_kind(own), _kind(patched)])
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


def _converted(shift: float, convert: Callable[[float], float]) -> float:
    try:
        return convert(shift)
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"A node sets the flow shift to {shift:g}, at which this model has no noise levels.",
            "Set it to a usual one: 3 of ModelSamplingAuraFlow and of ModelSamplingSD3, 1.15 of ModelSamplingFlux.",
        ) from error


def _kind(model_sampling: Any) -> str:
    """Prediction type and clock, by the names of ComfyUI's classes for them."""
    names = " + ".join(base.__name__ for base in type(model_sampling).__bases__)
    return f"{names} (multiplier {model_sampling.multiplier:g})" if hasattr(model_sampling, "multiplier") else names


def _set_names(table: dict[Any, Any], path: str) -> list[str]:
    """The places of all that a table of the host, possibly of empty tables, holds."""
    names = []
    for name, value in table.items():
        place = f"{path}.{name}"
        names += _set_names(value, place) if isinstance(value, dict) else [place] * bool(_without_kernels(value))
    return names


def _without_kernels(value: Any) -> Any:
    """What is set, unless it is nothing but a choice of an attention kernel."""
    functions = value if isinstance(value, list | tuple) else [value]
    chosen = [KERNEL_CHOICES.search(getattr(each, "__qualname__", "")) for each in functions]
    return None if chosen and all(chosen) else value


def chosen_attention(patcher: Any) -> AttentionKernel:
    """The ranks' kernel of the kind that a node chose; "auto" where none did, or where they have none of that kind."""
    for each in _kernel_choices(patcher):
        if kernel := _kernel_of(inspect.unwrap(each)):
            return kernel
    return "auto"


def kernel_line(patcher: Any, layout: LayoutChoice | None) -> str | None:
    """A line for the user about the attention kernel that a node chose; None where none did."""
    if not _kernel_choices(patcher):
        return None
    kernel = chosen_attention(patcher)
    if kernel == "auto" or (layout and layout.attention != "auto"):
        return (
            "The attention kernel that a node chose for ComfyUI's own layers is passed over. The ranks use the one of "
            "Parallel Layout: attention (auto, sage, flash3, …)."
        )
    return (
        f"A node chose an attention kernel: where {kernel} works on the ranks, they use it, else attention=auto of "
        "Parallel Layout (the ranks' log says why)."
    )


def _kernel_choices(patcher: Any) -> list[Any]:
    """The functions on the model by which nodes choose an attention kernel."""
    tables = getattr(patcher, "callbacks", {}).values()
    functions = [each for table in tables for listed in table.values() for each in listed]
    functions.append(patcher.model_options["transformer_options"].get("optimized_attention_override"))
    return [each for each in functions if KERNEL_CHOICES.search(getattr(each, "__qualname__", ""))]


def _kernel_of(choice: Any) -> AttentionKernel | None:
    """Of a function by which a node chooses: the ranks' kernel of that kind, if there is one."""
    holds = inspect.getclosurevars(choice).nonlocals
    if "attention_override_sage" in choice.__qualname__:
        return "sage"
    if "patch_attention_enable" in choice.__qualname__:
        return "sage" if holds.get("sage_attention", "disabled") != "disabled" else None
    return RANKS_KERNELS.get(getattr(holds.get("optimized_attention"), "__name__", ""))


def check_methods(network: Any, own: Collection[str]) -> None:
    """Raises `UserError` for methods that a node has put on `network`, beside its `own` attributes.

    Step caches and the like replace what a network calls inside: nothing calls it, as the layers are in the ranks.
    """
    replaced = [name for name in vars(network) if name not in own and callable(getattr(type(network), name, None))]
    if replaced:
        raise UserError(
            f"A node has replaced {', '.join(replaced)} of the network, which would do nothing: its layers are in the "
            "ranks.",
            f"Remove the node that does (a step cache such as TeaCache, or a patch of attention), or {OWN_LOADER}",
        )


def refuse_calls(network: Any) -> None:
    """Makes the layers of `network`, which have no weights here, raise `UserError` when a node computes with them."""
    for name, layer in network.named_children():
        if next(layer.parameters(), None) is not None:
            layer.register_forward_pre_hook(partial(_refuse_call, name))


def _refuse_call(name: str, *_: Any) -> NoReturn:
    raise UserError(
        f"A node computes with {name} of the model, whose weights are in the ranks.",
        f"Remove it (a ControlNet that borrows layers of the model, such as Fun for Qwen-Image), or {OWN_LOADER}",
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Raises `UserError` naming what changes layers of the network."""
    found = [name for key in NETWORK_OPTIONS for name in _set_names({key: options.get(key)}, "transformer_options")]
    if found:
        raise UserError(
            f"The model carries {', '.join(found)}: changes to layers, which are in the ranks.",
            f"Remove the node that sets this, or {OWN_LOADER}",
        )
