"""What travels between the stages of PipeFusion: tokens onward, skips across, the latent back to the first stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...distributed.channel import Channel
from ...distributed.mesh import Mesh
from ...families.family import TokenFamily
from ...families.state import State
from ...layout.stages import Stage
from ...tokens.plan import TokenPlan
from ...tokens.strips import Strips
from .controls import Key, StagedControls
from .schedule import Unit, posted_ahead


class Transport:
    """The channels of one run, as this rank's stage sees them.

    A message onward is, for each picture, the tokens of all streams and then the residuals of controls that later
    stages need, one after the other: streams may be of different widths.
    """

    def __init__(
        self,
        family: TokenFamily,
        mesh: Mesh,
        stage: Stage,
        units: Sequence[Unit],
        plans: Sequence[TokenPlan],
        controls: StagedControls,
        strips: Strips,
        latent: Tensor,
        previews: int,
    ) -> None:
        """`plans`: the token plan of each condition that is evaluated here. `previews`: how many pictures return with
        `latent`."""
        self._family, self._stage, self._units, self._plans = family, stage, units, plans
        self._controls, self._strips, self._rank = controls, strips, mesh.sequence.rank
        self._latent = latent
        first, last, patches = stage.index - 1, stage.count - 1, len(strips)
        starts = [replace(stage, index=index).blocks(family.block_parameters).start for index in range(stage.count)]

        def hop(source: int) -> Channel:
            shapes = [
                (len(latent), sum(self._lengths(unit, index, starts[source + 1])))
                for unit in units
                for index in range(len(plans))
            ]
            kind = {"dtype": family.carry_dtype, "device": latent.device}
            return Channel(mesh.forward, source, source + 1, shapes, patches * len(plans), **kind)

        self._starts = starts
        self._incoming = None if stage.is_first else hop(first)
        self._outgoing = None if stage.is_last else hop(stage.index)
        self._back: Channel | None = None
        if stage.is_first or stage.is_last:
            whole = (len(latent) + previews, *latent.shape[1:])
            shapes = [strips.shape(whole, unit.patches) for unit in units]
            kind = {"dtype": latent.dtype, "device": latent.device}
            self._back = Channel(mesh.feedback, last, 0, shapes, patches, **kind)
        self._skips = self._skip_channels(mesh, patches)
        hops = [channel for channel in (self._incoming, self._outgoing, self._back) if channel]
        self._channels = [*hops, *self._skips.values()]

    def connect(self) -> None:
        """Meet the other ends, which do the same."""
        for channel in self._channels:
            channel.connect()

    def expect(self, number: int) -> None:
        """Post the receives that belong to the unit of that number, and those ahead of it."""
        for channel in self._channels:
            channel.expect(self._expected(channel, number))

    def receive(self) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The next message from the stage before, and skips by the numbers of the blocks that gave them."""
        received = self._incoming.receive() if self._incoming else None
        skips = {
            giver: skip
            for givers, channel in self._skips.items()
            if not channel.is_sender
            for giver, skip in zip(givers, channel.receive(), strict=True)
        }
        return received, skips

    def send(self, results: Sequence[Tensor] | None) -> None:
        """What `pack` made, or zeros in its place."""
        assert self._outgoing is not None
        senders = (self._outgoing, *(channel for channel in self._skips.values() if channel.is_sender))
        for number, channel in enumerate(senders):
            channel.send(results[number]) if results else channel.send_nothing()

    def pack(self, state: State, residuals: Sequence[Tensor]) -> list[Tensor]:
        """The message onward, and those to the stages that take this one's skips.

        A block that a step cache has passed over gives zeros: those that would take its skip are passed over, too.
        """
        family = self._family
        nothing = torch.zeros_like(state[family.controlled])
        given = [givers for givers, channel in self._skips.items() if channel.is_sender]
        leaving = [torch.stack([state.skips.get(giver, nothing) for giver in givers]) for givers in given]
        parts = [*(state[name] for name in family.streams), *residuals]
        return [torch.cat([part.to(family.carry_dtype).flatten(1) for part in parts], dim=1), *leaving]

    def unpack(self, received: Tensor, unit: Unit, index: int) -> tuple[dict[str, Tensor], dict[Key, Tensor]]:
        """The streams and the residuals in a message for one condition."""
        family, first = self._family, self._starts[self._stage.index]
        widths = family.widths
        parts = received.split(self._lengths(unit, index, first), dim=1)
        count = len(family.streams)
        streams = {
            name: part.unflatten(1, (-1, widths[name])) if part.numel() else part.view(len(part), 0, widths[name])
            for name, part in zip(family.streams, parts[:count], strict=True)
        }
        residuals = {
            key: part.view(len(part), -1 if part.numel() else 0, widths[family.controlled])
            for key, part in zip(self._controls.needed(unit.call, index, first), parts[count:], strict=True)
        }
        return streams, residuals

    def send_latent(self, strip: Tensor) -> None:
        """The latent of the unit that is next for it, with its preview, to the first stage."""
        assert self._back is not None
        self._back.send(strip)

    def receive_latent(self) -> Tensor:
        assert self._back is not None
        return self._back.receive()

    def settle(self, unit: int) -> None:
        """End all channels before `unit`: what was sent, or has its receive posted, arrives.

        The latent of the unit's whole call is on its way back already.
        """
        call = self._units[unit].call if unit < len(self._units) else None
        back = unit + sum(each.call == call for each in self._units)
        for channel in sorted(self._channels, key=lambda channel: channel.is_sender):
            channel.settle(back if channel is self._back else self._expected(channel, unit - 1))
        for channel in self._channels:
            channel.wait()

    def _lengths(self, unit: Unit, index: int, first_block: int) -> list[int]:
        """How many numbers of each picture a message to the stage that begins with `first_block` has, part by part."""
        plan, family, widths = self._plans[index], self._family, self._family.widths
        streams = [plan.size(name, self._rank, unit.patches) * widths[name] for name in family.streams]
        residuals = self._controls.needed(unit.call, index, first_block)
        grid = plan.size(family.controlled, self._rank, unit.patches) * widths[family.controlled] if residuals else 0
        return [*streams, *[grid] * len(residuals)]

    def _skip_channels(self, mesh: Mesh, patches: int) -> Mapping[tuple[int, ...], Channel]:
        """Channels from or to each stage that holds the other ends of this one's skips, by the blocks that give them.

        All ranks have them in the same order, so that they can meet one after the other.
        """
        family, stage = self._family, self._stage
        owners = stage.owners(family.block_parameters)
        givers: dict[tuple[int, int], list[int]] = {}
        for giver, taker in family.skips.items():
            ends = owners[giver], owners[taker]
            if ends[0] != ends[1] and stage.index in ends:
                givers.setdefault(ends, []).append(giver)
        stream, batch = family.controlled, len(self._latent)
        channels = {}
        for (source, target), blocks in sorted(givers.items()):
            shapes = [
                (len(blocks), batch, plan.size(stream, self._rank, unit.patches), family.widths[stream])
                for unit in self._units
                for plan in self._plans
            ]
            channels[tuple(blocks)] = Channel(
                mesh.skips,
                source,
                target,
                shapes,
                patches * len(self._plans),
                dtype=family.carry_dtype,
                device=self._latent.device,
            )
        return channels

    def _expected(self, channel: Channel, number: int) -> int:
        """How many messages of the channel have their receives posted while the unit of that number is computed."""
        is_patch = len(self._units[number].patches) == 1
        ahead = posted_ahead(self._stage.count, len(self._strips), channel.distance) if is_patch else 0
        units = number + 1 + ahead
        return units if channel is self._back else units * len(self._plans)
