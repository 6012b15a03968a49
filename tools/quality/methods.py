"""The methods that are compared: their names on the command line, in tables and on sheets."""

from __future__ import annotations

from itertools import product

from ...parallel_backend.layout.layout import Layout

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


def name_of(layout: Layout) -> str:
    """What a reader needs to tell this layout from others."""
    name = str(layout)
    if layout.pipefusion_degree > 1:
        name += f", M={layout.num_patches or 'auto'}, W={layout.warmup_steps}"
    if layout.distrifusion_degree > 1:
        name += f", refresh {layout.refresh}, W={layout.warmup_steps}"
    return name if layout.attention == "auto" else f"{name}, {layout.attention}"
