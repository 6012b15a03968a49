"""What LoRA files and graphs call the parameters of a model, and which rows of which parameters they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UserError
from ...families.spec import FamilySpec, Rule, Shapes, joined
from ...layout.stages import block_of

WEIGHT, BIAS = ".weight", ".bias"
DOTTED = {
    "diffusers": ("transformer.", "base_model.model.", "unet.base_model.model.", "unet.", "diffusion_model.", ""),
    "original": ("diffusion_model.", "model.diffusion_model.", "base_model.model.", ""),
}
"""What may stand before a module's name, by whose name it is."""
UNDERSCORED = {
    "diffusers": ("lora_transformer_", "lycoris_", "lora_unet_"),
    "original": ("lora_unet_", "lora_unet__"),
}
"""The same where the dots of the name are underscores: kohya, LyCORIS and their like."""


@dataclass(frozen=True)
class Place:
    """`parameter` of the model (as diffusers names it) holds, row by row, the rows `rows` of what has another name.

    `is_whole`: that holds no other rows.
    """

    parameter: str
    rows: Tensor
    is_whole: bool

    def of(self, start: int, length: int) -> Place | None:
        """The same in what is rows `[start, start + length)` of that; None where these are not of this parameter.

        Raises `UserError` where they are a part of it.
        """
        inside = (self.rows >= start) & (self.rows < start + length)
        if not inside.any():
            return None
        if not inside.all():
            raise UserError(f"It changes a part of {self.parameter}: {int(inside.sum())} of {len(inside)} rows.")
        return Place(self.parameter, self.rows - start, self.is_whole)


class _Module(NamedTuple):
    """What a name stands for: `stem` in a table of places, the first `parts` of them or all."""

    table: Mapping[str, Sequence[Place]]
    stem: str
    parts: int | None = None


class Names:
    """The names of a model of a family; `shapes`: its parameters, whole, as diffusers names them."""

    def __init__(self, spec: FamilySpec, shapes: Shapes) -> None:
        self.family = spec.name
        places = {name: place for name in shapes if (place := block_of(name, spec.blocks))}
        order = sorted(set(places.values()))
        self.blocks = {name: order.index(place) for name, place in places.items()}
        """The number of the block that each parameter in blocks is of."""
        own = {
            name: [Place(name, torch.arange(shape[0]), is_whole=True)] for name, shape in shapes.items() if len(shape)
        }
        original = original_places(spec.rules, shapes)
        mapped = {place.parameter for places in original.values() for place in places}
        self.original: Mapping[str, Sequence[Place]] = {
            **{name: places for name, places in own.items() if name not in mapped},
            **original,
        }
        """Places by the names of the original model's parameters, which are ComfyUI's too."""
        self._modules: dict[str, _Module] = {}
        for layout, table in (("original", self.original), ("diffusers", own)):
            # What is no weight (a bias, a table, a norm's scale) goes by its whole name.
            for stem in (name.removesuffix(WEIGHT) for name in table):
                for alias in _aliases(layout, stem):
                    self._modules.setdefault(alias, _Module(table, stem))
            for row in (row for row in spec.lora_names if row.layout == layout):
                for stem in (name.removesuffix(WEIGHT) for name in table if name.endswith(WEIGHT)):
                    called, is_one = re.subn(row.pattern, row.called, stem)
                    for alias in _aliases(row.like or layout, called) if is_one else ():
                        self._modules.setdefault(alias, _Module(table, stem, row.parts or None))

    def __contains__(self, module: str) -> bool:
        """Whether a file may call a module of this model so."""
        return module in self._modules

    def places(self, module: str, leaf: str) -> Sequence[Place]:
        """The places of the `leaf` (".weight" or ".bias") of a module, as a file names it; empty if it has none."""
        table, stem, parts = self._modules[module]
        found = table.get(stem + leaf)
        return (table.get(stem, ()) if found is None and leaf == WEIGHT else found or ())[:parts]


def _aliases(layout: str, stem: str) -> Iterable[str]:
    yield from (prefix + stem for prefix in DOTTED[layout])
    underscored = stem.replace(".", "_")
    yield from (prefix + underscored for prefix in UNDERSCORED[layout])


def original_places(rules: Iterable[Rule], shapes: Shapes) -> dict[str, list[Place]]:
    """Maps the original model's names to the parameters that hold their rows, by `rules`."""
    last: dict[str, int] = {}
    for name in shapes:
        if found := re.match(r"(\w+)\.(\d+)\.", name):
            last[found[1]] = max(int(found[2]), last.get(found[1], 0))
    places: dict[str, list[Place]] = {}
    for rule in sorted(rules, key=lambda rule: "{last}" not in rule.source):
        for suffix, leaf in rule.suffixes.items():
            targets = [joined(target, leaf) for target in rule.targets]
            for number in _numbers(targets[0], last):
                filled = [re.sub(r"\{(i|last)\}", number, target) for target in targets]
                if all(target in shapes for target in filled):
                    source = re.sub(r"\{(i|last)\}", number, joined(rule.source, suffix))
                    places.setdefault(source, _stacked(filled, shapes, rule.swap_halves))
    return places


def _numbers(target: str, last: Mapping[str, int]) -> list[str]:
    """The numbers of the blocks that have a parameter of the name `target`; one that is no number outside of blocks."""
    stem, found, rest = target.partition(".{")
    if not found:
        return [""]
    if stem not in last:
        return []
    return [str(last[stem])] if rest.startswith("last") else [str(number) for number in range(last[stem] + 1)]


def _stacked(targets: Sequence[str], shapes: Shapes, swap_halves: bool) -> list[Place]:
    places, start = [], 0
    for target in targets:
        rows = torch.arange(start, start + shapes[target][0])
        start += len(rows)
        places.append(Place(target, rows.roll(len(rows) // 2) if swap_halves else rows, len(targets) == 1))
    return places
