"""A MODEL of ComfyUI whose weights are in the ranks: the family's own BaseModel around a network without memory.

Sampling settings, latent format and LoRA keys are ComfyUI's; the network itself is on torch's meta device, and what
ComfyUI's samplers ask of it is asked of the ranks.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from types import MethodType
from typing import Any, NoReturn

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from torch import Tensor

from ...parallel_backend.errors import UserError
from ...parallel_backend.families.spec import FamilySpec
from .. import host
from ..handles import ATTACHMENT, POSITIVE, ModelHandle, handle_of
from ..request.network_inputs import one_time
from ..request.weight_patches import changes_of
from ..session.activity import noted
from .copied_weights import keep_readable
from .latent_format import format_of_vae
from .model_checks import check_methods, check_options, check_stepwise, chosen_attention, kernel_line, refuse_calls
from .stepwise import StepwiseModel

META = torch.device("meta")


class Operations(comfy.ops.disable_weight_init):
    """Layers that have their parameters at once, if only on the meta device.

    Where ComfyUI manages memory dynamically (since 2026), its own wait for a file, and LoRA nodes would find no keys.
    """

    class Linear(comfy.ops.disable_weight_init.Linear):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            """Replaces ComfyUI's method, by which it recognises the layers that are to wait."""
            torch.nn.Linear._load_from_state_dict(self, *args, **kwargs)


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

    @noted
    def pre_run(self, *args: Any, **kwargs: Any) -> None:
        """A sampler of ComfyUI starts."""
        check_stepwise(self)
        handle = handle_of(self)
        if line := kernel_line(self, handle.layout):
            host.current().say(line)
        super().pre_run(*args, **kwargs)
        sampling = self.get_model_object("model_sampling")
        changes = changes_of(self.patches)
        self.model.stepwise.begin(handle, changes, sampling.percent_to_sigma, chosen_attention(self))

    def cleanup(self, *args: Any, **kwargs: Any) -> None:
        super().cleanup(*args, **kwargs)
        self.model.stepwise.end()

    def patch_hooks(self, hooks: Any) -> None:
        """Sets the `hooks` of the prompts of later predictions, which may bring LoRAs of their own."""
        of_prompts = self.get_combined_hook_patches(hooks)
        keys = dict.fromkeys((*self.patches, *of_prompts))
        patches = {key: [*self.patches.get(key, ()), *of_prompts.get(key, ())] for key in keys}
        self.model.stepwise.changes = changes_of(patches)
        self.current_hooks = hooks

    def get_key_patches(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_weights()

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> NoReturn:
        """ComfyUI's nodes that spread prompts over GPUs of its own process ask for this since 2026."""
        raise UserError(
            "All ranks compute this model already, so ComfyUI cannot copy it to other GPUs.",
            "Remove the node that does; Parallel Layout says how many GPUs there are and what they share.",
        )


def new_model(handle: ModelHandle) -> RemotePatcher:
    """The MODEL that carries `handle`."""
    config = model_config(handle.spec, handle.config)
    # The ranks convert what they are sent to what they compute in; nothing is to be lost on the way.
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = Operations
    # By such keys of its file the host tells what a model predicts.
    model = config.get_model({mark: torch.empty(0) for mark in handle.config.get("_marks", ())}, device=META)
    if handle.latents[0] != handle.spec.latent:
        model.latent_format = format_of_vae(model.latent_format, handle.latents[0])
    keep_readable(model, handle)
    model.stepwise = StepwiseModel()
    _ask_ranks(model)
    refuse_calls(model.diffusion_model)
    model.memory_required = _no_memory
    model.state_dict_for_saving = _refuse_weights
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


def _ask_ranks(model: Any) -> None:
    """Makes the network of `model` return the ranks' prediction."""
    network = model.diffusion_model
    # Networks that take wrappers around them call `_forward` inside.
    name = "_forward" if hasattr(network, "_forward") else "forward"
    signature = inspect.signature(getattr(network, name))
    latent_name, timestep_name = list(signature.parameters)[:2]

    @noted
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:
        inputs = signature.bind(*args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        options = inputs.pop("transformer_options", {})
        check_options(options)
        check_methods(network, own)
        given, timestep = inputs.pop(latent_name), one_time(inputs.pop(timestep_name))
        latents = [given] if isinstance(given, Tensor) else given
        sides = options.get("cond_or_uncond", (POSITIVE,))
        level, following = _levels(options)
        next_timestep = None
        if following is not None:
            next_timestep = model.model_sampling.timestep(following).float().expand(len(latents[0]))
        predictions = model.stepwise.predict(latents, timestep, inputs, sides, level, next_timestep)
        return predictions[0] if isinstance(given, Tensor) else predictions

    setattr(network, name, MethodType(forward, network))
    own = frozenset(vars(network))


def _levels(options: Mapping[str, Any]) -> tuple[float | None, Tensor | None]:
    """The current noise level, None where no sampler gives it, and the run's next one.

    There is no next one between two levels, where some samplers call the model too.
    """
    sigmas, levels = options.get("sigmas"), options.get("sample_sigmas")
    if sigmas is None:
        return None, None
    if levels is None:
        return float(sigmas[0]), None
    places = (levels[:-1] == sigmas[0].to(levels.device)).nonzero()
    return float(sigmas[0]), levels[places[0, 0] + 1] if len(places) else None


def _no_memory(*args: Any, **kwargs: Any) -> int:
    """What a prediction takes of this process's device: ComfyUI puts as many conditions into one call as fit."""
    return 0


def _refuse_weights(*args: Any, **kwargs: Any) -> NoReturn:
    raise UserError(
        "This model's weights are in the ranks, so they can be neither merged nor saved here.",
        "Merge or save with ComfyUI's own loader, then load the new file with Parallel Loader.",
    )


def model_config(spec: FamilySpec, config: Mapping[str, Any]) -> Any:
    """ComfyUI's description of a model of the family with that diffusers `config`.

    Raises `UserError` where ComfyUI, or this one, has no network for it.
    """
    found = unet_config(spec, config)
    if spec.host_class is None:
        return comfy.model_detection.model_config_from_unet_config(found)
    if not host_knows(spec):
        raise UserError(f"This ComfyUI is older than its network for {spec.title}.", "Update ComfyUI.")
    return getattr(comfy.supported_models, spec.host_class)(found)


def host_knows(spec: FamilySpec) -> bool:
    """Whether this ComfyUI is new enough for models of the family, if any is."""
    return spec.host_class is None or hasattr(comfy.supported_models, spec.host_class)


def unet_config(spec: FamilySpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """The result of this ComfyUI's detection for a model of the family with that diffusers `config`.

    Raises `UserError` for a family that ComfyUI has no network for.
    """
    if spec.host_config is None:
        raise UserError(
            f"ComfyUI has no network for {spec.title}, so its samplers cannot work with this model.",
            "Use a model of another family.",
        )
    said = spec.host_config(config)
    if spec.host_params is None:
        return said
    module, name = spec.host_params.split(":")
    known = inspect.signature(getattr(import_module(module), name)).parameters
    return {key: value for key, value in said.items() if key in known or key == "image_model"}
