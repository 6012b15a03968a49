"""Arguments of a stock network call as tensors of a request, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UserError
from ...parallel_backend.families.registry import FAMILIES
from ...parallel_backend.families.spec import FamilySpec
from ...parallel_backend.protocol.messages import ResidualList, RunPrompt
from ..handles import OWN_LOADER

CANNOT_TRAVEL = {
    "attention_mask": ("an attention mask", "Use a style model without strength, or attention at strength 1"),
    "style": ("a style", "Remove the node that sets it"),
    "time_dim_concat": ("latents behind its own frames", "Remove the node that adds them (Phantom)"),
    "context_latents": ("latents to look at", "Remove the node that adds them"),
    "guiding_frame_index": ("a first frame", "Remove the node that sets it"),
    "ref_latent": ("a picture to begin with", "Remove the node that sets it"),
}
"""Inputs of ComfyUI's networks that would change the picture, and what to do instead."""


def refuse_inputs(inputs: Mapping[str, Any], spec: FamilySpec) -> None:
    """Raise `UserError` naming what a node gives the model and the ranks do not take."""
    taken = {each.network for each in spec.inputs}
    for name, (what, advice) in CANNOT_TRAVEL.items():
        if name not in taken and inputs.get(name) is not None:
            raise UserError(
                f"The model is given {what}, which cannot be sent to the ranks.",
                f"{advice}, or {OWN_LOADER}",
            )
    places = inputs.get("ref_latents_method")
    if places is not None and places not in spec.reference_places:
        raise UserError(
            f"The model is given reference_latents_method={places}, which the ranks do not know.",
            f"Use one of {', '.join(spec.reference_places)}, or {OWN_LOADER}",
        )


def one_time(timestep: Tensor | Sequence[Tensor]) -> Tensor:
    """The network's time. ComfyUI gives a model of several latents one for each, of which the ranks take but one."""
    if isinstance(timestep, Tensor):
        return timestep
    first, *others = timestep
    if any(other.shape != first.shape or not torch.equal(other, first) for other in others):
        raise UserError(
            "The latents of the model are given times of their own, which cannot be sent to the ranks.",
            f"Remove the noise mask, or {OWN_LOADER}",
        )
    return first


def residuals_of(control: Any, family: str) -> tuple[dict[ResidualList, tuple[int | None, ...]], dict[str, Tensor]]:
    """What ComfyUI's ControlNets add in this step: the numbers of its lists, and the tensors, each of them once.

    Raises `UserError` for a model that takes none.
    """
    if not any((control or {}).get(name) for name in ("input", "output")):
        return {}, {}
    if FAMILIES[family].residuals is None:
        raise UserError(
            f"The model is given the residuals of a ControlNet, which a {family} model does not take.",
            f"Remove the Apply ControlNet node, or {OWN_LOADER}",
        )
    numbers: dict[int, int] = {}
    kept: dict[str, Tensor] = {}
    lists: dict[ResidualList, tuple[int | None, ...]] = {}
    names: tuple[ResidualList, ...] = ("input", "output")
    for name in names:
        for tensor in control.get(name) or ():
            if tensor is not None and id(tensor) not in numbers:
                numbers[id(tensor)] = len(numbers)
                kept[f"residual.{numbers[id(tensor)]}"] = tensor
        lists[name] = tuple(None if tensor is None else numbers[id(tensor)] for tensor in control.get(name) or ())
    return {name: own for name, own in lists.items() if own}, kept


def entry_of_inputs(inputs: Mapping[str, Any], rows: slice) -> RunPrompt:
    """The networks' inputs that are not tensors of a prompt: distilled guidance, the picture's size, references."""
    guidance, size, target_size = _shared(inputs.get("guidance"), rows), None, None
    if inputs.get("c_size") is not None:
        height, width = size = _shared(inputs["c_size"], rows, 2)
        ratio = _shared(inputs.get("c_ar"), rows)
        if ratio is not None and abs(ratio - height / width) > 1e-4 * ratio:
            raise UserError(
                f"The conditioning says aspect_ratio={ratio:g} of a picture of {width} x {height}.",
                "Remove the node that sets it: the picture's own is taken.",
            )
    if inputs.get("image_meta_size") is not None:
        height, width, target_height, target_width, top, left = _shared(inputs["image_meta_size"], rows, 6)
        size, target_size = (height, width), (target_height, target_width)
        if top or left:
            raise UserError(
                f"The conditioning has a crop at {left}, {top}, which cannot be sent to the ranks.",
                "Remove the node that sets it.",
            )
    return RunPrompt(
        guidance=guidance,
        size=size,
        target_size=target_size,
        references=len(inputs.get("ref_latents") or ()),
        reference_places=inputs.get("ref_latents_method"),
    )


def _shared(values: Tensor | None, rows: slice, numbers: int = 0) -> Any:
    """The number, or the whole `numbers`, that these rows of a tensor have in common."""
    if values is None:
        return None
    of_rows = values.reshape(values.shape[0], -1)[rows]
    if not is_repeated(of_rows[:1], of_rows):
        raise UserError(
            "The pictures of one batch have different sizes or guidance, which the ranks take only once.",
            "Sample the pictures one after the other.",
        )
    return tuple(round(value) for value in of_rows[0].tolist()) if numbers else float(of_rows[0, 0])


def is_repeated(row: Tensor, rows: Tensor) -> bool:
    """Whether `rows` are `row` (or rows), over and over."""
    fits = row.shape[1:] == rows.shape[1:] and row.shape[0] in (1, rows.shape[0]) and row.dtype == rows.dtype
    return fits and torch.equal(row.expand_as(rows), rows)
