"""What the adapters are judged by: does a picture look like chalk, do its edges lie where they were asked."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from .scenes import edge_map

DARK, BRIGHT = 70, 110
GREY = 12
REACH = 1 / 64
"""How far apart two edges may lie and still agree, as a fraction of the side."""


def chalk_verdicts(picture: np.ndarray) -> dict[str, bool]:
    """Is a uint8 picture `[H, W, 3]` mostly black board, without colours, with thin bright lines on it."""
    pixels = picture.astype(np.float32)
    lightness = pixels.mean(axis=-1)
    return {
        "board": bool((lightness < DARK).mean() >= 0.8),
        "no colour": bool((pixels.max(axis=-1) - pixels.min(axis=-1)).mean() <= GREY),
        "lines": bool(0.004 <= (lightness > BRIGHT).mean() <= 0.2),
    }


def edge_agreement(picture: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    """How the edges of a uint8 picture `[H, W, 3]` meet those of an edge map `[H, W, 3]`.

    `precision`: the share of its edges near an asked one; `recall`: the share of the asked ones near one of its;
    `F1`: their harmonic mean.
    """
    made, true = (edges[..., 0] > 127 for edges in (edge_map(picture), asked))
    precision, recall = _share_near(made, true), _share_near(true, made)
    both = precision + recall
    return {"precision": precision, "recall": recall, "F1": 2 * precision * recall / both if both else 0.0}


def _share_near(edges: np.ndarray, others: np.ndarray) -> float:
    if not edges.any():
        return 0.0
    reach = max(1, round(REACH * len(edges)))
    near = F.max_pool2d(torch.from_numpy(others)[None, None].float(), 2 * reach + 1, 1, reach)[0, 0].numpy() > 0
    return float(near[edges].mean())
