"""PipeFusion (arXiv 2405.14430): stages of blocks, through which strips of the picture travel. Approximate.

Patch m attends to fresh keys and values of the patches before it, and to those of the step before for the others.
The warm-up steps take the whole picture through the stages, and fill the keys and values: they are exact. Without any,
patch m of the first step attends to the patches up to its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ...attention.patch_kv import PatchAttention
from ...attention.usp import AttentionCore
from ...caches.policy import StepCache
from ...distributed.mesh import Mesh
from ...errors import Cancelled, UserError
from ...failures import STAY_READY, describe
from ...families.blocks import run_blocks
from ...families.family import TokenFamily
from ...families.state import Evaluation
from ...layout.stages import Stage
from ...sampling.driver import SamplingJob, prepare
from ...sampling.finite import check_result, not_finite
from ...sampling.late import Late
from ...sampling.strips import StripSamplers, calls_of
from ...tokens.grid import Packing
from ...tokens.plan import TokenPlan
from ...tokens.strips import Strips
from ..guidance import Guidance
from .controls import StagedControls
from .schedule import Unit, units_of
from .transport import Transport

if TYPE_CHECKING:
    from ...run_context import Run

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, Tensor], None]
"""`on_step(steps done, total, picture [1, C, ...])`, where the first stage hears of it."""


LATENT, PREDICTION, LAST_STEP, STAGE = range(4)
"""What is not finite, or a stage whose computation failed. Failures are counted from the end of the run, so that the
largest number is the first failure."""


class PipeFusion:
    """One run on this rank's stage. Every rank of the mesh makes one and calls `run`."""

    def __init__(
        self,
        family: TokenFamily,
        mesh: Mesh,
        attention: AttentionCore,
        guidance: Guidance,
        job: SamplingJob,
        packing: Packing,
        cache_of: Callable[[range], StepCache],
        *,
        stage: Stage,
        patches: int,
        warmup_steps: int,
        preview: bool,
        has_lone_stages: bool,
    ) -> None:
        """`cache_of`: makes a step cache for blocks of these numbers, one for each patch of a condition. All stages
        must decide alike without a word, by the noise level alone.

        `has_lone_stages`: as `Layout.has_lone_stages`. One that fails then takes no other rank along.
        """
        self.family, self.mesh, self.guidance, self.packing = family, mesh, guidance, packing
        self._cache_of = cache_of
        self._caches: dict[tuple[int, tuple[int, ...]], StepCache] = {}
        self.stage = stage
        own = self.stage.blocks(family.block_parameters)
        self.blocks, self.first_block = family.blocks[own], own.start
        self.start = prepare(job)
        self.calls = calls_of(self.start, job)
        self.units = units_of(self.calls, patches, warmup_steps)
        self.latent = torch.empty_like(self.start.x, memory_format=torch.contiguous_format)
        self.preview = torch.zeros_like(self.latent[: int(preview)])
        self.strips = Strips(packing, {spec.name: spec.patch for spec in family.latents}, patches)
        self.grids = family.grids(packing.unpack(self.latent))
        conditions, ranks = guidance.own_conditions, mesh.sequence.size
        self.plans = [TokenPlan(family.segments(each, self.grids), ranks, patches) for each in conditions]
        self.attention = PatchAttention(attention, self.plans)
        clocks = [guidance.clock(call.sigma) for call in self.calls]
        self.controls = StagedControls(family, conditions, clocks, self.grids, attention, ranks, patches)
        self.samplers = StripSamplers(self.start, job, self.strips) if self.stage.is_last else None
        self.transport = Transport(
            family, mesh, self.stage, self.units, self.plans, self.controls, self.strips, self.latent, len(self.preview)
        )
        self.announced = 0
        self.failures = torch.zeros(4, dtype=torch.int64, device=family.device)
        self._noted: Late | None = None
        self.has_lone_stages = has_lone_stages
        self.fault: tuple[str, str] | None = None
        """Why this stage stopped computing: a message and a hint."""

    def run(self, run: Run, on_step: OnStep) -> Tensor:
        """The sampled latent of the job's part, fp32, in the model's space, whole and equal on every rank.

        Raises on all ranks, at the start of the same step: `Cancelled`, `UserError` for a value that is not finite or a
        lone stage that failed. No stage waits for another to agree on that, so what happens in one step is acted upon
        after the next at the latest; what a device computed, one step later.
        """
        self.family.sites.attention = self.attention
        try:
            return self._run(run, on_step)
        finally:
            self.attention.forget()
            self.controls.forget()

    def _run(self, run: Run, on_step: OnStep) -> Tensor:
        self.transport.connect()
        if self.samplers:
            self._announce(0, len(self.strips) - 1)
        check = self._start_check(run)
        for number, unit in enumerate(self.units):
            if number and unit.patches[0] == 0 and self.calls[unit.call].evaluation == 0:
                self._finish(run, check, number)
                check = self._start_check(run)
            self.transport.expect(number)
            if self.stage.is_first:
                self._receive_latent(unit, on_step)
            outputs = [self._through_stage(unit, index) for index in range(len(self.plans))]
            if self.samplers:
                self._answer(unit, outputs, self.samplers)
        self._finish(run, check, len(self.units))
        if self.samplers:
            self.latent.copy_(self.samplers.result())
            self.failures[LAST_STEP] = ~torch.isfinite(self.latent).all()
        self._finish(run, run.start_check(self.failures.tolist()), len(self.units))
        self.transport.settle(len(self.units))
        self.mesh.pipefusion.broadcast(self.latent, self.stage.count - 1)
        on_step(self.start.total, self.start.total, self.latent[: len(self.preview)])
        return self.latent

    def _receive_latent(self, unit: Unit, on_step: OnStep) -> None:
        received, batch = self.transport.receive_latent(), len(self.latent)
        self.strips.put(self.latent, unit.patches, received[:batch])
        if len(self.preview):
            self.strips.put(self.preview, unit.patches, received[batch:])
        if unit.call and unit.patches[-1] == len(self.strips) - 1:
            answered = self.calls[unit.call - 1]
            if answered.evaluation == 0:
                on_step(answered.step + 1, self.start.total, self.preview)

    def _through_stage(self, unit: Unit, index: int) -> Tensor:
        """Take the unit through this stage for one condition; what the last stage predicts for the unit's strips."""
        received, skips = self.transport.receive()
        results = self._computed(unit, index, received, skips)
        if not self.stage.is_last:
            self.transport.send(results)
            return self.latent
        strip = self.strips.cut(self.latent, unit.patches)
        if results is None:
            return torch.zeros_like(strip)
        plan, sequence = self.plans[index], self.mesh.sequence
        tokens = {}
        for spec, output in zip(self.family.latents, results, strict=True):
            gathered = sequence.all_gather(output, plan.predicted_sizes(spec.name, unit.patches), dim=1)
            tokens[spec.name] = plan.in_order(spec.name, gathered, unit.patches)
        return self.strips.pack(self.family.untokenise(tokens, self.strips.latents(strip, unit.patches)))

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
        """The tokens to send to the next stage and the skips to send to others; on the last stage, its predictions."""
        family, plan, condition = self.family, self.plans[index], self.guidance.own_conditions[index]
        rank, call = self.mesh.sequence.rank, self.calls[unit.call]
        evaluation = Evaluation(
            {},
            self.grids,
            self.guidance.timestep(call.sigma, self.latent),
            condition,
            plan.shard(rank, unit.patches),
            self.guidance.next_timestep(call.sigma, self.latent),
        )
        if received is not None:
            streams, residuals = self.transport.unpack(received, unit, index)
            state = family.resume(evaluation, streams)
        else:
            # The whole latent, as of now: a half token at its lower border takes its other half from the first row.
            latent = self.guidance.model_sampling.calculate_input(call.sigma, self.latent)
            evaluation = replace(evaluation, tokens=family.tokenise(self.packing.unpack(latent)))
            residuals = self.controls.make(unit.call, index, unit.patches, rank, evaluation)
            state = family.embed(evaluation)
        # Without a warm-up, the first call finds no keys and values of the patches that are still to come.
        seen = len(self.strips) if unit.call else unit.patches[-1] + 1
        self.attention.begin(index, unit.patches, seen=seen)
        state = replace(state, skips=skips, prompts=condition.prompts_at(evaluation.timestep, self.attention))
        added = self.controls.added(unit.call, index)
        by_block = {number: residuals[key] for number, key in added.items() if key in residuals}
        policy = self._cache(index, unit.patches, float(call.sigma)).policy(evaluation)
        state = run_blocks(family, state, self.blocks, policy=policy, first=self.first_block, residuals=by_block)
        if self.stage.is_last:
            predicted = {spec.name: plan.predicted(spec.name, rank, unit.patches) for spec in family.latents}
            outputs = family.head(state, predicted)
            return [outputs[spec.name] for spec in family.latents]
        following = self.controls.needed(unit.call, index, self.first_block + len(self.blocks))
        return self.transport.pack(state, [residuals[key] for key in following])

    def caches_of_first_patches(self) -> list[StepCache]:
        """The caches that were asked once for each evaluation."""
        return [cache for (_, patches), cache in self._caches.items() if patches[0] == 0]

    def _cache(self, index: int, patches: Sequence[int], sigma: float) -> StepCache:
        """The step cache of these patches of a condition, at the noise level `sigma`."""
        key = index, tuple(patches)
        if key not in self._caches:
            self._caches[key] = self._cache_of(range(self.first_block, self.first_block + len(self.blocks)))
        self._caches[key].at(sigma)
        return self._caches[key]

    def _answer(self, unit: Unit, outputs: Sequence[Tensor], samplers: StripSamplers) -> None:
        """The last stage's work: guidance, the sampler's step, and the new latent on its way to the first stage."""
        call = self.calls[unit.call]
        x = samplers.asked(unit.patches)
        denoised = self.guidance.combine(outputs, x, call.sigma, lambda whole: self.strips.cut(whole, unit.patches))
        is_broken, is_latent = ~torch.isfinite(denoised).all(), ~torch.isfinite(x).all()
        found = torch.stack((is_broken & is_latent, is_broken & ~is_latent))
        self.failures[:LAST_STEP].clamp_(min=(len(self.calls) - unit.call) * found)
        negative = self.guidance.negative() if self.start.sampler.cfg_pp else None
        denoised = samplers.receive(unit.patches, denoised, negative)
        if call.evaluation == 0 and len(self.preview):
            self.strips.put(self.preview, unit.patches, denoised[: len(self.preview)])
        self._announce(unit.call + 1, unit.patches[-1])

    def _announce(self, call: int, patch: int) -> None:
        """Send the first stage what it needs for `call`, as far as the strips up to `patch` go."""
        assert self.samplers is not None
        while self.announced < len(self.units):
            unit = self.units[self.announced]
            if unit.call != call or unit.patches[-1] > patch:
                return
            preview = self.strips.cut(self.preview, unit.patches) if len(self.preview) else self.preview
            asked = self.samplers.asked(unit.patches)
            self.transport.send_latent(torch.cat((asked, preview)) if len(preview) else asked)
            self.announced += 1

    def _start_check(self, run: Run) -> Callable[[], list[int]]:
        """Starts to agree on the failures up to now; of those on a device on the ones that it noted a step ago."""
        now = Late(self.failures)
        known, self._noted = (now if now.is_here else self._noted), now
        return run.start_check(known.wait().tolist() if known else [0] * len(self.failures))

    def _finish(self, run: Run, check: Callable[[], list[int]], unit: int) -> None:
        """Leave the run before `unit`, with nothing on its way, when the check found a reason to."""
        try:
            failures = check()
            if failures[STAGE]:
                raise UserError(*next(fault for fault in run.gather(self.fault) if isinstance(fault, list)))
            self._raise_failure(failures)
        except (Cancelled, UserError):
            self.transport.settle(unit)
            raise

    def _raise_failure(self, failures: Sequence[int]) -> None:
        if failures[LAST_STEP]:
            check_result(torch.tensor(torch.nan), self.start.total)
        first = max(failures[:LAST_STEP])
        if first:
            call = self.calls[len(self.calls) - first]
            raise not_finite(call, self.start.total, latent_is_finite=failures[LATENT] < first)
