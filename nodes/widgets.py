"""Widgets that several nodes share, and the checks of what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..parallel_backend.errors import UserError
from .session.activity import activity

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


def check_characters(what: str, text: str) -> None:
    """Raises `UserError` for a text with half a character, which cannot be sent: the other half was lost on its way."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds half a character (U+{ord(text[error.start]):04X}) at position {error.start + 1}, after "
            f"{text[max(0, error.start - 12) : error.start]!r}.",
            "Delete it, and type the character again.",
        ) from error


def verdict(check: Callable[[Any], object], value: object) -> bool | str:
    """What VALIDATE_INPUTS of one input returns: True, or the reason why `check(value)` raised `UserError`.

    An input that another node gives arrives as None before the run; then the check waits for the run.
    """
    try:
        return allowed(check, value)
    except UserError as error:
        return str(error)


def allowed(check: Callable[..., object], *inputs: object) -> bool:
    """What VALIDATE_INPUTS of inputs that may not fit each other returns: True, unless `check(*inputs)` raises.

    ComfyUI shows what is raised once, and a reason that is returned once for each of the inputs.
    """
    if not any(value is None for value in inputs):
        with activity.during():
            check(*inputs)
    return True
