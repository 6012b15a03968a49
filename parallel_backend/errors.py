"""The errors that reach a user."""

from __future__ import annotations

SHOWN_MODULE = "ParallelDiT"
"""What ComfyUI shows before the names of errors, instead of the path of a file."""


class UserError(Exception):
    """An error for the user. `message` names what is wrong (and the numbers that clash), `hint` what to do."""

    __module__ = SHOWN_MODULE

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint


class Cancelled(Exception):
    """The user cancelled the run; every rank leaves it at the same step."""

    __module__ = SHOWN_MODULE
