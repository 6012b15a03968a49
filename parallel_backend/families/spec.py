"""What a family's files say: rules from their names to the model's, and how tensors are cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError

SUFFIXES = {"weight": "weight", "bias": "bias"}


@dataclass(frozen=True)
class LatentSpec:
    """One latent that a model samples: `[B, C, H, W]` with 2 `dims`, `[B, C, T, H, W]` with 3.

    `stride`: frames, rows and columns of pixels (of any signal) to a cell. `patch`: frames, rows and columns of cells
    to a token. The model's own latent is `((x - mean) / std - shift) * scale` of the VAE's, mean and deviation given
    by channel, if at all. `channels_last`: whether a token's values are those of its first cell in all channels, then
    of the next, rather than all cells of the first channel first. `multiple`: frames, rows and columns of cells are
    multiples of these. `first_frame_alone`: a first frame is a cell of its own, `1 + (frames - 1) / stride` in all.
    `kept`: what an area that a mask keeps is while the rest is sampled: noised to the level at hand, or clean.
    """

    channels: int
    name: str = "image"
    dims: Literal[2, 3] = 2
    stride: tuple[int, int, int] = (1, 8, 8)
    patch: tuple[int, int, int] = (1, 2, 2)
    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels_last: bool = False
    multiple: tuple[int, int, int] = (1, 1, 1)
    first_frame_alone: bool = True
    kept: Literal["noised", "clean"] = "noised"


@dataclass(frozen=True)
class Rule:
    """The modules `targets` hold the rows of the module `source`, in order; the target "" is the model itself.

    `{i}` stands for a block's number, `{last}` for the last block's: a rule with it comes before those with `{i}`.
    `swap_halves`: the target holds the second half of the source's rows first. `suffixes`: parameter names, source
    to target.
    """

    source: str
    targets: tuple[str, ...]
    swap_halves: bool = False
    suffixes: Mapping[str, str] = field(default_factory=lambda: SUFFIXES)


@dataclass(frozen=True)
class HeadGroup:
    """Attention heads that are cut alike. `count`, `width`: what the config calls their number and their channels.

    `serves`: the group of the query heads that attend to these, where they are fewer (grouped-query attention). A rank
    has those that its own query heads attend to, so that ranks repeat them rather than cut them.
    """

    count: str
    width: str | int
    serves: str | None = None


HEADS: Mapping[str, HeadGroup] = {"heads": HeadGroup("num_attention_heads", "attention_head_dim")}
FEATURES = "features"


@dataclass(frozen=True)
class Cut:
    """How the layers of a block are cut whose names within it match the regular expression `layers`.

    "column": a rank computes some of the outputs, and keeps them. "row": a rank takes the inputs that it has, and the
    outputs of all ranks are added up; the bias is the first rank's. "gathered": as "column", and every rank gets the
    outputs of all. "norm": a root mean square norm over heads that the ranks have parts of; they add up the squares.
    `spans`: what the cut dim consists of, in order, each cut by itself: a group of heads by its name, or "features" (an
    even part of what remains). A norm has one group of heads.
    """

    layers: str
    style: Literal["column", "row", "gathered", "norm"]
    spans: tuple[str, ...] = (FEATURES,)


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FileFamily:
    """What loading knows of a family: how to recognise its files, its config from their shapes, its key rules.

    `landmarks`: per layout ("original", "diffusers") the keys that only this family has together.
    `derive_config(layout, shapes, declared config)` gives the arguments of the diffusers class. `cuts`: of the layers
    of its blocks, by the groups of `heads` that they name; tensor-parallel ranks hold all of a layer that is in no row.
    `older_class_names`: what config.json of an older diffusers calls the class; `not_weights`: keys of tensors that the
    module does not need; `never_fp8`: modules whose matrices other modules use.
    """

    name: str
    class_name: str
    landmarks: Mapping[str, Mapping[str, str]]
    rules: tuple[Rule, ...]
    derive_config: Callable[[str, Shapes, Mapping[str, Any]], dict[str, Any]]
    cuts: tuple[Cut, ...] = ()
    heads: Mapping[str, HeadGroup] = field(default_factory=lambda: HEADS)
    older_class_names: tuple[str, ...] = ()
    not_weights: tuple[str, ...] = ()
    never_fp8: tuple[str, ...] = ()


def count_blocks(shapes: Shapes, stem: str) -> int:
    """Number of blocks `stem.0`, `stem.1`, …; raises UserError if one is missing in between."""
    numbers = {int(match.group(1)) for key in shapes if (match := re.match(rf"{re.escape(stem)}\.(\d{{1,9}})\.", key))}
    if numbers and max(numbers) + 1 != len(numbers):
        first = next(number for number in range(len(numbers)) if number not in numbers)
        raise UserError(
            f"Block {stem}.{first} is missing; there are {len(numbers)} blocks up to number {max(numbers)}."
        )
    return len(numbers)


def joined(module: str, name: str) -> str:
    """The name of a parameter of `module`, which may be the model itself."""
    return ".".join(part for part in (module, name) if part)
