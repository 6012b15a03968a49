"""A one-way stream of tensors between two ranks, whose shapes both know from the start."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .axis import Axis, Hop


class Channel:
    """Messages of `shapes`, in this order, from one rank of `axis` to another. Empty ones are not sent.

    A send completes only when its receive is posted. So receives are posted ahead, and a sender waits for a send only
    once `in_flight` more are on their way.
    """

    def __init__(
        self,
        axis: Axis,
        source: int,
        target: int,
        shapes: Sequence[tuple[int, ...]],
        in_flight: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._axis, self._source, self._target = axis, source, target
        self._shapes = shapes
        self._in_flight = in_flight
        self._kind = {"dtype": dtype, "device": device}
        self._sends: deque[Hop] = deque()
        self._posted: deque[Hop] = deque()
        self._sent = self._received = 0

    @property
    def is_sender(self) -> bool:
        return self._axis.rank == self._source

    @property
    def distance(self) -> int:
        """How many places a message goes forward, the axis seen as a ring."""
        return (self._target - self._source) % self._axis.size

    def connect(self) -> None:
        """Meet the other rank: NCCL makes a pair's communicator with its first message, and both wait for that."""
        greeting = torch.zeros(1, **self._kind)
        if self.is_sender:
            self._axis.start_send(greeting, self._target).wait()
        else:
            self._axis.start_receive(greeting, self._source).wait()

    def expect(self, until: int) -> None:
        """Post the receives of the first `until` messages, which then arrive while this rank computes."""
        if self.is_sender:
            return
        for number in range(self._received + len(self._posted), min(until, len(self._shapes))):
            x = torch.empty(self._shapes[number], **self._kind)
            self._posted.append(self._axis.start_receive(x, self._source) if prod(x.shape) else Hop(x, None))

    def send(self, x: Tensor) -> None:
        """The next message, on its way; `x` is left alone until then."""
        if tuple(x.shape) != self._shapes[self._sent]:
            raise ValueError(f"message {self._sent} has the shape {tuple(x.shape)}, not {self._shapes[self._sent]}")
        while len(self._sends) >= self._in_flight:
            self._sends.popleft().wait()
        self._sent += 1
        if x.numel():
            self._sends.append(self._axis.start_send(x.contiguous(), self._target))

    def send_nothing(self) -> None:
        """The next message, as zeros."""
        self.send(torch.zeros(self._shapes[self._sent], **self._kind))

    def receive(self) -> Tensor:
        """The next message, as soon as it is there."""
        self.expect(self._received + 1)
        self._received += 1
        return self._posted.popleft().wait()

    def settle(self, until: int) -> None:
        """Begin to end the stream after `until` messages, no fewer than have been sent or have their receive posted.

        The two ranks call it with the same number; what was not sent is made up with zeros. `wait` ends it.
        """
        self.expect(until)
        while self.is_sender and self._sent < min(until, len(self._shapes)):
            self.send_nothing()

    def wait(self) -> None:
        """Waits until nothing is on its way."""
        for hop in (*self._posted, *self._sends):
            hop.wait()
        self._posted.clear()
        self._sends.clear()
