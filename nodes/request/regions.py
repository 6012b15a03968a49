"""Where the entries of a CONDITIONING count, worked out for one latent as ComfyUI's samplers do before they start.

An entry is a pair of tokens and a dict, as in CONDITIONING.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...parallel_backend.errors import UserError

PLACE = (
    "area",
    "mask",
    "mask_strength",
    "set_area_to_bounds",
    "strength",
    "start_percent",
    "end_percent",
    "clip_start_percent",
    "clip_end_percent",
    "control",
)
"""Keys of an entry that give its place among the others; the rest is the model's condition."""
LEAST_SIDE = 8
"""The least side of an area around a mask, in cells."""

Area = tuple[int, int, int, int]
"""Height, width, top and left, in cells of the latent."""


def placed_sides(positive: Sequence[Any], negative: Sequence[Any], shape: Sequence[int]) -> dict[str, list[Any]]:
    """Both sides' entries, with areas in cells, and masks of the size of a latent of `shape` `[B, C, (T,) H, W]`.

    An area of a video is the same rows and columns of all its frames; the first dim of a mask counts pictures, of a
    video frames. For each area of one side the other one gets an entry too, where it has none: that of its prompt which
    is for the smallest area around. Raises `UserError` for a mask or an area that is none of a picture or a video.
    """
    sides = {
        side: [[tokens, _placed(side, entry, shape[2:])] for tokens, entry in conditioning]
        for side, conditioning in (("positive", positive), ("negative", negative))
    }
    first, second = sides.values()
    for side, other in ((first, second), (second, first)):
        for _, entry in side:
            _add_for_area(other, entry)
    return sides


def refuse_places(sides: Mapping[str, Sequence[Any]], family: str) -> None:
    """Raise `UserError` for a prompt with an area or a mask: a model of several latents has no one place for it."""
    for side, conditioning in sides.items():
        for key in ("area", "mask"):
            if any(entry.get(key) is not None for _, entry in conditioning):
                raise UserError(
                    f"The {side} conditioning has one {key} or more, which a {family} model of several latents does "
                    "not take.",
                    f"Remove the node that sets the {key}.",
                )


def area_within(side: str, entry: Mapping[str, Any], shape: Sequence[int]) -> Area | None:
    """The entry's area as far as it is within a latent of `shape`; None where that is all of it."""
    if entry.get("area") is None:
        return None
    height, width, top, left = entry["area"]
    rows, columns = shape[-2:]
    height, width = min(height, rows - top), min(width, columns - left)
    if min(height, width) < 1 or min(top, left) < 0:
        raise UserError(
            f"The {side} conditioning is for an area of {entry['area'][1]} x {entry['area'][0]} cells at {left}, "
            f"{top}; the latent is {columns} x {rows} (a cell is 8 pixels).",
            "Put the area inside the picture.",
        )
    return None if (height, width) == (rows, columns) else (height, width, top, left)


def _placed(side: str, entry: Mapping[str, Any], cells: Sequence[int]) -> dict[str, Any]:
    entry = {key: value for key, value in entry.items() if key not in ("area", "mask") or value is not None}
    if "area" in entry:
        entry["area"] = _in_cells(side, entry["area"], cells)
    if "mask" in entry:
        mask = entry["mask"] = _resized(side, entry["mask"], cells)
        if entry.get("set_area_to_bounds"):
            if mask.ndim > 3:
                raise UserError(
                    f"The {side} conditioning is for the bounds of a mask, of which a video has none.",
                    "Set set_cond_area to default.",
                )
            entry["area"] = _around(mask)
    return entry


def _in_cells(side: str, area: Sequence[Any], cells: Sequence[int]) -> Area:
    of_percents = area[0] == "percentage"
    numbers = area[1:] if of_percents else area
    if len(numbers) != 4:
        raise UserError(
            f"The {side} conditioning is for an area of {len(numbers)} numbers; one of a picture, or of all frames of "
            "a video, has 4.",
            "Use Conditioning (Set Area): it sets the area of a picture, not of a video.",
        )
    if of_percents and len(cells) > 2:
        raise UserError(
            f"The {side} conditioning is for an area in percents, which ComfyUI has for pictures only.",
            "Use Conditioning (Set Area), in pixels: it counts in all frames.",
        )
    rows, columns, top, left = numbers
    if of_percents:
        height, width = cells
        rows, columns = max(1, round(rows * height)), max(1, round(columns * width))
        top, left = round(top * height), round(left * width)
    return int(rows), int(columns), int(top), int(left)


def _resized(side: str, mask: Tensor, cells: Sequence[int]) -> Tensor:
    """`[B, H, W]` of cells, of a video `[B or 1, T or 1, H, W]`."""
    dims = 1 + len(cells)
    if mask.ndim not in range(2, dims + 1) or not mask.numel():
        kind = "pictures is [batch, height, width]" if dims == 3 else "a video is [frames, height, width]"
        raise UserError(
            f"The {side} conditioning has a mask of the shape {list(mask.shape)}; one of {kind}.",
            "Look at the node that made it.",
        )
    mask = mask.float().reshape(*[1] * (dims - mask.ndim), *mask.shape)
    if dims > 3 and mask.shape[1] not in (1, cells[0]):
        raise UserError(
            f"The {side} conditioning has masks for {mask.shape[1]} frames; the latent has {cells[0]}.",
            f"Give one mask, or {cells[0]}.",
        )
    if list(mask.shape[-2:]) != list(cells[-2:]):
        resized = F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=tuple(cells[-2:]), mode="bilinear")
        mask = resized.reshape(*mask.shape[:-2], *cells[-2:])
    return mask


def _around(mask: Tensor) -> Area:
    """The area of all that is not zero in a mask `[B, H, W]`."""
    rows, columns = (mask != 0).any(0).nonzero().unbind(1)
    if not len(rows):
        return LEAST_SIDE, LEAST_SIDE, 0, 0
    top, left = int(rows.min()), int(columns.min())
    height, width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
    return max(LEAST_SIDE, height), max(LEAST_SIDE, width), top, left


def _add_for_area(entries: list[Any], like: Mapping[str, Any]) -> None:
    area = like.get("area")
    if area is None:
        return
    around = [each for each in entries if "area" in each[1] and _contains(each[1]["area"], area)]
    whole = [each for each in entries if "area" not in each[1]]
    if not around and not whole:
        return
    tokens, nearest = min(around, key=lambda each: each[1]["area"][0] * each[1]["area"][1]) if around else whole[0]
    if nearest.get("area") == area:
        return
    condition = {key: value for key, value in nearest.items() if key not in PLACE}
    entries.append([tokens, condition | {key: like[key] for key in PLACE if key in like}])


def _contains(outer: Area, inner: Area) -> bool:
    return all(
        outer[axis + 2] <= inner[axis + 2] and inner[axis] + inner[axis + 2] <= outer[axis] + outer[axis + 2]
        for axis in (0, 1)
    )
