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
EXIF_MODEL = 0x0110
"""The tag in which ComfyUI writes the workflow of a moving picture."""


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


class EmptyHunyuanLatentVideo:
    """Makes latents of videos with 4 frames to a cell, the first frame in a cell of its own: HunyuanVideo, Wan 2.1."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sides = {
            name: ("INT", {"default": default, "min": 16, "max": MAX_SIDE})
            for name, default in (("width", 848), ("height", 480))
        }
        length = ("INT", {"default": 25, "min": 1, "max": MAX_SIDE})
        return {"required": {**sides, "length": length, "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096})}}

    def generate(self, width: int, height: int, length: int, batch_size: int) -> tuple[dict[str, Tensor]]:
        frames = (length - 1) // 4 + 1
        return ({"samples": torch.zeros(batch_size, 16, frames, height // CELL, width // CELL)},)


class LoadImage:
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load"
    folders: ClassVar[Folders]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:
        path = cls._path(image)
        return True if path.is_file() else f"The picture {path} does not exist."

    @classmethod
    def _path(cls, image: str) -> Path:
        """The file of a name, which may have been written on Windows, and may name ComfyUI's folder at its end."""
        name, _, folder = image.replace("\\", "/").removesuffix("]").rpartition(" [")
        if name and image.endswith("]") and folder in ("input", "output", "temp"):
            return getattr(cls.folders, folder) / name
        return cls.folders.input / image.replace("\\", "/")

    def load(self, image: str) -> tuple[Tensor, Tensor]:
        """Picture `[1, H, W, 3]` and mask `[1, H, W]`: 1 where the picture is transparent."""
        try:
            with Image.open(self._path(image)) as file:
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


class SaveAnimatedWEBP:
    """Frames as one moving picture."""

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    folders: ClassVar[Folders]
    methods: ClassVar[dict[str, int]] = {"default": 4, "fastest": 0, "slowest": 6}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": ("IMAGE", {}),
                "filename_prefix": ("STRING", {"default": "ComfyUI"}),
                "fps": ("FLOAT", {"default": 6.0, "min": 0.01, "max": 1000.0}),
                "lossless": ("BOOLEAN", {"default": True}),
                "quality": ("INT", {"default": 80, "min": 0, "max": 100}),
                "method": (list(cls.methods), {}),
            },
            "hidden": {"prompt": "PROMPT"},
        }

    def save(
        self,
        images: Tensor,
        filename_prefix: str,
        fps: float,
        lossless: bool,
        quality: int,
        method: str,
        prompt: Any = None,
    ) -> dict[str, Any]:
        place = _place(self.folders.output, filename_prefix, images)
        path = place.parent / f"{place.name}_{_next_number(place, 'webp'):05}_.webp"
        first, *others = (_picture(image) for image in images)
        exif = first.getexif()
        exif[EXIF_MODEL] = f"prompt:{json.dumps(prompt)}"
        first.save(
            path,
            save_all=True,
            append_images=others,
            duration=int(1000.0 / fps),
            lossless=lossless,
            quality=quality,
            method=self.methods[method],
            exif=exif,
        )
        return {"ui": {"images": [_saved(path, self.folders.output)], "animated": (True,)}}


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
    plain = (
        EmptyLatentImage,
        EmptySD3LatentImage,
        EmptyHunyuanLatentVideo,
        LoadImage,
        SaveImage,
        SaveAnimatedWEBP,
        PreviewImage,
    )
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
    place = _place(folder, prefix, images)
    info = PngInfo()
    info.add_text("prompt", json.dumps(prompt))
    number = _next_number(place, "png")
    saved = []
    for offset, image in enumerate(images):
        path = place.parent / f"{place.name}_{number + offset:05}_.png"
        _picture(image).save(path, pnginfo=info, compress_level=4)
        saved.append(_saved(path, folder))
    return saved


def _place(folder: Path, prefix: str, images: Tensor) -> Path:
    """The start of a file's path, in a folder that exists. Raises `UserError` outside of `folder`."""
    place = (folder / _filled(prefix, images.shape[2], images.shape[1])).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise UserError(f"The prefix {prefix!r} leads out of the output folder {folder}.")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _picture(image: Tensor) -> Image.Image:
    """Converts an image `[H, W, 3]` in 0..1."""
    return Image.fromarray((255.0 * image.float().numpy()).clip(0, 255).astype(np.uint8))


def _saved(path: Path, folder: Path) -> dict[str, str]:
    return {"filename": path.name, "subfolder": str(path.parent.relative_to(folder.resolve())), "path": str(path)}


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


def _next_number(place: Path, ending: str) -> int:
    pattern = re.compile(re.escape(place.name) + rf"_(\d+)_\.{ending}")
    numbers = [int(match[1]) for file in place.parent.iterdir() if (match := pattern.fullmatch(file.name))]
    return max(numbers, default=0) + 1
