"""The methods that are compared: their names on the command line, in tables and on sheets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args

from ...nodes.study.findings import load
from ...parallel_backend.errors import UserError
from ...parallel_backend.layout.layout import Layout
from ...parallel_backend.protocol.messages import CacheRule, StepCache

FIRST_BLOCK = "first block"


@dataclass(frozen=True)
class Method:
    """What makes the pictures of a column: the ranks' layout, and a step cache, if there is one."""

    layout: Layout
    cache: StepCache | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, (name_of(self.layout), _cache_name(self.cache))))


PRESETS: dict[str, tuple[Layout, ...]] = {
    "exact": (
        Layout(ulysses_degree=2),
        Layout(ring_degree=2),
        Layout(cfg_degree=2),
        Layout(ulysses_degree=2, cfg_degree=2),
    ),
    "pipefusion": tuple(
        Layout(pipefusion_degree=2, num_patches=patches, warmup_steps=warmup)
        for patches, warmup in product((2, 4, 8), (0, 1, 2, 4))
    ),
    "distrifusion": tuple(
        Layout(distrifusion_degree=2, warmup_steps=warmup, refresh=refresh)
        for refresh, warmup in product(("all", "in_turn"), (1, 2, 4))
    ),
}


ALL_CACHES = (
    *(f"{threshold},order=1" for threshold in (0.1, 0.2, 0.3)),
    *(f"schedule,{threshold},order=1" for threshold in (0.15, 0.25, 0.35)),
    *(f"teacache,{threshold},order=1" for threshold in (0.15, 0.3)),
    *(f"attention,{threshold}" for threshold in (0.1, 0.2)),
)
"""Every kind of cache at some thresholds."""


def name_of(layout: Layout) -> str:
    """What a reader needs to tell this layout from others."""
    name = str(layout)
    if layout.pipefusion_degree > 1:
        name += f", M={layout.num_patches or 'auto'}, W={layout.warmup_steps}"
    if layout.distrifusion_degree > 1:
        name += f", refresh {layout.refresh}, W={layout.warmup_steps}"
    return name if layout.attention == "auto" else f"{name}, {layout.attention}"


def parse_cache(text: str, model: Path) -> StepCache:
    """A cache from `name=value,...`, or from its threshold alone; `rule` may be given by its name alone, too.

    A schedule's rates, and TeaCache's coefficients, are those of the study beside the `model`. Raises `UserError` for
    what is none.
    """
    given: dict[str, object] = {}
    try:
        for part in text.split(","):
            name, found, value = part.partition("=")
            if found:
                given[name] = json.loads(value)
            elif part in get_args(CacheRule):
                given["rule"] = part
            else:
                given["threshold"] = json.loads(part)
        if given.get("rule", FIRST_BLOCK) != FIRST_BLOCK:
            study = load(model)
            given |= {"rates": study.rates, "coefficients": study.coefficients, "attention": study.attention}
        return StepCache.model_validate_json(json.dumps(given))
    except ValueError as error:
        raise UserError(
            f"{text!r} names no step cache: {error}", "Write it like threshold=0.1,order=1 or schedule,0.2,order=1."
        ) from error


def _cache_name(cache: StepCache | None) -> str:
    if cache is None:
        return ""
    given = cache.model_dump(exclude_defaults=True, exclude={"rule", "threshold", "rates", "coefficients", "attention"})
    settings = (f"{name} {value:g}" for name, value in given.items())
    return ", ".join([f"{cache.rule if cache.rule != FIRST_BLOCK else 'cache'} {cache.threshold:g}", *settings])
