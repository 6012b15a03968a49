"""Makes the prompts that the engine evaluates, with their ControlNets and areas, of a request's entries and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.controlnet.active import ActiveControl
from ..adapters.controlnet.nets import ControlNet
from ..adapters.ip_adapter import ActiveImagePrompt, IPAdapter, check_family
from ..distributed.axis import Axis
from ..errors import UserError
from ..families.condition import Condition
from ..families.family import Family, with_tokens
from ..families.spec import FamilySpec, Input
from ..protocol import messages
from ..protocol.messages import Conditioning, Prompt
from ..sampling.model_sampling import ModelSampling
from ..strategies.weighted_prompts import Area, WeightedPrompt

REGION = "region"
"""What a prompt's tensors hold that is not for the model: where it counts. Names of several such have a dot."""


@dataclass(frozen=True)
class Inputs:
    """What entries are made of: a request's tensors and controls, for a first latent of `shape` `[B, C, ..., H, W]`.

    `adapters`: the IP-Adapters of image prompts, by path; `tensor`: the ranks that share the model's heads.
    """

    tensors: Mapping[str, Tensor]
    family: Family
    model_sampling: ModelSampling
    shape: torch.Size
    controls: Sequence[ActiveControl] = ()
    adapters: Mapping[str, IPAdapter] = field(default_factory=dict)
    tensor: Axis | None = None


def entries_of_side(entries: Sequence[Conditioning], side: str, inputs: Inputs) -> list[WeightedPrompt]:
    """The entries of a `side` (positive or negative), on the family's device.

    Raises `UserError` for what does not fit the model, the latent or itself.
    """
    return [_entry_of(entry, index, side, inputs) for index, entry in enumerate(entries)]


def _entry_of(entry: Conditioning, index: int, side: str, inputs: Inputs) -> WeightedPrompt:
    family, batch, (height, width) = inputs.family, inputs.shape[0], inputs.shape[-2:]
    owner = index if entry.prompt is None else entry.prompt
    if owner > index:
        raise UserError(f"The {side} entry {index} names the prompt of entry {owner}, which does not come before it.")
    area, region = _area_of(entry, side, height, width), inputs.tensors.get(f"{side}.{index}.{REGION}")
    if (area is not None or region is not None) and len(family.latents) > 1:
        raise UserError(
            f"A {side} prompt is for an area or has a mask; a {family.name} model of {len(family.latents)} latents "
            "takes neither.",
            "Remove the area or the mask.",
        )
    condition = prompt_of(entry, f"{side}.{owner}.", side, inputs.tensors, family, inputs.shape)
    pictures = pictures_of(entry, f"{side}.{owner}.", inputs.tensors, family)
    asked = list(zip(entry.image_prompts, pictures, strict=True))
    condition = replace(
        condition,
        references=tuple(map(family.process_in, condition.references)),
        controls=tuple(inputs.controls[index] for index in entry.controls),
        image_prompts=image_prompts_of(asked, inputs.adapters, family, inputs.tensor, batch, inputs.model_sampling),
        name=f"{side} {index}",
    )
    return WeightedPrompt(
        condition,
        _weight_of(entry, region, area, side, inputs.shape).to(family.device),
        area,
        start=inputs.model_sampling.percent_to_sigma(entry.start) if entry.start > 0.0 else math.inf,
        end=inputs.model_sampling.percent_to_sigma(entry.end) if entry.end < 1.0 else -math.inf,
    )


def _area_of(entry: Conditioning, side: str, height: int, width: int) -> Area | None:
    if entry.area is None:
        return None
    area = Area(*entry.area)
    if not area.height or not area.width or area.top + area.height > height or area.left + area.width > width:
        raise UserError(
            f"A {side} prompt is for an area of {area.width} x {area.height} cells at {area.left}, {area.top}; the "
            f"latent is {width} x {height}.",
            "Put the area inside the picture.",
        )
    return area


def _weight_of(
    entry: Conditioning, region: Tensor | None, area: Area | None, side: str, shape: Sequence[int]
) -> Tensor:
    batch, (height, width) = shape[0], shape[-2:]
    if region is None:
        return entry.strength * (torch.ones(1, 1, 1, 1) if area is None else area.faded(height, width))
    cells = [batch, *shape[2:]]
    fits = region.ndim == len(cells) and list(region.shape[-2:]) == [height, width]
    if not fits or any(given not in (1, cell) for given, cell in zip(region.shape, cells[:-2], strict=False)):
        raise UserError(
            f"The mask of a {side} prompt has the shape {list(region.shape)}; the latent's cells are {cells}.",
            "Use one version of this node pack on all sides.",
        )
    region = region.float()
    if not torch.isfinite(region).all():
        raise UserError(f"The mask of a {side} prompt holds NaN or infinite values.", "Look at the node that made it.")
    weight = entry.strength * region.unsqueeze(1)
    return weight if area is None else area.of(weight)


def prompt_of(
    prompt: Prompt, prefix: str, side: str, tensors: Mapping[str, Tensor], family: Family, shape: Sequence[int]
) -> Condition:
    """One prompt with those of its tensors whose names begin with `prefix`; errors say that it is of `side`.

    Where no size of the picture is given, the model is given that of the latent of `shape` `[B, C, ..., H, W]`.
    """
    given: dict[str, Any] = {
        name: tensors[prefix + name].to(family.device)
        for name in (key.removeprefix(prefix) for key in tensors if key.startswith(prefix))
        if name != REGION and "." not in name
    }
    check_condition_tensors(given, family.spec.inputs, side, shape[0])
    given = trimmed(given, family.spec, side)
    _, *cell = family.latent.stride
    scores = family.spec.aesthetic_scores
    score = scores.get(side) if prompt.aesthetic_score is None else prompt.aesthetic_score
    condition = Condition(
        given,
        guidance=prompt.guidance,
        size=prompt.size or (shape[-2] * cell[0], shape[-1] * cell[1]),
        target_size=prompt.target_size,
        crop=prompt.crop,
        aesthetic_score=score,
        references=_references_of(prompt, prefix, side, tensors, family, shape[0]),
        reference_places=prompt.reference_places,
    )
    family.check_condition(condition)
    return condition


def _references_of(
    prompt: Prompt, prefix: str, side: str, tensors: Mapping[str, Tensor], family: Family, batch: int
) -> tuple[Tensor, ...]:
    if prompt.references and not family.spec.reference_places:
        raise UserError(
            f"The {side} conditioning has {prompt.references} reference pictures, which a {family.name} model does not "
            "look at.",
            "Remove the ReferenceLatent node.",
        )
    if prompt.reference_places not in (None, *family.spec.reference_places):
        raise UserError(
            f"The {side} conditioning says reference_latents_method={prompt.reference_places}, which a {family.name} "
            "model does not know.",
            f"Use one of {', '.join(family.spec.reference_places)}.",
        )
    references = [tensors.get(f"{prefix}reference.{number}") for number in range(prompt.references)]
    dims = family.latent.dims
    for reference in references:
        fits = (
            reference is not None
            and reference.ndim == 2 + dims
            and reference.shape[0] in (1, batch)
            and reference.shape[1] == family.input_channels
            and reference.numel()
        )
        if not fits:
            found = "is missing" if reference is None else f"has the shape {list(reference.shape)}"
            raise UserError(
                f"The latent of a reference picture of the {side} conditioning {found}; this {family.name} model takes "
                f"[1 or {batch}, {family.input_channels}, {'frames, ' * (dims == 3)}height, width].",
                "Encode the picture with the VAE that belongs to the model.",
            )
    return tuple(reference.float().to(family.device) for reference in references if reference is not None)


def sizes_of_controls(entries: Sequence[Conditioning], count: int, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width that the pictures of `count` controls cover: the latent's, or those of an area.

    Raises `UserError` for entries that do not agree on it, or name a control that there is not.
    """
    height, width = shape[-2:]
    sizes: dict[int, tuple[int, int]] = {}
    for entry in entries:
        size = (height, width) if entry.area is None else entry.area[:2]
        for index in entry.controls:
            if not 0 <= index < count:
                raise UserError(f"The conditioning names controls {entry.controls}, of which {count} were sent.")
            if sizes.setdefault(index, size) != size:
                raise UserError(
                    f"The control {index} is for {sizes[index]} rows and columns in one prompt and {size} in another.",
                    "Use one version of this node pack on all sides.",
                )
    return [sizes.get(index, (height, width)) for index in range(count)]


def control_of(
    control: messages.ControlUse,
    picture: Tensor | None,
    net: ControlNet,
    family: Family,
    model_sampling: ModelSampling | None,
    size: tuple[int, int, int],
) -> ActiveControl:
    """A ControlNet that is evaluated over a latent, or an area of it, of `size` (batch, height, width), and limited to
    parts of a run if `model_sampling` is given.

    Raises `UserError` for what does not fit together.
    """
    net.work_with(with_tokens(family, f"The ControlNet {net.info.name}"), control.mode)
    batch, height, width = size
    wanted = [family.latent.channels, height, width]
    if net.info.takes_pixels:
        _, *cell = family.latent.stride
        wanted = [3, height * cell[0], width * cell[1]]
    if picture is None or picture.ndim != 4 or picture.shape[0] not in (1, batch) or list(picture.shape[1:]) != wanted:
        found = "is missing" if picture is None else f"has the shape {list(picture.shape)}"
        what = "control picture" if net.info.takes_pixels else "latent of the control picture"
        raise UserError(
            f"The {what} for {net.info.name} {found}; this run takes {[batch, *wanted]}.",
            "Look at the node that made it, and at its VAE.",
        )
    start, end = math.inf, -math.inf
    if model_sampling:
        start, end = (clock_at(percent, model_sampling) for percent in (control.start, control.end))
    return ActiveControl(net, net.see(picture), control.strength, control.mode, start, end)


def pictures_of(prompt: Prompt, prefix: str, tensors: Mapping[str, Tensor], family: Family) -> list[Tensor]:
    """The pictures of a prompt's image prompts, on the family's device. Raises `UserError` when one is missing."""
    names = [f"{prefix}image.{number}" for number in range(len(prompt.image_prompts))]
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"The request carries no {missing[0]}.", "Use one version of this node pack on all sides.")
    return [tensors[name].to(family.device, family.dtype) for name in names]


def image_prompts_of(
    asked: Sequence[tuple[messages.ImagePromptUse, Tensor]],
    adapters: Mapping[str, IPAdapter],
    family: Family,
    tensor: Axis | None,
    batch: int,
    model_sampling: ModelSampling | None = None,
) -> tuple[ActiveImagePrompt, ...]:
    """The active image prompts of a run, limited to parts of it if `model_sampling` is given. Raises `UserError` for
    those that do not fit the model."""
    prompts = []
    for prompt, picture in asked:
        adapter = adapters[prompt.adapter.path]
        check_family(adapter.info, family)
        adapter.check_picture(picture, batch)
        start, end = math.inf, -math.inf
        if model_sampling:
            start, end = (clock_at(percent, model_sampling) for percent in (prompt.start, prompt.end))
        assert tensor is not None
        prompts.append(ActiveImagePrompt(adapter, picture, prompt.weight, start, end, tensor))
    return tuple(prompts)


def clock_at(percent: float, model_sampling: ModelSampling) -> float:
    """The model's clock at that part of the run; beyond all of its times at the ends."""
    if percent in (0.0, 1.0):
        return math.inf if percent == 0.0 else -math.inf
    return float(model_sampling.timestep(torch.tensor(model_sampling.percent_to_sigma(percent))).float())


def trimmed(given: Mapping[str, Tensor], spec: FamilySpec, side: str) -> dict[str, Tensor]:
    """The tensors of a condition without the tokens that do not count, and without the masks that say so.

    Raises `UserError` where that differs among the texts of a batch.
    """
    kept = dict(given)
    for each in (each for each in spec.inputs if each.trimmed and each.mask in given):
        mask = kept.pop(str(each.mask)) > 0
        if not (mask == mask[:1]).all() or not mask.any():
            raise UserError(
                f"The masks of the {side} conditioning leave {mask.sum(1).tolist()} tokens of the texts of a batch; a "
                f"{spec.title} model takes one mask for all of them, of one token or more.",
                "Sample the videos one after the other.",
            )
        kept[each.name] = kept[each.name][:, mask[0]]
    return kept


def check_condition_tensors(given: Mapping[str, Tensor], inputs: Sequence[Input], side: str, batch: int) -> None:
    """Raise `UserError` for tensors of a condition that do not fit each other or the batch."""
    shapes = {name: list(tensor.shape) for name, tensor in given.items()}
    dims = {each.name: each.ndim for each in inputs}
    fits = "tokens" in given and all(
        len(shape) == dims.get(name) and shape[0] in (1, batch) and all(shape) for name, shape in shapes.items()
    )
    for mask, tokens in ((each.mask, each.name) for each in inputs if each.mask):
        fits = fits and (mask not in given or (tokens in given and shapes[mask][1] == shapes[tokens][1]))
    if not fits:
        raise UserError(
            f"The {side} conditioning does not fit together, or not the batch of {batch}: {shapes}.",
            "Look at the node that made it.",
        )
