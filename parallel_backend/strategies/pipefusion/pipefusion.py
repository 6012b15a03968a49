"""PipeFusion (arXiv 2405.14430): stages of blocks, through which strips of the picture travel. Approximate.

Patch m attends to fresh keys and values of the patches before it, and to those of the step before for the others.
The warm-up steps take the whole picture through the stages, and fill the keys and values: they are exact. Without any,
patch m of the first step attends to the patches up to its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ...attention.patch_kv import PatchAttention
from ...attention.usp import AttentionCore
from ...distributed.channel import Channel
from ...distributed.mesh import Mesh
from ...errors import Cancelled, UserError
from ...failures import STAY_READY, describe
from ...families.family import Family
from ...layout.split import split_sizes
from ...layout.stages import Stage
from ...sampling.driver import SamplingJob, check_result, not_finite, prepare
from ...sampling.strips import StripSamplers, questions_of
from ...tokens.plan import PatchPlan
from ..guidance import Guidance
from .controls import StagedControls
from .schedule import Unit, len_of, posted_ahead, units_of

if TYPE_CHECKING:
    from ...run_context import Run

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, Tensor], None]
"""`on_step(steps done, total, picture [1, C, H, W])`, where the first stage hears of it."""


LATENT, PREDICTION, LAST_STEP, STAGE = range(4)
"""What is not finite, or a stage whose computation failed. Failures are counted from the end of the run, so that the
largest number is the first failure."""


class PipeFusion:
    """One run, as this rank's stage sees it. Every rank of the mesh makes one and calls `run`."""

    def __init__(
        self,
        family: Family,
        mesh: Mesh,
        attention: AttentionCore,
        guidance: Guidance,
        job: SamplingJob,
        *,
        stage: Stage,
        patches: int,
        warmup_steps: int,
        preview: bool,
        has_lone_stages: bool,
    ) -> None:
        """`has_lone_stages`: as `Layout.has_lone_stages`. One that fails then takes no other rank along."""
        self.family, self.mesh, self.guidance = family, mesh, guidance
        self.stage = stage
        own = self.stage.blocks(family.block_parameters)
        self.blocks, self.first_block = family.blocks[own], own.start
        self.start = prepare(job)
        self.questions = questions_of(self.start, job)
        self.units = units_of(self.questions, patches, warmup_steps)
        self.latent = torch.empty_like(self.start.x, memory_format=torch.contiguous_format)
        self.shown = torch.zeros_like(self.latent[: int(preview)])
        height, width = self.latent.shape[2:]
        self.grid = (-(-height // family.patch_size), -(-width // family.patch_size))
        token_rows = split_sizes(self.grid[0], patches)
        edges = [min(row * family.patch_size, height) for row in accumulate(token_rows, initial=0)]
        self.strips = [slice(top, bottom) for top, bottom in pairwise(edges)]
        lengths = [rows * self.grid[1] for rows in token_rows]
        self.plans = [
            PatchPlan.even(family.text_length(condition), lengths, mesh.sequence.size)
            for condition in guidance.own_conditions
        ]
        self.attention = PatchAttention(attention, self.plans)
        clocks = [float(guidance.timestep(question.sigma, self.latent)[0]) for question in self.questions]
        self.controls = StagedControls(family, guidance.own_conditions, clocks, lengths, attention, mesh.sequence.size)
        self.samplers = StripSamplers(self.start, job, self.strips) if self.stage.is_last else None
        self.incoming, self.outgoing, self.feedback = self._channels(patches)
        self.skips = self._skip_channels(patches)
        hops = [channel for channel in (self.incoming, self.outgoing, self.feedback) if channel]
        self.channels = [*hops, *self.skips.values()]
        self.announced = 0
        self.failures = torch.zeros(4, dtype=torch.int64, device=family.device)
        self.has_lone_stages = has_lone_stages
        self.fault: tuple[str, str] | None = None
        """Why this stage computes no more: what to tell, and a hint."""

    def run(self, run: Run, on_step: OnStep) -> Tensor:
        """The sampled latent of the job's part, fp32, in the model's space, whole and equal on every rank.

        Raises on all ranks, at the start of the same step: `Cancelled`, `UserError` for a value that is not finite or a
        lone stage that failed. No stage waits for another to agree on that, so what happens in one step is acted upon
        after the next at the latest.
        """
        self.family.use_attention(self.attention)
        try:
            return self._run(run, on_step)
        finally:
            self.attention.forget()
            self.controls.forget()

    def _run(self, run: Run, on_step: OnStep) -> Tensor:
        for channel in self.channels:
            channel.connect()
        if self.samplers:
            self._announce(0, len(self.strips) - 1)
        check = run.start_check(self.failures.tolist())
        for number, unit in enumerate(self.units):
            if number and unit.patches[0] == 0 and self.questions[unit.question].evaluation == 0:
                self._finish(run, check, number)
                check = run.start_check(self.failures.tolist())
            for channel in self.channels:
                channel.expect(self._expected(channel, number))
            if self.feedback and self.stage.is_first:
                self._receive_latent(unit, self.feedback, on_step)
            outputs = [self._through_stage(unit, index) for index in range(len(self.plans))]
            if self.samplers:
                self._answer(unit, outputs, self.samplers)
        self._finish(run, check, len(self.units))
        if self.samplers:
            self.latent.copy_(self.samplers.result())
            self.failures[LAST_STEP] = ~torch.isfinite(self.latent).all()
        self._finish(run, run.start_check(self.failures.tolist()), len(self.units))
        self._settle(len(self.units))
        self.mesh.pipefusion.broadcast(self.latent, self.stage.count - 1)
        on_step(self.start.total, self.start.total, self.latent[: len(self.shown)])
        return self.latent

    def _channels(self, patches: int) -> tuple[Channel | None, Channel | None, Channel | None]:
        """From the stage before, to the stage after, and from the last stage to the first."""
        stage, last = self.stage.index, self.stage.count - 1
        batch, channels, _, width = self.latent.shape
        starts = [
            replace(self.stage, index=index).blocks(self.family.block_parameters).start
            for index in range(self.stage.count)
        ]
        latents = [(batch + len(self.shown), channels, len_of(self._rows(unit.patches)), width) for unit in self.units]

        device = self.latent.device

        def hop(source: int) -> Channel:
            in_flight = patches * len(self.plans)
            hidden = [
                (batch, self._hop_length(unit, index, starts[source + 1]), self.family.hidden_size)
                for unit in self.units
                for index in range(len(self.plans))
            ]
            return Channel(
                self.mesh.forward, source, source + 1, hidden, in_flight, dtype=self.family.dtype, device=device
            )

        def back() -> Channel:
            return Channel(self.mesh.feedback, last, 0, latents, patches, dtype=self.latent.dtype, device=device)

        is_end = self.stage.is_first or self.stage.is_last
        return (
            None if self.stage.is_first else hop(stage - 1),
            None if self.stage.is_last else hop(stage),
            back() if is_end else None,
        )

    def _hop_length(self, unit: Unit, index: int, first_block: int) -> int:
        """How many tokens go on to the stage that begins with `first_block`: the patches', and controls' residuals."""
        plan, rank = self.plans[index], self.mesh.sequence.rank
        residuals = self.controls.needed(unit.question, index, first_block)
        return plan.lengths(unit.patches)[rank] + len(residuals) * plan.image_size(rank, unit.patches)

    def _skip_channels(self, patches: int) -> dict[tuple[int, ...], Channel]:
        """From or to each stage that holds the other ends of this one's skips, by the blocks that give them.

        All ranks have them in the same order, so that they can meet one after the other.
        """
        owners = self.stage.owners(self.family.block_parameters)
        givers: dict[tuple[int, int], list[int]] = {}
        for giver, taker in self.family.skips.items():
            ends = owners[giver], owners[taker]
            if ends[0] != ends[1] and self.stage.index in ends:
                givers.setdefault(ends, []).append(giver)
        rank, batch = self.mesh.sequence.rank, len(self.latent)
        in_flight = patches * len(self.plans)
        channels = {}
        for (source, target), blocks in sorted(givers.items()):
            shapes = [
                (len(blocks), batch, plan.image_size(rank, unit.patches), self.family.hidden_size)
                for unit in self.units
                for plan in self.plans
            ]
            channels[tuple(blocks)] = Channel(
                self.mesh.skips,
                source,
                target,
                shapes,
                in_flight,
                dtype=self.family.dtype,
                device=self.latent.device,
            )
        return channels

    def _rows(self, patches: Sequence[int]) -> slice:
        """The latent's rows of neighbouring patches."""
        return slice(self.strips[patches[0]].start, self.strips[patches[-1]].stop)

    def _receive_latent(self, unit: Unit, feedback: Channel, on_step: OnStep) -> None:
        received = feedback.receive()
        rows, batch = self._rows(unit.patches), len(self.latent)
        self.latent[:, :, rows] = received[:batch]
        self.shown[:, :, rows] = received[batch:]
        if unit.question and unit.patches[-1] == len(self.strips) - 1:
            answered = self.questions[unit.question - 1]
            if answered.evaluation == 0:
                on_step(answered.step + 1, self.start.total, self.shown)

    def _through_stage(self, unit: Unit, index: int) -> Tensor:
        """Take the unit through this stage for one condition; what the last stage predicts for the unit's strips."""
        received = self.incoming.receive() if self.incoming else None
        skips = {
            giver: skip
            for givers, channel in self.skips.items()
            if not channel.is_sender
            for giver, skip in zip(givers, channel.receive(), strict=True)
        }
        results = self._computed(unit, index, received, skips)
        rows, plan = self._rows(unit.patches), self.plans[index]
        if self.outgoing:
            senders = (self.outgoing, *(channel for channel in self.skips.values() if channel.is_sender))
            for number, channel in enumerate(senders):
                channel.send(results[number]) if results else channel.send_nothing()
            return self.latent
        if results is None:
            return torch.zeros_like(self.latent[:, :, rows])
        sizes = [plan.image_size(rank, unit.patches) for rank in range(self.mesh.sequence.size)]
        tokens = plan.in_order(self.mesh.sequence.all_gather(results[0], sizes, dim=1), unit.patches)
        return self.family.untokenize(tokens, len_of(rows), self.latent.shape[3])

    def _computed(
        self, unit: Unit, index: int, received: Tensor | None, skips: Mapping[int, Tensor]
    ) -> list[Tensor] | None:
        """What this stage makes of the unit's tokens.

        None once a lone stage has failed: it hands on zeros, so that nobody waits for it, until all leave the run.
        """
        if self.fault:
            return None
        try:
            return self._through_blocks(unit, index, received, skips)
        except Exception as error:
            if not self.has_lone_stages:
                raise
            log.exception("stage %d of %d failed", self.stage.index + 1, self.stage.count)
            outcome = describe(error, dist.get_rank(), self.latent.device)
            self.fault = (outcome.message, f"{outcome.hint} {STAY_READY}".strip())
            self.failures[STAGE] = 1
            return None

    def _through_blocks(
        self, unit: Unit, index: int, received: Tensor | None, skips: Mapping[int, Tensor]
    ) -> list[Tensor]:
        """The tokens to send to the next stage and the skips to send to others; on the last stage, its prediction."""
        plan, condition, rank = self.plans[index], self.guidance.own_conditions[index], self.mesh.sequence.rank
        sigma = self.questions[unit.question].sigma
        timestep = self.guidance.timestep(sigma, self.latent)
        at = (timestep, condition, plan.shard(rank, unit.patches), self.grid)
        added = self.controls.added(unit.question, index)
        if received is not None:
            sizes = plan.text_size(rank, unit.patches), plan.image_size(rank, unit.patches)
            keys = self.controls.needed(unit.question, index, self.first_block)
            text, image, *arrived = received.split((*sizes, *[sizes[1]] * len(keys)), dim=1)
            residuals = dict(zip(keys, arrived, strict=True))
            state = self.family.resume(image, text, *at)
        else:
            # The whole latent, as of now: a half token at its lower border takes its other half from the first row.
            latent = self.guidance.model_sampling.calculate_input(sigma.to(self.latent.device), self.latent)
            tokens = self.family.tokenize(latent)
            residuals = self.controls.make(unit.question, index, unit.patches, rank, tokens, timestep, self.grid)
            state = self.family.embed(tokens, *at)
        # Without a warm-up, the first question finds no keys and values of the patches that are still to come.
        seen = len(self.strips) if unit.question else unit.patches[-1] + 1
        self.attention.begin(index, unit.patches, seen=seen)
        state = replace(state, skips=skips, prompts=condition.prompts_at(timestep, self.attention))
        for number, block in enumerate(self.blocks, self.first_block):
            state = block(state)
            if number in added:
                state = self.family.add_residual(state, number, residuals[added[number]])
        if self.outgoing is None:
            return [self.family.head(state)]
        given = [givers for givers, channel in self.skips.items() if channel.is_sender]
        leaving = [torch.stack([state.skips[giver] for giver in givers]) for givers in given]
        following = self.controls.needed(unit.question, index, self.first_block + len(self.blocks))
        onward = [residuals[key] for key in following]
        return [torch.cat((state.text, state.image, *onward), dim=1), *leaving]

    def _answer(self, unit: Unit, outputs: Sequence[Tensor], samplers: StripSamplers) -> None:
        """The last stage's work: guidance, the sampler's step, and the new latent on its way to the first stage."""
        question = self.questions[unit.question]
        x = samplers.asked(unit.patches)
        denoised = self.guidance.combine(outputs, x, question.sigma, self._rows(unit.patches))
        is_broken, is_latent = ~torch.isfinite(denoised).all(), ~torch.isfinite(x).all()
        found = torch.stack((is_broken & is_latent, is_broken & ~is_latent))
        self.failures[:LAST_STEP].clamp_(min=(len(self.questions) - unit.question) * found)
        denoised = samplers.answer(unit.patches, denoised)
        if question.evaluation == 0:
            self.shown[:, :, self._rows(unit.patches)] = denoised[: len(self.shown)]
        self._announce(unit.question + 1, unit.patches[-1])

    def _announce(self, question: int, patch: int) -> None:
        """Send the first stage what it needs for `question`, as far as the strips up to `patch` go."""
        assert self.feedback is not None
        assert self.samplers is not None
        while self.announced < len(self.units):
            unit = self.units[self.announced]
            if unit.question != question or unit.patches[-1] > patch:
                return
            shown = self.shown[:, :, self._rows(unit.patches)]
            self.feedback.send(torch.cat((self.samplers.asked(unit.patches), shown)))
            self.announced += 1

    def _finish(self, run: Run, check: Callable[[], list[int]], unit: int) -> None:
        """Leave the run before `unit`, with nothing on its way, when the check found a reason to."""
        try:
            failures = check()
            if failures[STAGE]:
                raise UserError(*next(fault for fault in run.gather(self.fault) if isinstance(fault, list)))
            self._raise_failure(failures)
        except (Cancelled, UserError):
            self._settle(unit)
            raise

    def _settle(self, unit: int) -> None:
        """End all channels before `unit`: what was sent, or has its receive posted, arrives.

        The latent of the unit's whole question is on its way back already.
        """
        question = self.units[unit].question if unit < len(self.units) else None
        back = unit + sum(each.question == question for each in self.units)
        for channel in sorted(self.channels, key=lambda channel: channel.is_sender):
            channel.settle(back if channel is self.feedback else self._expected(channel, unit - 1))
        for channel in self.channels:
            channel.wait()

    def _expected(self, channel: Channel, number: int) -> int:
        """How many messages of the channel have their receives posted while the unit of that number is at hand."""
        is_patch = len(self.units[number].patches) == 1
        ahead = posted_ahead(self.stage.count, len(self.strips), channel.distance) if is_patch else 0
        units = number + 1 + ahead
        return units if channel is self.feedback else units * len(self.plans)

    def _raise_failure(self, failures: Sequence[int]) -> None:
        if failures[LAST_STEP]:
            check_result(torch.tensor(torch.nan), self.start.total)
        first = max(failures[:LAST_STEP])
        if first:
            question = self.questions[len(self.questions) - first]
            raise not_finite(question, self.start.total, latent_is_finite=failures[LATENT] < first)
