"""Reads a workflow and its NODE.INPUT=VALUE changes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ...parallel_backend.errors import UserError


def add_workflow_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which workflow it is, and where its files are."""
    add = parser.add_argument
    add("workflow", type=Path, help="the workflow in ComfyUI's API format, or a picture that was saved by one")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="change a value; NODE is an id or a title",
    )
    add("--input", type=Path, default=Path("input"), help="folder of LoadImage (default: input)")
    add("--models", type=Path, help="a folder laid out as ComfyUI's models folder")


EXIF_MODEL = 0x0110
"""The tag in which ComfyUI writes the workflow of a moving picture."""


def read_workflow(path: Path) -> dict[str, Any]:
    """A workflow in API format, from its file or from a picture that was saved by it. Raises `UserError`."""
    try:
        if path.suffix in (".png", ".webp"):
            return json.loads(_prompt_of_picture(path))
        api = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"The workflow {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(api, dict):
        raise UserError(f"{path} is not a workflow in ComfyUI's API format.")
    return api


def _prompt_of_picture(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        text = picture.info.get("prompt") or picture.getexif().get(EXIF_MODEL, "").removeprefix("prompt:")
    if not text:
        raise UserError(f"The picture {path} holds no workflow.")
    return text


def pair(text: str) -> tuple[str, str]:
    """NODE.INPUT and the value, of what --set was given. Raises `UserError`."""
    place, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r} is not of the form NODE.INPUT=VALUE.")
    return place, value
