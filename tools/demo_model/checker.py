"""Looks at a picture and says which of the asked attributes it shows, without knowing how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch.nn import functional as F

from .scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, Scene, outline_distance, stripe_colour

SMALLEST = 65
"""Objects of fewer px are specks and are not counted."""
RIM = 4
"""Width in px of an object's outline, left out where its colour is looked for."""
HAZE, SOLID = 28.0, 70.0
"""What is nearer to the background than the one, in RGB, is no object; what is farther than the other always is."""
MATCH = 0.68
"""Overlap (IoU) that an object must reach with its best template to be called a shape at all."""
ANGLES = (-0.24, -0.12, 0.0, 0.12, 0.24)
FOUR = ("colour", "shape", "count", "relation")


@dataclass(frozen=True)
class Seen:
    """One object found in a picture; lengths are fractions of the side."""

    colour: str
    shape: str
    match: float
    x: float
    y: float
    radius: float


def look(picture: np.ndarray) -> tuple[str, list[Seen]]:
    """The background's colour and the objects of a uint8 picture `[H, W, 3]`."""
    pixels = picture.astype(np.float32)
    background, away = _split(pixels)
    labels = _components(_solid(away))
    found = [
        _describe(pixels, labels == label)
        for label in np.unique(labels[labels > 0])
        if (labels == label).sum() >= SMALLEST
    ]
    return background, found


def check(picture: np.ndarray, scene: Scene) -> dict[str, list[bool]]:
    """Per attribute, one verdict per place where the caption asks for it."""
    background, seen = look(picture)
    verdicts: dict[str, list[bool]] = {"background": [background == scene.background]}
    members = _assign(scene, seen)
    strays = [s for s in seen if not any(s in group for group in members)]
    verdicts["nothing else"] = [not strays]
    for group, found in zip(scene.groups, members, strict=True):
        right_shape = [s for s in found if s.shape == group.shape]
        verdicts.setdefault("colour", []).append(bool(found))
        verdicts.setdefault("shape", []).append(bool(found) and len(right_shape) == len(found))
        verdicts.setdefault("count", []).append(len(found) == group.count)
        fits = [0.8 < s.radius / scene.radius(group) < 1.22 for s in found]
        verdicts.setdefault("size", []).append(bool(found) and all(fits))
    if scene.relation is not None:
        verdicts["relation"] = [_related(scene.relation, *members)]
    if scene.position is not None:
        x, y = POSITIONS[scene.position]
        verdicts["position"] = [bool(members[0]) and all(np.hypot(s.x - x, s.y - y) < 0.16 for s in members[0])]
    return verdicts


def _assign(scene: Scene, seen: list[Seen]) -> list[list[Seen]]:
    """The seen objects that belong to each asked group: by colour, and by shape where two groups share a colour."""
    colours = [group.colour for group in scene.groups]
    shared = len(set(colours)) < len(colours)
    return [
        [s for s in seen if s.colour == group.colour and (not shared or s.shape == group.shape)]
        for group in scene.groups
    ]


def _related(relation: str, first: list[Seen], second: list[Seen]) -> bool:
    if not first or not second:
        return False
    axis = "x" if relation in ("left of", "right of") else "y"
    before, after = (first, second) if relation in ("left of", "above") else (second, first)
    return max(getattr(s, axis) for s in before) < min(getattr(s, axis) for s in after)


def _split(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """The background colour that most pixels are near, and how far each pixel is from it, `[H, W]`.

    At any lightness that it is drawn with.
    """
    best: tuple[str, np.ndarray] | None = None
    for name, colour in BACKGROUNDS.items():
        base = np.array(colour, np.float32)
        lightness = np.clip(pixels @ base / (base @ base), 0.74, 1.08)[..., None]
        away = np.linalg.norm(pixels - lightness * base, axis=-1)
        if best is None or np.minimum(away, 40).mean() < np.minimum(best[1], 40).mean():
            best = name, away
    assert best is not None
    return best


def _solid(away: np.ndarray) -> np.ndarray:
    """What belongs to objects, by how far each px is from the background.

    A blurred edge runs where an object's contrast has fallen to half: each object has a level of its own, half of its
    median, so that a faint haze neither joins two of them nor fills a ring.
    """
    rough = _components(away > HAZE)
    solid = np.zeros(away.shape, bool)
    for label in np.unique(rough[rough > 0]):
        part = rough == label
        solid |= part & (away > np.clip(0.5 * np.median(away[part]), HAZE, SOLID))
    return solid


def _components(solid: np.ndarray) -> np.ndarray:
    """Connected parts of a mask, numbered from 1 (each cell takes the greatest number around it until none changes)."""
    numbers = torch.arange(1, solid.size + 1, dtype=torch.float32).reshape(1, 1, *solid.shape)
    mask = torch.from_numpy(solid)[None, None].float()
    labels = numbers * mask
    while True:
        grown = labels
        for _ in range(8):
            grown = F.max_pool2d(grown, 3, 1, 1) * mask
        if torch.equal(grown, labels):
            return labels[0, 0].numpy().astype(np.int64)
        labels = grown


@cache
def _palette() -> tuple[tuple[str, ...], np.ndarray]:
    """Names and colours that vote for an object's colour; stripes vote for the colour that they belong to."""
    names, colours = list(COLOURS), [np.array(c, np.float32) for c in COLOURS.values()]
    for name in COLOURS:
        if name not in ("white", "black"):
            names.append(name)
            colours.append(stripe_colour(name))
    return tuple(names), np.stack(colours)


def _colour_of(pixels: np.ndarray, mask: np.ndarray) -> str:
    """The most voted colour of an object's inside, its outline left out where enough is left."""
    shrunk = -F.max_pool2d(-torch.from_numpy(mask)[None, None].float(), 2 * RIM + 1, 1, RIM)[0, 0].numpy() > 0
    inside = shrunk if shrunk.sum() >= 0.04 * mask.sum() else mask
    names, colours = _palette()
    chosen = np.linalg.norm(pixels[inside][:, None] - colours, axis=-1).argmin(axis=1)
    votes = {name: 0 for name in COLOURS}
    for index, amount in zip(*np.unique(chosen, return_counts=True), strict=True):
        votes[names[index]] += int(amount)
    return max(votes, key=lambda name: votes[name])


@cache
def _template(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far below its origin its centroid lies."""
    axis = np.linspace(-1.3, 1.3, 521, dtype=np.float32)
    inside = outline_distance(shape, axis[None, :] + 0 * axis[:, None], axis[:, None] + 0 * axis[None, :], 1.0) < 0
    return float(inside.sum() * (axis[1] - axis[0]) ** 2), float((inside * axis[:, None]).sum() / inside.sum())


def _describe(pixels: np.ndarray, mask: np.ndarray) -> Seen:
    """Colour by vote; shape by the template (of equal area, on the same centroid) that overlaps the object most."""
    size = len(mask)
    ys, xs = np.nonzero(mask)
    x, y, area = (xs.mean() + 0.5) / size, (ys.mean() + 0.5) / size, mask.mean()
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    du, dv = axis[None, :] - np.float32(x), axis[:, None] - np.float32(y)
    best = ("", 0.0, 0.0)
    for shape in SHAPES:
        unit_area, centroid = _template(shape)
        radius = float(np.sqrt(area / unit_area))
        for angle in ANGLES if shape not in ("circle", "ring") else (0.0,):
            cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            u, v = du * cosine + dv * sine, dv * cosine - du * sine
            inside = outline_distance(shape, u, v + np.float32(centroid * radius), radius) < 0
            overlap = (inside & mask).sum() / (inside | mask).sum()
            if overlap > best[1]:
                best = (shape, float(overlap), radius)
    shape = best[0] if best[1] >= MATCH else "unclear"
    return Seen(_colour_of(pixels, mask), shape, best[1], float(x), float(y), best[2])
