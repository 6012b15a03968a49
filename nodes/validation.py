"""Shared by the nodes' VALIDATE_INPUTS."""

from __future__ import annotations

from collections.abc import Callable

from ..parallel_backend.errors import UserError


def verdict(check: Callable[..., object], *inputs: object) -> bool | str:
    """What VALIDATE_INPUTS answers: True, or the reason why `check(*inputs)` raised `UserError`.

    An input that another node gives arrives as None before the run; then the check waits for the run.
    """
    if any(value is None for value in inputs):
        return True
    try:
        check(*inputs)
    except UserError as error:
        return str(error)
    return True
