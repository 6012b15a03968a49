"""Declares the operators without which the plain torchvision wheel cannot be imported beside a CPU build of torch."""

import torch

_library = torch.library.Library("torchvision", "DEF")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    _library.define(_schema)
