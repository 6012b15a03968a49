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
        is_picture = path.suffix.lower() in (".png", ".webp")
        api = json.loads(_prompt_of_picture(path) if is_picture else _text_of(path))
    except OSError as error:
        raise UserError(f"The workflow {path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if isinstance(api, dict) and isinstance(api.get("prompt"), dict):
        api = api["prompt"]  # what is sent to ComfyUI's /prompt
    if not isinstance(api, dict):
        raise UserError(f"{path} is not a workflow in ComfyUI's API format.")
    return api


def _text_of(path: Path) -> str:
    """The text of a file in any of JSON's encodings, which Windows' programs begin with a mark."""
    content = path.read_bytes()
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is in an encoding that is none of JSON's: byte {error.start} is no {encoding}.",
            "Save it as UTF-8, or export it from ComfyUI again.",
        ) from error


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
