"""What the comparison shows: a Markdown table and a sheet of pictures side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..demo_model.checker import FOUR
from ..demo_model.evaluate import shares
from ..demo_model.scenes import Scene
from .metrics import psnr, ssim

GAP, HEADER, FONT_SIZE, CAPTION_WIDTH = 4, 50, 12, 150


@dataclass(frozen=True)
class Row:
    """One method's pictures `[N, H, W, 3]` in 0..1.

    Of a step cache `whole`: evaluations computed in full, and all; `gain`: how many times as fast as without it.
    """

    name: str
    pictures: Tensor
    whole: tuple[int, int] | None = None
    gain: float | None = None


def to_bytes(pictures: Tensor) -> list[np.ndarray]:
    return list((pictures * 255 + 0.5).byte().numpy())


def table(reference: Row, rows: Sequence[Row], scenes: Sequence[Scene]) -> str:
    """PSNR and SSIM against the reference, and the share of the asked attributes that the checker finds."""
    columns = ["method", "PSNR (dB)", "worst", "SSIM", *FOUR, "all four", "in full", "gain"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in (reference, *rows):
        found = shares(to_bytes(row.pictures), list(scenes))
        if row is reference:
            nearness = ["", "", ""]
        else:
            decibels, similarity = (measure(row.pictures, reference.pictures) for measure in (psnr, ssim))
            nearness = [f"{decibels.mean():.1f}", f"{decibels.min():.1f}", f"{similarity.mean():.4f}"]
        attributes = [f"{100 * found[name]:.1f}%" if name in found else "" for name in (*FOUR, "asked")]
        speed = [f"{row.whole[0]} of {row.whole[1]}" if row.whole else "", f"{row.gain:.2f}" if row.gain else ""]
        lines.append("| " + " | ".join([row.name, *nearness, *attributes, *speed]) + " |")
    return "\n".join(lines)


def sheet(reference: Row, rows: Sequence[Row], captions: Sequence[str]) -> Image.Image:
    """Captions down, methods across; under each name the PSNR of the pictures that are shown."""
    size = reference.pictures.shape[1]
    font = ImageFont.load_default(size=FONT_SIZE)
    step = size + GAP
    columns = (reference, *rows)
    image = Image.new("RGB", (CAPTION_WIDTH + len(columns) * step, HEADER + len(captions) * step), "white")
    pen = ImageDraw.Draw(image)
    for number, caption in enumerate(captions):
        lines = textwrap.fill(caption, CAPTION_WIDTH // 7)
        pen.multiline_text((GAP, HEADER + number * step), lines, fill="black", font=font)
    for column, row in enumerate(columns):
        left = CAPTION_WIDTH + column * step
        shown = slice(len(captions))
        near = "" if row is reference else f"{psnr(row.pictures[shown], reference.pictures[shown]).mean():.1f} dB"
        pen.multiline_text((left, 2), f"{textwrap.fill(row.name, size // 7)}\n{near}", fill="black", font=font)
        for number, picture in enumerate(to_bytes(row.pictures[shown])):
            image.paste(Image.fromarray(picture), (left, HEADER + number * step))
    return image
