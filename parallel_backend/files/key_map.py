"""Maps the keys of a file to the parameters of a diffusers module, by a family's table of rules.

Every parameter becomes a list of pieces (row ranges along dim 0 of a file's tensor). One piece is a view of the
mapping, so fused matrices (qkv, qkv+mlp) are split without a copy; several pieces are concatenated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import UserError
from ..families.spec import Rule, Shapes, joined

BLOCK_INDEX = re.compile(r"(\w+)\.(\d{1,9})\.")
COMPANIONS = {"weight_scale": ("scale_weight", "weight_scale")}
"""Tensors that accompany a scaled matrix in files, and their names there; ComfyUI's newer files use the last."""
COMPANION_NAMES = {name for names in COMPANIONS.values() for name in names}
INPUT_SCALES = {"scale_input", "input_scale"}  # for fp8 matrix units only
SCALED_FP8 = "scaled_fp8"  # ComfyUI's marker of a scaled fp8 file


@dataclass(frozen=True)
class Piece:
    """Rows `[start, stop)` of the file's tensor `key`; `companions`: the keys of its scales, by kind."""

    key: str
    start: int
    stop: int
    companions: Mapping[str, str]


def identity_map(shapes: Shapes, expected: Shapes) -> dict[str, list[Piece]]:
    """Pieces for every parameter in `expected` from a file that already has its names."""
    return _checked([(key, (key,), False) for key in _weights(shapes)], shapes, expected)


def ruled_map(rules: Iterable[Rule], shapes: Shapes, expected: Shapes) -> dict[str, list[Piece]]:
    """Pieces for every parameter in `expected` from a file in the layout that `rules` describe.

    `shapes`: the file's keys (without prefix) and shapes. Raises UserError if a key is missing, left over or of the
    wrong shape.
    """
    by_source = {
        joined(rule.source, suffix): (rule.swap_halves, [joined(target, name) for target in rule.targets])
        for rule in rules
        for suffix, name in rule.suffixes.items()
    }
    last: dict[str, int] = {}
    for block in filter(None, map(BLOCK_INDEX.match, shapes)):
        last[block[1]] = max(int(block[2]), last.get(block[1], 0))
    routes = []
    for key in _weights(shapes):
        # The number may be one of a plain sequence of layers, not a block's.
        block, number, patterns = BLOCK_INDEX.match(key), "", [key]
        if block:
            stem, number = block.groups()
            places = ("{last}", "{i}") if int(number) == last[stem] else ("{i}",)
            patterns += [f"{stem}.{place}.{key[block.end() :]}" for place in places]
        swap_halves, targets = next((by_source[each] for each in patterns if each in by_source), (False, [key]))
        names = tuple(target.replace("{i}", number).replace("{last}", number) for target in targets)
        routes.append((key, names, swap_halves))
    return _checked(routes, shapes, expected)


def _weights(shapes: Shapes) -> list[str]:
    others = COMPANION_NAMES | INPUT_SCALES
    return [key for key in shapes if key != SCALED_FP8 and key.rsplit(".", 1)[-1] not in others]


def _checked(
    routes: list[tuple[str, tuple[str, ...], bool]], shapes: Shapes, expected: Shapes
) -> dict[str, list[Piece]]:
    """Cuts the rows of every route's key for its targets; `routes`: (key, targets, swap_halves)."""
    pieces: dict[str, list[Piece]] = {}
    unexpected, wrong = [], []
    for key, targets, swap_halves in routes:
        if not expected.keys() >= set(targets):
            unexpected.append(key)
            continue
        needed = (sum(expected[target][0] for target in targets), *expected[targets[0]][1:])
        if shapes[key] != needed:
            wrong.append(f"{key} is {list(shapes[key])}, expected {list(needed)}")
        companions = _companions(key, shapes)
        start = 0
        for target in targets:
            stop = start + expected[target][0]
            middle = (start + stop) // 2
            cuts = [(middle, stop), (start, middle)] if swap_halves else [(start, stop)]
            pieces[target] = [Piece(key, *cut, companions) for cut in cuts]
            start = stop
    faults = [
        f"{len(items)} {what}: {'; '.join(items[:3])}{' …' if len(items) > 3 else ''}"
        for what, items in (
            ("missing", sorted(expected.keys() - pieces.keys())),
            ("unexpected", unexpected),
            ("of the wrong shape", wrong),
        )
        if items
    ]
    if faults:
        raise UserError(f"The weights do not fit the model: {', and '.join(faults)}.", "Is it a complete model file?")
    return pieces


def _companions(key: str, shapes: Shapes) -> dict[str, str]:
    """Maps each kind of companion of the matrix `key` to the companion's key."""
    if not key.endswith(".weight"):
        return {}
    module = key.removesuffix(".weight")
    named = {role: [f"{module}.{name}" for name in names] for role, names in COMPANIONS.items()}
    return {role: name for role, names in named.items() for name in names if name in shapes}
