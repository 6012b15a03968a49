"""The part of a run in which an adapter works: the inputs that tell it, and what is wrong with them."""

from __future__ import annotations

from typing import Any

from ..parallel_backend.errors import UserError

_SHARE = {"min": 0.0, "max": 1.0, "step": 0.001}
SPAN: dict[str, Any] = {
    "start_percent": (
        "FLOAT",
        {"default": 0.0, **_SHARE, "tooltip": "The part of the run after which it begins to work."},
    ),
    "end_percent": (
        "FLOAT",
        {"default": 1.0, **_SHARE, "tooltip": "The part of the run after which it works no more."},
    ),
}


def check_span(start: float, end: float, otherwise: str) -> None:
    """Raises `UserError` when it ends before it starts; `otherwise`: what would come of that."""
    if start > end:
        raise UserError(
            f"start_percent={start:g} is after end_percent={end:g}: {otherwise}.",
            "Make start_percent the smaller one.",
        )
