"""Heat maps of a study: blocks down, steps across; one for each quantity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

QUANTITIES = ("block", "text", "attention", "MLP", "key", "value")
MEASURES = ("relative change", "1 - cosine")
COLOURS = torch.tensor([[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]]) / 255
"""From no change to the largest: five colours of a map whose brightness rises evenly (plasma)."""
EMPTY = torch.tensor([0.85, 0.85, 0.85])
PANEL, COLUMNS, GAP, TITLE = (320, 240), 3, 16, 22


def heat_maps(changes: Tensor, title: str) -> list[Image.Image]:
    """A picture for the relative changes, one for the cosines, of `[steps - 1, blocks, quantities, 2]`."""
    return [
        _sheet(changes[..., 0], f"{title}: {MEASURES[0]} from step to step"),
        _sheet(1 - changes[..., 1], f"{title}: {MEASURES[1]} from step to step"),
    ]


def to_image(pictures: Sequence[Image.Image]) -> Tensor:
    """`[B, H, W, 3]` in 0..1, as ComfyUI's IMAGE."""
    size = pictures[0].height, pictures[0].width, 3
    flat = [torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8).view(size) for each in pictures]
    return torch.stack(flat).float() / 255


def _sheet(values: Tensor, title: str) -> Image.Image:
    """All quantities `[steps - 1, blocks, quantities]`, each by a scale of its own."""
    (width, height), font = PANEL, ImageFont.load_default(size=13)
    rows = -(-len(QUANTITIES) // COLUMNS)
    size = COLUMNS * (width + GAP) + GAP, TITLE + rows * (height + TITLE + GAP) + GAP
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 4), f"{title}. Blocks down, steps across.", fill="black", font=font)
    for number, name in enumerate(QUANTITIES):
        panel = values[..., number].T
        known = panel[panel.isfinite()]
        highest = float(known.max()) if len(known) else 0.0
        left = GAP + number % COLUMNS * (width + GAP)
        top = TITLE + number // COLUMNS * (height + TITLE + GAP) + GAP
        scale = f"0 to {highest:.3g}" if len(known) else "not measured"
        pen.text((left, top), f"{name}: {scale}", fill="black", font=font)
        sheet.paste(_coloured(panel, highest).resize(PANEL, Image.Resampling.NEAREST), (left, top + TITLE))
    return sheet


def _coloured(panel: Tensor, highest: float) -> Image.Image:
    share = (panel / highest if highest else torch.zeros_like(panel)).nan_to_num(0.0).clamp(0, 1) * (len(COLOURS) - 1)
    below = share.floor().long().clamp_max(len(COLOURS) - 2)
    colours = torch.lerp(COLOURS[below], COLOURS[below + 1], (share - below).unsqueeze(-1))
    colours = torch.where(panel.isfinite().unsqueeze(-1), colours, EMPTY)
    return Image.fromarray((colours * 255).round().byte().numpy())
