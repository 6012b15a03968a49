"""Parallel Cache: skips blocks of the model where they would change little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..parallel_backend.protocol.messages import CacheRule, StepCache
from . import host
from .handles import handle_of
from .study.findings import Findings, check_blocks, load
from .widgets import SPAN, allowed, check_span

ORDERS = {"linear": 1, "same": 0, "quadratic": 2}
"""How what the skipped blocks add is predicted, and the order of the polynomial."""
KINDS: tuple[CacheRule, ...] = get_args(CacheRule)
Prediction = Literal["same", "linear", "quadratic"]


IDLE = "the cache would never work"


class ParallelDiTCache:
    CATEGORY = "ParallelDiT"
    DESCRIPTION = (
        "Skips blocks where they would change little (first-block cache or TeaCache). Faster; the picture changes a "
        "little. The sampler's node says how many evaluations were computed in full."
    )
    SEARCH_ALIASES = ("fbcache", "first block cache", "teacache", "easycache", "step cache", "speed up")
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model with the cache, for a sampler.",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From Parallel Loader or Parallel LoRA."}),
                "kind": (
                    list(KINDS),
                    {
                        "default": KINDS[0],
                        "tooltip": "What tells that little changes: what the first block adds, or how the time changes "
                        "its input (TeaCache; its authors give 0.25, 0.4 and 0.6 as thresholds for Flux), or a "
                        "schedule that Parallel Redundancy has found for the model: of blocks, or of attention alone.",
                    },
                ),
                "threshold": (
                    "FLOAT",
                    {
                        "default": 0.2,
                        "min": 0.0,
                        "max": 2.0,
                        "step": 0.01,
                        "tooltip": "How much what the kind looks at may have changed, relative to it, for blocks to be "
                        "skipped. More skips more; 0 skips nothing.",
                    },
                ),
            },
            "optional": {
                "prediction": (
                    list(ORDERS),
                    {
                        "default": "linear",
                        "tooltip": "What skipped blocks add: the same as the last time, or what the last two or three "
                        "times lead to.",
                    },
                ),
                "max_skips": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 100,
                        "tooltip": "The most evaluations in a row that are skipped. 0: any number.",
                    },
                ),
                **SPAN,
                "study": (
                    "PARALLELDIT_STUDY",
                    {
                        "tooltip": "From Parallel Redundancy: the schedule, and TeaCache's polynomial. Without it a "
                        "schedule is the one that lies beside the model.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, start_percent: float = 0.0, end_percent: float = 1.0) -> bool:
        return allowed(check_span, start_percent, end_percent, IDLE)

    def add(
        self,
        model: Any,
        kind: CacheRule,
        threshold: float,
        prediction: Prediction = "linear",
        max_skips: int = 0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        study: Findings | None = None,
    ) -> tuple[Any]:
        check_span(start_percent, end_percent, IDLE)
        handle = handle_of(model)
        if kind in ("schedule", "attention") and study is None:
            study = load(Path(handle.ref.path))
        if study is not None:
            check_blocks(study, handle.spec.count_blocks(handle.config))
        cache = StepCache(
            rule=kind,
            threshold=threshold,
            max_skips=max_skips,
            order=ORDERS[prediction],
            start=start_percent,
            end=end_percent,
            coefficients=study.coefficients if study and kind == "teacache" else (),
            rates=study.rates if study and kind == "schedule" else (),
            attention=study.attention if study and kind == "attention" else (),
        )
        return (host.current().with_handle(model, replace(handle, cache=cache)),)
