"""Procedural scenes with captions: what the demo model is trained and judged on.

A `Scene` is laid out on a canvas of so many px: larger canvases hold objects of the same size in px, so that a model
that can draw them on one canvas can on all. The same (seed, index, canvas) always gives the same scene; its positions
and radii are fractions of the side, and `draw` renders it anti-aliased at any size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 34, 38),
    "green": (24, 138, 48),
    "blue": (30, 70, 210),
    "yellow": (248, 222, 40),
    "orange": (246, 136, 20),
    "purple": (128, 36, 158),
    "white": (250, 250, 250),
    "black": (22, 22, 26),
}
BACKGROUNDS = {
    "gray": (150, 152, 156),
    "green": (164, 206, 166),
    "blue": (158, 196, 232),
    "pink": (244, 188, 204),
    "yellow": (238, 228, 172),
    "purple": (196, 180, 226),
}
PATTERNS = ("plain", "striped", "checkered")
FILLS = ("plain", "striped", "outlined")
SIZES = {"small": 0.108, "": 0.154, "large": 0.218}
"""Radius as a fraction of `UNIT` px."""
UNIT = 128
"""The smallest canvas, in px. Lengths of objects and patterns are told as fractions of it."""
NUMBERS = {1: "a", 2: "two", 3: "three"}
RELATIONS = ("left of", "right of", "above", "below")
POSITIONS = {
    "at the top left": (0.25, 0.25),
    "at the top right": (0.75, 0.25),
    "at the bottom left": (0.25, 0.75),
    "at the bottom right": (0.75, 0.75),
    "in the center": (0.5, 0.5),
}
LEAST_CONTRAST = 100
"""Objects are at least so far from their background in RGB: white on pale yellow is no picture of anything."""
HELD_OUT_SHARE = 8
"""One combination in this many is never trained on."""
MARGIN = 0.02
GRID = 16
"""Centres lie on a grid of so many px: the model's tokens. Objects of one phase against the tokens are learnt in a
fraction of the pictures that free positions need, and no caption says more than the grid tells apart."""

Style = Literal["picture", "chalk"]


@dataclass(frozen=True)
class Group:
    """`count` like objects: what one noun phrase of a caption says."""

    count: int
    size: str
    fill: str
    colour: str
    shape: str

    def phrase(self) -> str:
        fill = "" if self.fill == "plain" else self.fill
        noun = self.shape if self.count == 1 else plural(self.shape)
        words = (self.size, fill, self.colour, noun)
        said = " ".join(word for word in words if word)
        article = "an" if self.count == 1 and said[0] in "aeiou" else NUMBERS[self.count]
        return f"{article} {said}"


@dataclass(frozen=True)
class Placed:
    """One drawn object; lengths are fractions of the picture's side."""

    group: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    groups: tuple[Group, ...]
    relation: str | None
    position: str | None
    background: str
    pattern: str
    objects: tuple[Placed, ...]
    light: float
    canvas: int = UNIT

    def unit(self) -> float:
        """What `UNIT` px are as a fraction of the side."""
        return UNIT / self.canvas

    def radius(self, group: Group) -> float:
        """The radius of a group's objects, as a fraction of the side."""
        return SIZES[group.size] * self.unit()

    def caption(self) -> str:
        parts = [self.groups[0].phrase()]
        if self.relation is not None:
            parts += [self.relation, self.groups[1].phrase()]
        if self.position is not None:
            parts.append(self.position)
        pattern = "" if self.pattern == "plain" else f" {self.pattern}"
        return " ".join(parts) + f" on a {self.background}{pattern} background"

    def held_out(self) -> bool:
        """True for the combinations of objects kept for evaluation."""
        key = repr((self.groups, self.relation, self.position)).encode()
        return hashlib.sha256(key).digest()[0] % HELD_OUT_SHARE == 0


def plural(noun: str) -> str:
    return noun + "es" if noun.endswith("s") else noun + "s"


def make_scene(seed: int, index: int, held_out: bool = False, canvas: int = UNIT) -> Scene:
    """The scene number `index` of the training stream `seed`, or of its held-out stream, on a canvas of so many px."""
    rng = np.random.default_rng([seed, index, int(held_out)])
    while True:
        scene = _sample(rng, canvas)
        if scene is not None and scene.held_out() == held_out:
            return scene


def draw(scene: Scene, size: int, style: Style = "picture") -> np.ndarray:
    """The picture as uint8 `[size, size, 3]`."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    if style == "chalk":
        return _draw_chalk(scene, size, axis)
    image = _draw_background(scene, axis)
    for placed in scene.objects:
        group = scene.groups[placed.group]
        rows, columns, distance, u, v = _patch(placed, group.shape, axis)
        alpha = np.clip(0.5 - distance * size, 0, 1)[..., None]
        colour = _object_colour(group, placed, scene, distance, v, size)
        shade = 1 - 0.16 * (u * np.cos(scene.light) + v * np.sin(scene.light)) / placed.radius
        region = image[rows, columns]
        image[rows, columns] = region * (1 - alpha) + colour * shade[..., None] * alpha
    return (np.clip(image, 0, 255) + 0.5).astype(np.uint8)


def edge_map(picture: np.ndarray) -> np.ndarray:
    """White edges on black, uint8 `[H, W, 3]`: the ControlNet's condition for a uint8 picture `[H, W, 3]`."""
    padded = np.pad(picture.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = padded[1:-1, 2:] - padded[1:-1, :-2]
    down = padded[2:, 1:-1] - padded[:-2, 1:-1]
    strength = np.sqrt(across**2 + down**2).max(axis=-1)
    line = np.clip((strength - 24) * 4, 0, 255).astype(np.uint8)
    return np.repeat(line[..., None], 3, axis=-1)


def label_map(scene: Scene, cells: int) -> np.ndarray:
    """What each of `cells` x `cells` cells shows, as shares: float32 `[cells, cells, (1 + shapes) + (1 + colours)]`.

    The first entry of each of the two parts is the share of background.
    """
    fine = cells * 8
    axis = (np.arange(fine, dtype=np.float32) + 0.5) / fine
    shape_share = np.zeros((fine, fine, 1 + len(SHAPES)), np.float32)
    colour_share = np.zeros((fine, fine, 1 + len(COLOURS)), np.float32)
    shape_share[..., 0] = 1
    colour_share[..., 0] = 1
    colours = tuple(COLOURS)
    for placed in scene.objects:
        group = scene.groups[placed.group]
        rows, columns, distance, _, _ = _patch(placed, group.shape, axis)
        inside = (distance < 0)[..., None]
        for share, entry in ((shape_share, SHAPES.index(group.shape)), (colour_share, colours.index(group.colour))):
            one_hot = np.eye(share.shape[-1], dtype=np.float32)[1 + entry]
            share[rows, columns] = np.where(inside, one_hot, share[rows, columns])
    both = np.concatenate([shape_share, colour_share], axis=-1)
    return both.reshape(cells, 8, cells, 8, -1).mean(axis=(1, 3))


def _pick(rng: np.random.Generator, options: tuple[str, ...], weights: tuple[float, ...] | None = None) -> str:
    return options[int(rng.choice(len(options), p=weights))]


def _sample(rng: np.random.Generator, canvas: int) -> Scene | None:
    background = _pick(rng, tuple(BACKGROUNDS))
    pattern = _pick(rng, PATTERNS, (0.5, 0.25, 0.25))
    pair = rng.random() < 0.55
    relation = _pick(rng, RELATIONS) if pair else None
    groups = [_sample_group(rng, background, pair)]
    if pair:
        second = _sample_group(rng, background, pair)
        if (second.colour, second.shape) == (groups[0].colour, groups[0].shape):
            return None
        groups.append(second)
    position = None
    if not pair and groups[0].count == 1 and rng.random() < 0.6:
        position = _pick(rng, tuple(POSITIONS))
    objects = _place(rng, tuple(groups), relation, position, canvas)
    light = float(rng.uniform(0.6, 1.0))
    return Scene(tuple(groups), relation, position, background, pattern, objects, light, canvas)


def _sample_group(rng: np.random.Generator, background: str, pair: bool) -> Group:
    count = int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
    sizes = {1: ("small", "", "large"), 2: ("small", "", "large"), 3: ("small",) if pair else ("small", "")}
    size = _pick(rng, sizes[count])
    shape = _pick(rng, SHAPES)
    fill = _pick(rng, FILLS, (0.6, 0.18, 0.22))
    if shape == "ring" or size == "small":
        fill = "plain"
    colour = _pick(rng, colours_on(background))
    if fill == "striped" and colour in ("white", "black"):
        fill = "plain"
    return Group(count, size, fill, colour, shape)


def colours_on(background: str) -> tuple[str, ...]:
    """The colours that objects may have on a background: of another name, and told apart from it at a glance."""
    base = np.array(BACKGROUNDS[background], np.float32)
    return tuple(
        name
        for name, colour in COLOURS.items()
        if name != background and np.linalg.norm(np.array(colour, np.float32) - base) >= LEAST_CONTRAST
    )


def _region(which: int, relation: str | None) -> tuple[float, float, float, float]:
    """x0, x1, y0, y1 of the half (or whole) of the picture that group number `which` may fill."""
    if relation is None:
        return 0.0, 1.0, 0.0, 1.0
    first_half = (which == 0) == (relation in ("left of", "above"))
    low, high = (0.0, 0.5) if first_half else (0.5, 1.0)
    return (low, high, 0.0, 1.0) if relation in ("left of", "right of") else (0.0, 1.0, low, high)


def _place(
    rng: np.random.Generator, groups: tuple[Group, ...], relation: str | None, position: str | None, canvas: int
) -> tuple[Placed, ...]:
    placed: list[Placed] = []
    for which, group in enumerate(groups):
        radius = SIZES[group.size] * UNIT
        offsets = _formation(group, radius, relation)
        across, down = zip(*offsets, strict=True)
        x0, x1, y0, y1 = (each * canvas for each in _region(which, relation))
        x, y = _grid_point(rng, x0, x1, radius, across), _grid_point(rng, y0, y1, radius, down)
        if position is not None:
            x, y = (each * canvas for each in POSITIONS[position])
        placed += [Placed(which, (x + u) / canvas, (y + v) / canvas, radius / canvas) for u, v in offsets]
    return tuple(placed)


def _formation(group: Group, radius: float, relation: str | None) -> list[tuple[int, int]]:
    """Where the objects of a group stand from its first one, in px right and down.

    In a row; one above the other where the groups lie side by side; three of the middle size, too wide for a row on the
    smallest canvas, in a triangle. So a number is a figure that is learnt as a shape is.
    """
    if group.count == 3 and group.size == "":
        return [(0, 0), (2 * GRID, -2 * GRID), (4 * GRID, 0)]
    apart = GRID * int(np.ceil((2 * radius + MARGIN * UNIT) / GRID))
    places = [index * apart for index in range(group.count)]
    return [(0, place) if relation in ("left of", "right of") else (place, 0) for place in places]


def _grid_point(rng: np.random.Generator, low: float, high: float, radius: float, offsets: tuple[int, ...]) -> int:
    """A grid line, in px, from which objects of that radius at these offsets stay between `low` and `high`."""
    first = np.ceil((low + radius - min(offsets)) / GRID + 0.05)
    last = np.floor((high - radius - max(offsets)) / GRID - 0.05)
    return GRID * int(rng.integers(int(first), int(last) + 1))


def outline_distance(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline (negative inside), `u` to the right and `v` down from the centre."""
    if shape == "circle":
        return np.hypot(u, v) - radius * 0.92
    if shape == "ring":
        return np.abs(np.hypot(u, v) - radius * 0.74) - radius * 0.23
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - radius * 0.78
    if shape == "cross":
        long, thick = radius * 0.95, radius * 0.31
        first = np.maximum(np.abs(u) - long, np.abs(v) - thick)
        second = np.maximum(np.abs(u) - thick, np.abs(v) - long)
        return np.minimum(first, second)
    if shape == "triangle":
        lean = np.abs(u) * np.float32(np.sqrt(3) / 2) - v * np.float32(0.5)
        return np.maximum(lean, v) - radius * 0.54
    if shape == "star":
        sector = np.float32(np.pi / 5)
        angle = np.arctan2(u, -v)
        folded = np.abs(np.mod(angle + sector, 2 * sector) - sector)
        length = np.hypot(u, v)
        along, across = length * np.cos(folded), length * np.sin(folded)
        outer = radius * 1.05
        inner = outer * 0.5
        tip, notch = np.array([outer, 0.0]), inner * np.array([np.cos(sector), np.sin(sector)])
        edge = notch - tip
        normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
        return ((along - tip[0]) * normal[0] + across * normal[1]).astype(np.float32)
    raise ValueError(f"unknown shape {shape!r}")


def _patch(placed: Placed, shape: str, axis: np.ndarray) -> tuple[slice, slice, np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns around an object, the signed distance there, and the offsets u, v from its centre."""
    size = len(axis)
    reach = placed.radius * 1.25 + 2 / size
    centre_y = placed.y + (placed.radius * 0.18 if shape == "triangle" else 0.0)
    columns = slice(max(0, int((placed.x - reach) * size)), min(size, int((placed.x + reach) * size) + 1))
    rows = slice(max(0, int((centre_y - reach) * size)), min(size, int((centre_y + reach) * size) + 1))
    across, down = axis[columns] - np.float32(placed.x), axis[rows] - np.float32(centre_y)
    u, v = np.broadcast_arrays(across[None, :], down[:, None])
    return rows, columns, outline_distance(shape, u, v, placed.radius), u, v


def _draw_background(scene: Scene, axis: np.ndarray) -> np.ndarray:
    base = np.array(BACKGROUNDS[scene.background], np.float32)
    image = np.empty((len(axis), len(axis), 3), np.float32)
    image[:] = base * (1.05 - 0.12 * axis)[:, None, None]
    period, shift = 0.25 * scene.unit(), 0.0625 * scene.unit()

    def wave(t: np.ndarray) -> np.ndarray:
        triangle = np.abs(np.mod(t / period, 1) - 0.5) - 0.25
        return np.clip(triangle * np.float32(period * len(axis)), -0.5, 0.5)

    if scene.pattern == "striped":
        band = wave(axis[None, :] + axis[:, None]) + 0.5
        image *= (1 - 0.16 * band)[..., None]
    elif scene.pattern == "checkered":
        check = 2 * wave(axis[None, :] + shift) * wave(axis[:, None] + shift) + 0.5
        image *= (1 - 0.16 * check)[..., None]
    return image


def stripe_colour(colour: str) -> np.ndarray:
    """The second colour of a striped object, float32 `[3]`.

    White and black have none: their gray stripes would be lost on a shaded background.
    """
    return np.array(COLOURS[colour], np.float32) * np.float32(0.55)


def _object_colour(
    group: Group, placed: Placed, scene: Scene, distance: np.ndarray, v: np.ndarray, size: int
) -> np.ndarray:
    base = np.array(COLOURS[group.colour], np.float32)
    colour = np.broadcast_to(base, (*distance.shape, 3))
    if group.fill == "striped":
        partner = stripe_colour(group.colour)
        period = 0.09 * scene.unit()
        triangle = np.abs(np.mod(v / period, 1) - 0.5) - 0.25
        band = np.clip(triangle * period * size + 0.5, 0, 1)[..., None]
        colour = colour * (1 - band) + partner * band
    elif group.fill == "outlined":
        ink = np.array((245, 245, 245) if group.colour == "black" else (20, 20, 24), np.float32)
        band = np.clip(0.5 + (distance + 0.024 * scene.unit()) * size, 0, 1)[..., None]
        colour = colour * (1 - band) + ink * band
    return colour


def _draw_chalk(scene: Scene, size: int, axis: np.ndarray) -> np.ndarray:
    """The scene as rough white outlines on a black board."""
    seed = int(abs(scene.objects[0].x) * 1e6)
    grain = np.random.default_rng(seed).random((32, 32), dtype=np.float32)
    where = (axis * 31).astype(int)
    rough = grain[where][:, where] * 0.35 + 0.65
    board = np.full((size, size), 18, np.float32)
    width = 0.011 * scene.unit()
    for placed in scene.objects:
        group = scene.groups[placed.group]
        rows, columns, distance, _, _ = _patch(placed, group.shape, axis)
        line = np.clip(0.5 + (width - np.abs(distance + width)) * size, 0, 1)
        board[rows, columns] = board[rows, columns] * (1 - line) + 235 * line * rough[rows, columns]
    return np.repeat((board + 0.5).astype(np.uint8)[..., None], 3, axis=-1)
