"""Widgets that several nodes share, and the checks of what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..parallel_backend.errors import UserError

LAYOUT_INPUT = (
    "PARALLELDIT_LAYOUT",
    {"tooltip": "How the ranks share the work. Without it: all GPUs (or 2 ranks on CPU) and the largest exact layout."},
)

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


def verdict(check: Callable[..., object], *inputs: object) -> bool | str:
    """What VALIDATE_INPUTS returns: True, or the reason why `check(*inputs)` raised `UserError`.

    An input that another node gives arrives as None before the run; then the check waits for the run.
    """
    if any(value is None for value in inputs):
        return True
    try:
        check(*inputs)
    except UserError as error:
        return str(error)
    return True
