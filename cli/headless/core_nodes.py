"""The few nodes of ComfyUI that simple workflows need, under ComfyUI's names and with its behaviour."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...parallel_backend.errors import UserError
from .conditioning_nodes import CONDITIONING_NODES

MAX_SIDE = 16384
CELL = 8
"""Pixels per latent cell, in both directions."""


@dataclass(frozen=True)
class Folders:
    input: Path
    output: Path
    temp: Path


class EmptyLatentImage:
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "generate"
    channels: ClassVar[int] = 4

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = ("INT", {"default": 512, "min": 16, "max": MAX_SIDE})
        return {"required": {"width": side, "height": side, "batch_size": ("INT", {"min": 1, "max": 4096})}}

    def generate(self, width: int, height: int, batch_size: int) -> tuple[dict[str, Tensor]]:
        return ({"samples": torch.zeros(batch_size, self.channels, height // CELL, width // CELL)},)


class EmptySD3LatentImage(EmptyLatentImage):
    channels: ClassVar[int] = 16


class LoadImage:
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load"
    folders: ClassVar[Folders]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:
        path = cls.folders.input / image
        return True if path.is_file() else f"The picture {path} does not exist."

    def load(self, image: str) -> tuple[Tensor, Tensor]:
        """Picture `[1, H, W, 3]` and mask `[1, H, W]`: 1 where the picture is transparent."""
        try:
            with Image.open(self.folders.input / image) as file:
                picture = ImageOps.exif_transpose(file)
        except OSError as error:
            raise UserError(f"The picture {image!r} cannot be read: {error}.") from error
        pixels = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255.0)[None]
        if not picture.has_transparency_data:
            return pixels, torch.zeros(1, 64, 64)
        alpha = np.array(picture.convert("RGBA").getchannel("A"), dtype=np.float32) / 255.0
        return pixels, 1.0 - torch.from_numpy(alpha)[None]


class SaveImage:
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    folders: ClassVar[Folders]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": ("IMAGE", {}), "filename_prefix": ("STRING", {"default": "ComfyUI"})},
            "hidden": {"prompt": "PROMPT"},
        }

    def save(self, images: Tensor, filename_prefix: str, prompt: Any = None) -> dict[str, Any]:
        return {"ui": {"images": _save(images, self.folders.output, filename_prefix, prompt)}}


class PreviewImage:
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    folders: ClassVar[Folders]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE", {})}, "hidden": {"prompt": "PROMPT"}}

    def save(self, images: Tensor, prompt: Any = None) -> dict[str, Any]:
        return {"ui": {"images": _save(images, self.folders.temp, "ComfyUI_temp", prompt)}}


class Primitive:
    """Gives its value to other nodes."""

    FUNCTION = "give"
    options: ClassVar[dict[str, Any]] = {}
    RETURN_TYPES: ClassVar[tuple[str, ...]]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (cls.RETURN_TYPES[0], cls.options)}}

    def give(self, value: Any) -> tuple[Any]:
        return (value,)


_NUMBER = {"min": -sys.maxsize, "max": sys.maxsize}
_PRIMITIVES = {
    "PrimitiveInt": ("INT", _NUMBER),
    "PrimitiveFloat": ("FLOAT", _NUMBER),
    "PrimitiveString": ("STRING", {}),
    "PrimitiveStringMultiline": ("STRING", {"multiline": True}),
    "PrimitiveBoolean": ("BOOLEAN", {}),
}


def core_nodes(folders: Folders) -> dict[str, type]:
    """The nodes by name, reading and writing in `folders`."""
    plain = (EmptyLatentImage, EmptySD3LatentImage, LoadImage, SaveImage, PreviewImage)
    nodes = {node.__name__: type(node.__name__, (node,), {"folders": folders}) for node in plain}
    return (
        nodes
        | CONDITIONING_NODES
        | {
            name: type(name, (Primitive,), {"RETURN_TYPES": (kind,), "options": options})
            for name, (kind, options) in _PRIMITIVES.items()
        }
    )


def _save(images: Tensor, folder: Path, prefix: str, prompt: Any) -> list[dict[str, str]]:
    """Writes PREFIX_00001_.png and so on, with the workflow in a text chunk, and says where."""
    place = (folder / _filled(prefix, images.shape[2], images.shape[1])).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise UserError(f"The prefix {prefix!r} leads out of the output folder {folder}.")
    place.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text("prompt", json.dumps(prompt))
    number = _next_number(place)
    saved = []
    for offset, image in enumerate(images):
        path = place.parent / f"{place.name}_{number + offset:05}_.png"
        pixels = (255.0 * image.float().numpy()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, pnginfo=info, compress_level=4)
        saved.append(
            {"filename": path.name, "subfolder": str(path.parent.relative_to(folder.resolve())), "path": str(path)}
        )
    return saved


def _filled(prefix: str, width: int, height: int) -> str:
    now = time.localtime()
    values = {"width": str(width), "height": str(height), "year": str(now.tm_year)}
    for name, number in (
        ("month", now.tm_mon),
        ("day", now.tm_mday),
        ("hour", now.tm_hour),
        ("minute", now.tm_min),
        ("second", now.tm_sec),
    ):
        values[name] = f"{number:02}"
    return re.sub(r"%(\w+)%", lambda match: values.get(match[1], match[0]), prefix)


def _next_number(place: Path) -> int:
    pattern = re.compile(re.escape(place.name) + r"_(\d+)_\.png")
    numbers = [int(match[1]) for file in place.parent.iterdir() if (match := pattern.fullmatch(file.name))]
    return max(numbers, default=0) + 1
