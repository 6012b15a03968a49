"""CONDITIONING as what a request carries, and what it cannot carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...parallel_backend.errors import UserError
from ...parallel_backend.families.registry import FAMILIES
from ...parallel_backend.protocol.messages import Conditioning
from ..handles import OWN_LOADER
from .regions import area_within

MAX_STRENGTH = 100.0
CANNOT_TRAVEL = {
    "gligen": "Give each prompt an area or a mask",
    "hooks": "Remove the hooks",
    "default": "Give the prompt an area or a mask of its own",
    "timestep_start": "Use Conditioning (Set Timestep Range)",
    "timestep_end": "Use Conditioning (Set Timestep Range)",
    "attention_mask": "Use a text encoder node that gives no attention mask",
    "reference_latents": "Remove the reference picture",
    "concat_latent_image": "Use a noise mask with a model that is not an inpainting model",
    "guiding_frame_index": "Remove the node that gives the model a first frame",
    "ref_latent": "Remove the node that gives the model a picture to begin with",
    "concat_mask": "Use a noise mask with a model that is not an inpainting model",
    "noise_concat": "Remove the node that adds latents to the model's input",
    "cross_attn_controlnet": "Remove the ControlNet",
    "aspect_ratio": "Remove it: the picture's own is taken",
    "model_conds": "Remove the node that adds inputs to the model",
    "unclip_conditioning": "Remove the picture prompt",
    "clip_vision_output": "Remove the picture prompt",
}
"""Keys of an entry that would change the picture in ComfyUI, and what to do instead, unless the family takes them."""
IN_KSAMPLER = ("hooks", "default")
"""What ComfyUI's own samplers do around the model, and so do with the model of Parallel Loader too."""
OWN_SAMPLER = "use KSampler with this model, which does this too."

ENTRY_KEYS = {each.name: each.entry for spec in FAMILIES.values() for each in spec.inputs if each.entry}
"""Maps the names of a condition's tensors to their keys in an entry, the same for all families."""


def to_message(
    side: str, entries: Sequence[Any], family: str, shape: Sequence[int]
) -> tuple[tuple[Conditioning, ...], dict[str, Tensor]]:
    """The message's entries and tensors of one `side` (positive or negative), for a model of `family`.

    `entries`: as `regions.placed_sides` gives them for a latent of `shape` `[B, C, (T,) H, W]`. What several of them
    share is sent once. Raises `UserError` naming what Parallel Sampler cannot do with them.
    """
    if not entries:
        raise UserError(f"The {side} conditioning has no entries.", "Connect a prompt.")
    messages: list[Conditioning] = []
    bodies: dict[str, Tensor] = {}
    own: list[dict[str, Tensor]] = []
    for index, (tokens, entry) in enumerate(entries):
        _check(side, entry, family)
        tensors = _model_tensors(tokens, entry, family)
        owner = next((number for number, known in enumerate(own) if _are_same(known, tensors)), index)
        own.append(tensors)
        messages.append(_message(side, entry, family, shape, None if owner == index else owner))
        if owner == index:
            bodies |= {f"{side}.{index}.{name}": repeated(tensor, shape[0]) for name, tensor in tensors.items()}
        if "mask" in entry:
            bodies[f"{side}.{index}.region"] = _region(side, entry["mask"], shape[0])
    return tuple(messages), bodies


def _check(side: str, entry: Mapping[str, Any], family: str) -> None:
    """Raise `UserError` for what cannot travel, or is missing."""
    spec = FAMILIES[family]
    taken = {each.entry for each in spec.inputs} | ({"reference_latents"} if spec.reference_places else set())
    for key, advice in CANNOT_TRAVEL.items():
        if entry.get(key) is not None and key not in taken and key not in spec.unread:
            raise _refused(side, key, advice, key in IN_KSAMPLER)
    places = _reference_places(entry)
    if places is not None and places not in spec.reference_places:
        raise _refused(side, f"reference_latents_method={places}", f"Use one of {', '.join(spec.reference_places)}")
    for each in spec.inputs:
        if each.entry and each.required and entry.get(each.entry) is None:
            raise UserError(
                f"The {side} conditioning has no {each.entry}, which this {family} model needs.",
                f"Use the text encoders that belong to the model ({spec.encoders}).",
            )


def _model_tensors(tokens: Tensor, entry: Mapping[str, Any], family: str) -> dict[str, Tensor]:
    """The tensors of an entry that the model takes, by their names in the request."""
    keys = {each.name: each.entry for each in FAMILIES[family].inputs if each.entry}
    references = enumerate(entry.get("reference_latents") or ())
    return {
        "tokens": tokens,
        **{name: entry[key] for name, key in keys.items() if entry.get(key) is not None},
        **{f"reference.{number}": reference for number, reference in references},
    }


def _reference_places(entry: Mapping[str, Any]) -> Any:
    """The rule of the references' positions, as in ComfyUI of no use without any."""
    return entry.get("reference_latents_method") if entry.get("reference_latents") else None


def _are_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


def repeated(tensor: Tensor, batch: int) -> Tensor:
    """`[1, …]`, or one row for each picture: over and over where there are too few, as in ComfyUI."""
    if len(tensor) in (1, batch):
        return tensor
    return tensor.repeat(-(-batch // len(tensor)), *[1] * (tensor.ndim - 1))[:batch]


def _message(
    side: str, entry: Mapping[str, Any], family: str, shape: Sequence[int], prompt: int | None
) -> Conditioning:
    strength = entry.get("strength", 1.0) * (entry.get("mask_strength", 1.0) if "mask" in entry else 1.0)
    if abs(strength) > MAX_STRENGTH:
        raise _refused(side, f"a strength of {strength:g}", f"Make it at most {MAX_STRENGTH:g}")
    return Conditioning(
        guidance=entry.get("guidance", FAMILIES[family].guidance),
        size=_size(side, entry, ""),
        target_size=_size(side, entry, "target_"),
        crop=_crop(side, entry),
        aesthetic_score=entry.get("aesthetic_score"),
        references=len(entry.get("reference_latents") or ()),
        reference_places=_reference_places(entry),
        prompt=prompt,
        area=area_within(side, entry, shape),
        strength=strength,
        start=_percent(max(entry.get("start_percent", 0.0), entry.get("clip_start_percent", 0.0))),
        end=_percent(min(entry.get("end_percent", 1.0), entry.get("clip_end_percent", 1.0))),
    )


def _percent(share: float) -> float:
    return min(max(float(share), 0.0), 1.0)


def _region(side: str, mask: Tensor, batch: int) -> Tensor:
    """A mask `[n, (T,) H, W]` for a batch: one row, or one for each picture or video."""
    mask = mask[:batch]
    if batch % len(mask):
        raise UserError(
            f"The {side} conditioning has {len(mask)} masks for a batch of {batch}.",
            f"Give one mask, or {batch}.",
        )
    return repeated(mask, batch)


def entry_of(tensors: Mapping[str, Tensor], guidance: float) -> list[Any]:
    """The CONDITIONING of an encoded prompt's `tensors`, under ComfyUI's keys."""
    entry = {key: tensors[name] for name, key in ENTRY_KEYS.items() if name in tensors}
    return [[tensors["tokens"], {**entry, "guidance": guidance}]]


def _size(side: str, entry: Mapping[str, Any], prefix: str) -> tuple[int, int] | None:
    """The picture's height and width that an entry gives the model."""
    height, width = (entry.get(f"{prefix}{name}") for name in ("height", "width"))
    if height is None or width is None:
        return None
    if height < 1 or width < 1:
        raise _refused(side, f"{prefix}width={width} and {prefix}height={height}", "Set both to at least 1")
    return height, width


def _crop(side: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    """What is told to have been cut off the picture above and on the left."""
    top, left = (entry.get(f"crop_{name}") or 0 for name in ("h", "w"))
    if min(top, left) < 0:
        raise _refused(side, f"crop_w={left} and crop_h={top}", "Set both to at least 0")
    return top, left


def _refused(side: str, what: str, advice: str, in_ksampler: bool = False) -> UserError:
    return UserError(
        f"The {side} conditioning carries {what}, which Parallel Sampler cannot send to the ranks.",
        f"{advice}, or {OWN_SAMPLER if in_ksampler else OWN_LOADER}",
    )
