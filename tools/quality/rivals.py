"""Step caches of others on the same work, in plain diffusers: its first-block cache and MagCache, and cache-dit."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ...parallel_backend.errors import UserError
from .sampling import Diffusers, Made, Task

RATIOS = re.compile(r"\[1\.0, .*?\]")
"""What diffusers prints when it has calibrated MagCache: one list for each prompt."""


@dataclass(frozen=True)
class Rival:
    """A cache of diffusers by its name, or cache-dit's, with the threshold that its makers call so."""

    name: str
    threshold: float

    def __str__(self) -> str:
        return f"{RIVALS[self.name][0]} {self.threshold:g}"


def parse_rival(text: str) -> Rival:
    """From `name=threshold`. Raises `UserError` for a name that is not known, or no number."""
    name, _, threshold = text.partition("=")
    try:
        return Rival(RIVALS[name] and name, float(threshold))
    except (KeyError, ValueError) as error:
        known = ", ".join(f"{each}=0.2" for each in RIVALS)
        raise UserError(f"{text!r} names no cache of others.", f"Write it like {known}.") from error


def sample_by(rival: Rival | None, task: Task) -> Made:
    """All pictures of the task by plain diffusers, with that cache. Raises `UserError` where it is not installed."""
    diffusers = Diffusers(task)
    pipeline = diffusers.pipeline
    computed: list[None] = []
    # What a cache passes over never comes to the attention of the last block.
    last = pipeline.transformer.single_transformer_blocks[-1].attn
    last.register_forward_pre_hook(lambda *_: computed.append(None))
    if rival:
        RIVALS[rival.name][1](pipeline, rival, task)
    started = time.monotonic()
    latents = diffusers.latents()
    seconds = time.monotonic() - started
    with torch.inference_mode():
        decoded = pipeline.vae.decode(latents).sample
    pictures = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    evaluations = 2 * task.steps * len(list(task.batches()))
    return Made(latents, pictures.contiguous(), seconds, (len(computed), evaluations))


def _first_block(pipeline: Any, rival: Rival, task: Task) -> None:
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=rival.threshold))


def _magcache(pipeline: Any, rival: Rival, task: Task) -> None:
    """Calibrated on the first caption, as its makers do for a model that they have no ratios of."""
    from diffusers.hooks.mag_cache import MagCacheConfig

    calibrated = Diffusers(Task(task.model, task.captions[:1], task.size, task.steps, task.cfg, 1, task.seed))
    calibration = MagCacheConfig(calibrate=True, num_inference_steps=task.steps)
    calibrated.pipeline.transformer.enable_cache(calibration)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        calibrated.latents()
    ratios = json.loads(RATIOS.findall(printed.getvalue())[0])
    pipeline.transformer.enable_cache(
        MagCacheConfig(threshold=rival.threshold, num_inference_steps=task.steps, mag_ratios=ratios)
    )


def _cache_dit(pipeline: Any, rival: Rival, task: Task) -> None:
    """Its cache of the first block, without the others that its default always computes."""
    try:
        import cache_dit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("cache-dit is not installed.", "Install it with `pip install cache-dit`.") from error
    settings = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=2,
        residual_diff_threshold=rival.threshold,
        enable_separate_cfg=True,
    )
    cache_dit.enable_cache(pipeline, cache_config=settings)


RIVALS: dict[str, tuple[str, Callable[[Any, Rival, Task], None]]] = {
    "first-block": ("diffusers' FirstBlockCache", _first_block),
    "magcache": ("diffusers' MagCache", _magcache),
    "cache-dit": ("cache-dit", _cache_dit),
}
"""What each is called in tables, and what puts it on a pipeline."""
ALL_RIVALS = (
    *(f"first-block={threshold}" for threshold in (0.05, 0.1, 0.2)),
    *(f"magcache={threshold}" for threshold in (0.06, 0.2)),
    *(f"cache-dit={threshold}" for threshold in (0.1, 0.2) if find_spec("cache_dit")),
)
"""Every cache of others that is installed, at some thresholds."""
