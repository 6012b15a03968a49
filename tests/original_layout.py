"""The weights of a diffusers model under their original names, by its family's rules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from paralleldit.parallel_backend.adapters.lora.module_names import original_places
from paralleldit.parallel_backend.families.spec import FamilySpec
from torch import Tensor


def originals_of(spec: FamilySpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of several original names of a weight the first one.

    The rules are proved against the converters of diffusers and by what ComfyUI's network makes of such a file.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    named: dict[str, Tensor] = {}
    done: set[str] = set()
    for key, places in original_places(spec.rules, shapes).items():
        if places[0].parameter in done:
            continue
        rows = torch.cat([place.rows for place in places])
        whole = torch.cat([weights[place.parameter] for place in places])
        named[key] = torch.empty_like(whole).index_copy(0, rows, whole)
        done |= {place.parameter for place in places}
    return named | {name: weight.contiguous() for name, weight in weights.items() if name not in done}
