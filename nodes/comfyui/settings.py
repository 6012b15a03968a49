"""What the pack's page in ComfyUI's settings says of the sidecar. The page itself is web/settings.js.

ComfyUI keeps its settings in a file that any of its pages may read: of a token, they hold the path of its file only.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...launcher.spec import REMOTE_VARIABLE, SidecarSpec, usual_spec, usual_token_file
from ...parallel_backend.errors import UserError
from ...parallel_backend.layout.layout import MAX_DEGREE

WRITING_S = 0.5
"""ComfyUI writes the file in place, which takes it a moment."""
AGAIN_S = 0.02
PAGE = "Open ComfyUI's settings, and there ParallelDiT."


class PageSettings(BaseModel):
    """The page's values by the names under which ComfyUI keeps them. Raises `ValidationError`."""

    model_config = ConfigDict(str_strip_whitespace=True)

    ranks: int = Field(default=0, ge=0, le=MAX_DEGREE, alias="ParallelDiT.Ranks")
    idle_minutes: float = Field(default=30, ge=0, le=1e6, allow_inf_nan=False, alias="ParallelDiT.IdleMinutes")
    remote_address: str = Field(default="", alias="ParallelDiT.RemoteAddress")
    token_file: str = Field(default="", alias="ParallelDiT.TokenFile")


def spec_of(file: Path) -> SidecarSpec:
    """The sidecar of the page's settings in `file`; what the environment says of one elsewhere wins, even if empty.

    Raises `UserError` naming the setting that is wrong.
    """
    if os.environ.get(REMOTE_VARIABLE):
        return usual_spec()
    page = read(file)
    if page.remote_address and REMOTE_VARIABLE not in os.environ:
        named = Path(page.token_file).expanduser() if page.token_file else None
        return SidecarSpec(remote=True, address=page.remote_address, token_file=usual_token_file() or named)
    return SidecarSpec(ranks=page.ranks, idle_timeout=60 * page.idle_minutes)


def read(file: Path) -> PageSettings:
    """The page's settings in ComfyUI's file, which may not be there yet. Raises `UserError`."""
    kept = {name: value for name, value in _json(file).items() if value is not None}
    try:
        return PageSettings.model_validate(kept)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        raise UserError(f"{name}={wrong['input']!r} in ComfyUI's settings: {wrong['msg']}.", PAGE) from error


def _json(file: Path) -> dict[str, Any]:
    deadline = time.monotonic() + WRITING_S
    while True:
        try:
            found = json.loads(file.read_bytes())
            if isinstance(found, dict):
                return found
            raise UserError(f"{file} holds no settings.", "Mend it, or remove it: ComfyUI writes a new one.")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"ComfyUI's settings {file} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            if time.monotonic() > deadline:
                hint = "Mend it, or remove it: ComfyUI writes a new one."
                raise UserError(f"ComfyUI's settings {file} are no JSON: {error}.", hint) from error
        time.sleep(AGAIN_S)
