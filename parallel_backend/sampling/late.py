"""Tensors between the host and its device, without either waiting for the other."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """A tensor on its way to the host. To read it from the device at once would stop the host until that is idle.

    `is_here`: it was on the host already.
    """

    def __init__(self, x: Tensor) -> None:
        self.is_here = x.device.type == "cpu"
        self._event: torch.cuda.Event | None = None
        self._copy = x
        if not self.is_here:
            self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)
        if x.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        """The tensor on the host. It waits for what the device was asked before the copy, and for nothing after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


def sent_to(x: Tensor, like: Tensor) -> Tensor:
    """`x` of the host in the dtype of `like` and on its device, from memory that the device reads by itself."""
    x = x.to(like.dtype)
    return (x.pin_memory() if like.is_cuda else x).to(like.device, non_blocking=True)
