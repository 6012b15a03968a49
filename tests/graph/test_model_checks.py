"""What nodes of ComfyUI and of other packs put on a MODEL: obeyed, passed over with a line, or refused by name."""

from __future__ import annotations

import math
from functools import wraps
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from paralleldit.nodes.comfyui import model_checks
from paralleldit.nodes.layout_choice import LayoutChoice
from paralleldit.parallel_backend.errors import UserError


class Patcher:
    """A MODEL, as far as its patches go."""

    def __init__(self, override: Any = None, callbacks: dict[str, Any] | None = None) -> None:
        self.object_patches: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        if override is not None:
            self.model_options["transformer_options"]["optimized_attention_override"] = override
        self.callbacks = callbacks or {}
        self.injections: dict[str, Any] = {}

    def set_model_optimized_attention(self, optimized_attention: Any):
        def optimized_attention_override(_, *args):
            return optimized_attention(*args)

        return optimized_attention_override


def sage():
    def attention_override_sage(func, *args):
        return args

    return attention_override_sage


def in_callbacks(sage_attention: str) -> Any:
    """As KJNodes has it, behind a decorator of torch."""

    def patch_attention_enable(model):
        return sage_attention

    @wraps(patch_attention_enable)
    def uncompiled(*args):
        return patch_attention_enable(*args)

    return uncompiled


def attention_pytorch(): ...


def attention_sage(): ...


def attention_flash(): ...


def attention_comfy_kitchen_int8(): ...


def negative_attention(func, *args):
    """As nodes have it that change what attention computes."""


def backend(function: Any) -> Patcher:
    return Patcher(Patcher().set_model_optimized_attention(function))


CHOICES = {
    "Model Attention Backend": (backend(attention_pytorch), "sdpa"),
    "Model Attention Backend, Sage": (backend(attention_sage), "sage"),
    "Model Attention Backend, flash": (backend(attention_flash), "flash2"),
    "Model Attention Backend, a kernel that ranks have not": (backend(attention_comfy_kitchen_int8), "auto"),
    "KJNodes' Sage": (Patcher(sage()), "sage"),
    "KJNodes' Sage in callbacks": (Patcher(None, {"on_pre_run": {"key": [in_callbacks("auto")]}}), "sage"),
    "KJNodes' Sage, disabled": (Patcher(None, {"on_pre_run": {"key": [in_callbacks("disabled")]}}), "auto"),
}
REFUSED = {
    "another change of attention": Patcher(negative_attention),
    "another callback": Patcher(None, {"on_pre_run": {"key": [negative_attention]}}),
    "a choice beside another change": Patcher(None, {"on_pre_run": {"key": [in_callbacks("auto"), print]}}),
}


@pytest.mark.parametrize(("patcher", "kernel"), CHOICES.values(), ids=CHOICES)
def test_a_choice_of_an_attention_kernel_is_the_ranks_too_or_passed_over_with_a_line(patcher, kernel) -> None:
    model_checks.check_patches(patcher)
    model_checks.check_stepwise(patcher)
    model_checks.check_options(patcher.model_options["transformer_options"])
    assert model_checks.chosen_attention(patcher) == kernel
    passed_over = "passed over. The ranks use the one of Parallel Layout: attention"
    expected = passed_over if kernel == "auto" else f"where {kernel} works on the ranks, they use it"
    for layout in (None, LayoutChoice(ranks=2)):
        assert expected in (model_checks.kernel_line(patcher, layout) or "")
    assert passed_over in (model_checks.kernel_line(patcher, LayoutChoice(attention="flash3")) or "")


@pytest.mark.parametrize("patcher", REFUSED.values(), ids=REFUSED)
def test_what_changes_more_is_refused_by_name(patcher) -> None:
    with pytest.raises(UserError, match=r"optimized_attention_override|callbacks\.on_pre_run\.key"):
        model_checks.check_patches(patcher)


def test_a_model_without_patches_needs_no_line() -> None:
    assert model_checks.kernel_line(Patcher(), None) is None
    assert model_checks.chosen_attention(Patcher()) == "auto"


class CFGNorm:
    """ComfyUI's node, as far as its function goes."""

    @classmethod
    def execute(cls, strength: float) -> Any:
        def cfg_norm(args: Any) -> Any:
            return args * strength

        return cfg_norm


def test_a_cfg_norm_travels_by_its_strength_and_nothing_else_behind_the_guidance_does() -> None:
    patcher = Patcher()
    assert model_checks.cfg_norm(patcher) is None
    patcher.model_options["sampler_post_cfg_function"] = [CFGNorm.execute(0.7)]
    model_checks.check_patches(patcher)
    assert model_checks.cfg_norm(patcher) == 0.7
    for others in ([negative_attention], [CFGNorm.execute(0.7), negative_attention]):
        patcher.model_options["sampler_post_cfg_function"] = others
        with pytest.raises(UserError, match="sampler_post_cfg_function"):
            model_checks.check_patches(patcher)


class Network:
    def forward_orig(self) -> None: ...


def test_a_method_that_nothing_would_call_is_refused_by_name() -> None:
    network = Network()
    network.dtype = "fp32"  # type: ignore[attr-defined]
    own = frozenset(vars(network))
    network.patcher = SimpleNamespace()  # type: ignore[attr-defined]
    model_checks.check_methods(network, own)
    network.forward_orig = MethodType(lambda self: None, network)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="replaced forward_orig of the network, which would do nothing") as refused:
        model_checks.check_methods(network, own)
    assert "TeaCache" in refused.value.hint


def test_a_node_that_computes_with_a_layer_that_has_no_weights_here_is_refused_by_the_layers_name() -> None:
    network = torch.nn.Sequential()
    network.add_module("img_in", torch.nn.Linear(2, 3, device="meta"))
    network.add_module("positions", torch.nn.Identity())
    model_checks.refuse_calls(network)
    assert network.positions(torch.ones(2)).sum() == 2
    with pytest.raises(UserError, match="computes with img_in of the model") as refused:
        network.img_in(torch.ones(1, 2))
    assert "Fun for Qwen-Image" in refused.value.hint


def test_a_control_that_patches_blocks_is_refused_by_name() -> None:
    """As ComfyUI's model patches: DiffSynth's ControlNets for Qwen-Image, Fun for Z-Image."""
    patches = {"patches": {"double_block": [negative_attention], "noise_refiner": [negative_attention]}}
    with pytest.raises(UserError, match=r"patches\.double_block, transformer_options\.patches\.noise_refiner"):
        model_checks.check_options(patches)


class CONST:
    """ComfyUI's prediction type of flow models."""


class ModelSamplingFlux:
    """ComfyUI's clock of Flux.1 and Qwen-Image: exp(shift) is the factor."""


class ModelSamplingDiscreteFlow:
    """ComfyUI's clock of SD3 and AuraFlow: the shift is the factor."""


def sampling(clock: type, shift: float, **more: float) -> Any:
    """As ComfyUI's nodes make it, of a class with the clock and the type as its bases."""
    made = type("ModelSamplingAdvanced", (clock, CONST), {})()
    vars(made).update(shift=shift, **more)
    return made


@pytest.mark.parametrize(
    ("own", "patched", "shift"),
    [
        (sampling(ModelSamplingFlux, 1.15), sampling(ModelSamplingFlux, 2.0), 2.0),
        (sampling(ModelSamplingFlux, 1.15), sampling(ModelSamplingDiscreteFlow, 3.1, multiplier=1.0), math.log(3.1)),
        (sampling(ModelSamplingDiscreteFlow, 3.0, multiplier=1.0), sampling(ModelSamplingFlux, 1.15), math.exp(1.15)),
    ],
    ids=["of its own kind", "AuraFlow's on Qwen-Image", "Flux.1's on Z-Image"],
)
def test_a_shift_travels_in_the_terms_of_the_models_own_clock(own, patched, shift) -> None:
    patcher = SimpleNamespace(
        object_patches={"model_sampling": patched},
        object_patches_backup={},
        model=SimpleNamespace(model_sampling=own),
    )
    assert model_checks.patched_shift(patcher) == pytest.approx(shift)


@pytest.mark.parametrize(
    ("clock", "own", "shift"),
    [
        (ModelSamplingDiscreteFlow, ModelSamplingFlux, 0.0),
        (ModelSamplingFlux, ModelSamplingDiscreteFlow, 1000.0),
    ],
    ids=["none at all", "beyond all numbers"],
)
def test_a_shift_without_noise_levels_is_refused_with_its_number(clock, own, shift) -> None:
    more = {ModelSamplingDiscreteFlow: {"multiplier": 1.0}, ModelSamplingFlux: {}}
    patcher = SimpleNamespace(
        object_patches={"model_sampling": sampling(clock, shift, **more[clock])},
        object_patches_backup={},
        model=SimpleNamespace(model_sampling=sampling(own, 1.0, **more[own])),
    )
    with pytest.raises(UserError, match=f"the flow shift to {shift:g}"):
        model_checks.patched_shift(patcher)


def test_another_clock_is_refused_by_both_names() -> None:
    patcher = SimpleNamespace(
        object_patches={"model_sampling": sampling(ModelSamplingDiscreteFlow, 3.0, multiplier=1000.0)},
        object_patches_backup={},
        model=SimpleNamespace(model_sampling=sampling(ModelSamplingFlux, 1.15)),
    )
    with pytest.raises(UserError, match=r"DiscreteFlow \+ CONST \(multiplier 1000\), .* as ModelSamplingFlux"):
        model_checks.patched_shift(patcher)
