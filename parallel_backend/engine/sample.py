"""Serves a `Sample` request: checks it, distributes the work over the ranks, reports progress, returns the latent."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.controlnet.nets import ControlNet
from ..adapters.ip_adapter import IPAdapter
from ..attention.usp import AttentionCore
from ..caches.attention import AttentionCache
from ..caches.policy import COMPUTE_ALL, StepCache
from ..caches.residuals import ResidualCache
from ..caches.study import Study
from ..distributed.mesh import Mesh
from ..errors import Cancelled, UserError
from ..families.family import Family, TokenFamily
from ..layout.layout import patches_of
from ..layout.split import split_sizes
from ..layout.stages import Stage
from ..protocol.messages import Sample
from ..sampling.driver import SamplingJob, StepContext, latent_mask
from ..sampling.driver import run as run_sampler
from ..sampling.finite import check_result
from ..sampling.late import Late
from ..sampling.model_sampling import ModelSampling
from ..sampling.noise import initial_noises
from ..sampling.samplers import find_sampler
from ..strategies.guidance import Guidance
from ..strategies.pipefusion.pipefusion import PipeFusion
from ..strategies.prompt_batches import PredictAll, PromptBatches, joined_outputs, one_by_one
from ..strategies.row_parallel import RowParallel
from ..strategies.select import attention_of, strategy_of
from ..strategies.sequence import SequenceParallel
from ..strategies.weighted_prompts import WeightedPrompt
from ..tokens.grid import Packing
from .checks import is_latent, latents_of, noise_of, over_replicas, sigmas_of, warn_of_warmup
from .conditioning import Inputs, control_of, entries_of_side, sizes_of_controls
from .step_caches import around, count, step_cache_of, study_of, watching

if TYPE_CHECKING:
    from ..run_context import Run


def sample(
    request: Sample,
    tensors: dict[str, Tensor],
    family: Family,
    mesh: Mesh,
    run: Run,
    nets: Mapping[str, ControlNet] | None = None,
    adapters: Mapping[str, IPAdapter] | None = None,
) -> dict[str, Tensor]:
    """The sampled latents, under their names in the request, unscaled, fp32 on the CPU, the same on every rank.

    A run of no steps gives back those that came.

    `nets`: the request's ControlNets by path; `adapters`: its IP-Adapters.

    Raises `UserError` for a request that does not fit the model or the layout, before any work starts, and for a
    prediction that is not finite; `Cancelled` within a step of a cancel.
    """
    latents = latents_of(tensors, family)
    packing, batch = family.packing(latents), len(next(iter(latents.values())))
    model_sampling = family.model_sampling(request.sampling_shift)
    sides = _sides(request, tensors, family, mesh, model_sampling, latents[family.latent.name], nets, adapters)
    attention = attention_of(request.layout, mesh, family)

    counts = split_sizes(batch, mesh.data.size)
    start = sum(counts[: mesh.data.rank])
    own = slice(start, start + counts[mesh.data.rank])
    job = _job(request, tensors, family, latents, packing, model_sampling, own)
    steps = len(job.sigmas) - 1
    if steps < 1:
        return _reply(latents)
    work = _Work(request, family, mesh, run, packing, job)
    study = study_of(family, mesh) if request.study else None
    is_piped = mesh.pipefusion.size > 1
    cache = COMPUTE_ALL if is_piped else work.cache()
    strategy = strategy_of(request.layout, family, mesh, around(attention, study or cache), packing, study or cache)
    positive, negative = ([entry.part(own, batch) for entry in side] for side in sides)
    if request.cache or study:
        # They look at each prompt by itself.
        predict_all = one_by_one(strategy.predict)
    else:
        predict_all = PromptBatches(strategy, outputs=joined_outputs(request.layout), batch=counts[0]).predict_all
    guidance = work.guidance(predict_all, positive, negative)
    warn_of_warmup(request.layout, steps, run)
    if is_piped:
        assert isinstance(attention, AttentionCore)
        sampled = work.through_stages(attention, guidance, patches_of(request.layout, _token_rows(family, latents)))
    else:
        sampled = work.in_steps(strategy, guidance, cache, study)
    whole = mesh.data.all_gather(sampled, counts, dim=0)
    check_result(whole, steps)
    parts = packing.unpack(whole)
    reply = _reply({spec.name: family.process_out(parts[spec.name], spec) for spec in family.latents})
    return reply | _measured(study, model_sampling) if study else reply


@dataclass(frozen=True)
class _Work:
    """The sampling of this rank's part of a batch, `[B, ...]`, in the model's space."""

    request: Sample
    family: Family
    mesh: Mesh
    run: Run
    packing: Packing
    job: SamplingJob

    def cache(self, blocks: range | None = None) -> StepCache:
        """The request's step cache of these `blocks`, of all by default."""
        if self.request.cache is None:
            return COMPUTE_ALL
        return step_cache_of(self.request.cache, self.family, self.mesh, self.job.model_sampling, blocks)

    def guidance(
        self, predict_all: PredictAll, positive: list[WeightedPrompt], negative: list[WeightedPrompt]
    ) -> Guidance:
        return Guidance(
            predict_all,
            self.job.model_sampling,
            self.mesh.cfg,
            positive,
            negative,
            self.request.cfg,
            self.job.sigmas.float().cpu() if self.family.spec.takes_next_time else None,
            find_sampler(self.request.sampler).cfg_pp,
            self.request.cfg_norm,
        )

    def in_steps(
        self, strategy: SequenceParallel | RowParallel, guidance: Guidance, cache: StepCache, study: Study | None
    ) -> Tensor:
        """Sampled one step after the other, each with all tokens."""
        reports = _Reports(self.run)

        def model(x: Tensor, sigma: Tensor, step: StepContext) -> Tensor:
            self.run.check_cancelled()
            strategy.begin_step(step.index)
            cache.at(float(sigma))
            return guidance.denoised(x, sigma)

        def on_step(step: int, total: int, denoised: Tensor, x: Tensor, sigma: Tensor) -> None:
            reports.add(step + 1, total, self._preview(denoised))

        def together(noted: Tensor) -> Tensor:
            return over_replicas(noted, self.mesh.data)

        leave = strategy.forget
        try:
            with watching(study, self.family) if study else nullcontext():
                sampled = run_sampler(model, self.job, on_step, guidance.negative, together)
            leave = strategy.finish
        except (Cancelled, UserError):
            leave = strategy.finish
            raise
        finally:
            leave()
        if isinstance(cache, ResidualCache | AttentionCache):
            self.run.evaluations(*count([cache]))
        reports.finish()
        return sampled

    def through_stages(self, attention: AttentionCore, guidance: Guidance, patches: int) -> Tensor:
        """Sampled patch by patch, which the stages of PipeFusion hand on to each other."""
        assert isinstance(self.family, TokenFamily)
        reports, layout = _Reports(self.run), self.request.layout
        pipeline = PipeFusion(
            self.family,
            self.mesh,
            attention,
            guidance,
            self.job,
            self.packing,
            self.cache,
            stage=Stage(self.mesh.pipefusion.rank, self.mesh.pipefusion.size, layout.stage_blocks),
            patches=patches,
            warmup_steps=layout.warmup_steps,
            preview=self.request.preview,
            has_lone_stages=layout.has_lone_stages,
        )

        def on_step(done: int, total: int, picture: Tensor) -> None:
            reports.add(done, total, self._preview(picture))

        sampled = pipeline.run(self.run, on_step)
        if counted := [cache for cache in pipeline.caches_of_first_patches() if isinstance(cache, ResidualCache)]:
            self.run.evaluations(*count(counted))
        reports.finish()
        return sampled

    def _preview(self, x: Tensor) -> Tensor | None:
        """The first picture, of a video its first frame, as what it is now."""
        if not self.request.preview:
            return None
        picture = self.packing.unpack(x[:1])[self.family.latent.name]
        return self.family.process_out(picture[:, :, :1] if picture.ndim == 5 else picture)


def _measured(study: Study, model_sampling: ModelSampling) -> dict[str, Tensor]:
    """What a study measured, under its names in the reply, by the levels of the evaluations."""
    measured = study.measured()
    measured["levels"] = torch.tensor([model_sampling.level(float(time)) for time in measured.pop("times")])
    return {f"study.{name}": tensor for name, tensor in measured.items()}


class _Reports:
    """Reports the steps of a run; one whose preview is on its way from the device, when the next step is reported."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._held: tuple[int, int, Late] | None = None

    def add(self, done: int, total: int, preview: Tensor | None) -> None:
        self.finish()
        if preview is None:
            self._run.progress("sample", done, total)
            return
        self._held = done, total, Late(preview.detach())
        if self._held[2].is_here:
            self.finish()

    def finish(self) -> None:
        """Reports what is held."""
        if self._held is not None:
            (done, total, late), self._held = self._held, None
            self._run.progress("sample", done, total, late.wait())


def _reply(latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The latents, unscaled, under their names in the reply."""
    return {"latent" if len(latents) == 1 else f"latent.{name}": latent.cpu() for name, latent in latents.items()}


def _sides(
    request: Sample,
    tensors: Mapping[str, Tensor],
    family: Family,
    mesh: Mesh,
    model_sampling: ModelSampling,
    latent: Tensor,
    nets: Mapping[str, ControlNet] | None,
    adapters: Mapping[str, IPAdapter] | None,
) -> tuple[list[WeightedPrompt], list[WeightedPrompt]]:
    """The positive and the negative entries, with their controls, for the run of the first `latent`."""
    sizes = sizes_of_controls((*request.positive, *request.negative), len(request.controls), latent.shape)
    controls = [
        control_of(
            control,
            tensors.get(f"control.{index}"),
            (nets or {})[control.net.path],
            family,
            model_sampling,
            (len(latent), *sizes[index]),
        )
        for index, control in enumerate(request.controls)
    ]
    inputs = Inputs(tensors, family, model_sampling, latent.shape, controls, adapters or {}, mesh.tensor)
    return (
        entries_of_side(request.positive, "positive", inputs),
        entries_of_side(request.negative, "negative", inputs),
    )


def _token_rows(family: Family, latents: Mapping[str, Tensor]) -> int:
    """Into how many patches the latents can be cut: of each along its frames or its rows, whichever are more."""
    return min(max(grid.frames, grid.rows) for grid in family.grids(latents).values())


def _job(
    request: Sample,
    tensors: Mapping[str, Tensor],
    family: Family,
    latents: Mapping[str, Tensor],
    packing: Packing,
    model_sampling: ModelSampling,
    own: slice,
) -> SamplingJob:
    """The run of the pictures `own`; noise is that of the whole batch, drawn latent by latent."""
    shapes = [latents[spec.name].shape for spec in family.latents]
    # ComfyUI draws in fp32, and keeps the noise in the type of the latent that comes.
    came = next(tensor.dtype for name, tensor in tensors.items() if is_latent(name))
    draws = [draw.float() for draw in initial_noises(shapes, came, request.seed, request.batch_index)]
    noise = packing.pack({spec.name: draw for spec, draw in zip(family.latents, draws, strict=True)})
    # An empty latent is zero in the model's space too: there is nothing in it to be scaled.
    inner = {
        spec.name: family.process_in(latent, spec) if latent.any() else latent
        for spec in family.latents
        for latent in (latents[spec.name],)
    }
    return SamplingJob(
        sampler=request.sampler,
        model_sampling=model_sampling,
        sigmas=sigmas_of(request, tensors, model_sampling),
        noise=(noise if request.add_noise else torch.zeros_like(noise)).to(family.device),
        latent=packing.pack(inner).to(family.device),
        seed=request.seed,
        mask=_mask(tensors, latents, packing),
        part=own,
        noise_source=noise_of(request, noise.to(family.device)),
    )


def _mask(tensors: Mapping[str, Tensor], latents: Mapping[str, Tensor], packing: Packing) -> Tensor | None:
    """Where the latents are to change; all of one of several that has no mask, None where none has."""
    keys = {name: "noise_mask" if len(latents) == 1 else f"noise_mask.{name}" for name in latents}
    if not tensors.keys() & set(keys.values()):
        return None
    masks = {
        name: latent_mask(tensors[keys[name]], latent.shape) if keys[name] in tensors else torch.ones_like(latent)
        for name, latent in latents.items()
    }
    return packing.pack(masks)
