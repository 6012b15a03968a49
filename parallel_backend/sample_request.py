"""From a `Sample` request to its latent: what is checked, who computes what, and what is told on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapters.controlnet import ControlNet
from .adapters.ip_adapter import IPAdapter
from .attention.core import AttentionCore, make_attention
from .attention.site import Attention
from .comm import Axis, split_sizes
from .conditioning import Inputs, control_of, entries_of_side, sizes_of_controls
from .errors import Cancelled, UserError
from .families.base import Family
from .fitting import Work, check_layout
from .layout import Layout, patches_of
from .mesh import Mesh
from .protocol.messages import Sample
from .sampling.driver import SamplingJob, StepContext, check_result, latent_mask, not_finite
from .sampling.driver import run as run_sampler
from .sampling.model_sampling import ModelSampling
from .sampling.noise import GaussianNoise, initial_noise
from .sampling.samplers import SAMPLERS, NoiseKind, find_sampler
from .sampling.schedules import sigmas_for
from .sampling.solver import Denoise, NoiseSource
from .stages import Stage
from .strategies.distrifusion import DistriFusion
from .strategies.guidance import Guidance
from .strategies.pipefusion import PipeFusion
from .strategies.sequence import SequenceParallel

if TYPE_CHECKING:
    from .control import Run


def sample(
    request: Sample,
    tensors: dict[str, Tensor],
    family: Family,
    mesh: Mesh,
    run: Run,
    nets: Mapping[str, ControlNet] | None = None,
    adapters: Mapping[str, IPAdapter] | None = None,
) -> Tensor:
    """The sampled latent `[B, C, H, W]`, unscaled, fp32 on the CPU, the same on every rank.

    `nets`: the request's ControlNets by path; `adapters`: its IP-Adapters.

    Raises `UserError` for a request that does not fit the model or the layout, before any work starts, and for a
    prediction that is not finite; `Cancelled` within a step of a cancel.
    """
    latent = needed("latent", tensors).float()
    check_latent(latent, family, family.latent_channels)
    batch = latent.shape[0]
    model_sampling = family.model_sampling(request.sampling_shift)
    entries = (*request.positive, *request.negative)
    sizes = sizes_of_controls(entries, len(request.controls), latent.shape)
    controls = [
        control_of(
            control,
            tensors.get(f"control.{index}"),
            (nets or {})[control.net.path],
            family,
            model_sampling,
            (batch, *sizes[index]),
        )
        for index, control in enumerate(request.controls)
    ]
    inputs = Inputs(tensors, family, model_sampling, latent.shape, controls, adapters or {}, mesh.tensor)
    positive = entries_of_side(request.positive, "positive", inputs)
    negative = entries_of_side(request.negative, "negative", inputs)
    token_rows = -(-latent.shape[2] // family.patch_size)
    work = Work(
        batch=batch,
        cfg=request.cfg,
        has_negative=bool(negative),
        blocks=len(family.blocks),
        token_rows=token_rows,
        sampler=find_sampler(request.sampler).name,
        controls=len(request.controls),
        entries=entries,
        elementwise=tuple(sampler.name for sampler in SAMPLERS.values() if sampler.elementwise),
    )
    check_layout(request.layout, work)
    attention = make_attention(request.layout.attention, mesh.ulysses, mesh.ring, family.device, family.dtype)

    counts = split_sizes(batch, mesh.data.size)
    start = sum(counts[: mesh.data.rank])
    own = slice(start, start + counts[mesh.data.rank])
    noise = initial_noise(latent.shape, torch.float32, request.seed, request.batch_index)
    job = SamplingJob(
        sampler=request.sampler,
        model_sampling=model_sampling,
        sigmas=sigmas_of(request, tensors, model_sampling),
        noise=(noise if request.add_noise else torch.zeros_like(noise)).to(family.device),
        # An empty latent is zero in the model's space too: there is nothing in it to be scaled.
        latent=(family.process_in(latent) if latent.any() else latent).to(family.device),
        seed=request.seed,
        mask=latent_mask(tensors["noise_mask"], latent.shape) if "noise_mask" in tensors else None,
        part=own,
        noise_source=noise_of(request, noise.to(family.device)),
    )
    strategy = strategy_of(request.layout, family, mesh, attention)
    guidance = Guidance(
        strategy.predict,
        model_sampling,
        mesh.cfg,
        [entry.part(own, batch) for entry in positive],
        [entry.part(own, batch) for entry in negative],
        request.cfg,
    )

    def model(x: Tensor, sigma: Tensor, step: StepContext) -> Tensor:
        run.check_cancelled()
        strategy.begin_step(step.index)
        denoised = guidance.denoised(x, sigma)
        fail_together(denoised, Denoise(x, sigma, step.index, step.evaluation), step.total, mesh.data)
        return denoised

    def on_step(step: int, total: int, denoised: Tensor, x: Tensor, sigma: Tensor) -> None:
        run.progress("sample", step + 1, total, family.process_out(denoised[:1]) if request.preview else None)

    def on_piped_step(done: int, total: int, picture: Tensor) -> None:
        run.progress("sample", done, total, family.process_out(picture) if request.preview else None)

    steps = len(job.sigmas) - 1
    warn_of_warmup(request.layout, steps, run)
    if mesh.pipefusion.size == 1 or steps < 1:
        leave = strategy.forget
        try:
            sampled = run_sampler(model, job, on_step)
            leave = strategy.finish
        except (Cancelled, UserError):
            leave = strategy.finish
            raise
        finally:
            leave()
    else:
        assert isinstance(attention, AttentionCore)
        pipeline = PipeFusion(
            family,
            mesh,
            attention,
            guidance,
            job,
            stage=Stage(mesh.pipefusion.rank, mesh.pipefusion.size, request.layout.stage_blocks),
            patches=patches_of(request.layout, token_rows),
            warmup_steps=request.layout.warmup_steps,
            preview=request.preview,
            has_lone_stages=request.layout.has_lone_stages,
        )
        sampled = pipeline.run(run, on_piped_step)
    whole = mesh.data.all_gather(sampled, counts, dim=0)
    check_result(whole, steps)
    return family.process_out(whole).cpu()


def strategy_of(layout: Layout, family: Family, mesh: Mesh, attention: Attention) -> SequenceParallel:
    """What predicts for whole pictures."""
    if mesh.distrifusion.size == 1:
        return SequenceParallel(family, mesh.sequence, attention)
    assert isinstance(attention, AttentionCore)
    in_turn = layout.refresh == "in_turn"
    return DistriFusion(family, mesh, attention, warmup_steps=layout.warmup_steps, in_turn=in_turn)


def warn_of_warmup(layout: Layout, steps: int, run: Run) -> None:
    """Say so when no step is left for PipeFusion or DistriFusion to speed up."""
    if layout.is_exact or steps < 1 or steps > layout.warmup_steps:
        return
    lost = {
        "pipefusion": f"{layout.pipefusion_degree} stages work one after the other",
        "distrifusion": f"{layout.distrifusion_degree} ranks wait for each other",
    }
    reason = next(text for axis, text in lost.items() if layout.degree(axis) > 1)
    run.log(
        "warning", f"warmup_steps={layout.warmup_steps} covers all {steps} steps: the run is exact, and its {reason}."
    )


def fail_together(denoised: Tensor, question: Denoise, total: int, replicas: Axis) -> None:
    """Raise the same `UserError` on every replica when one of them has a value that is not finite."""
    if replicas.size == 1:
        return
    are_finite = torch.stack([torch.isfinite(each).all() for each in (denoised, question.x)]).float()
    of_replicas = replicas.all_gather(are_finite.view(1, 2), [1] * replicas.size, dim=0)
    denoised_is_finite, latent_is_finite = of_replicas.bool().all(dim=0).tolist()
    if not denoised_is_finite:
        raise not_finite(question, total, latent_is_finite=latent_is_finite)


def needed(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise UserError(f"The request carries no {name}.", "Use one version of this node pack on all sides.")
    return tensors[name]


def check_latent(latent: Tensor, family: Family, channels: int) -> None:
    """Raise `UserError` for a latent that is empty, too large, of other than `channels`, or not finite."""
    if latent.ndim != 4 or not latent.numel():
        raise UserError(
            f"The latent has the shape {list(latent.shape)}; a picture's latent is [batch, channels, height, width].",
            "Give a batch, a width and a height of at least 1.",
        )
    if latent.shape[1] != channels:
        raise UserError(
            f"The latent has {latent.shape[1]} channels; this {family.name} model takes {channels}.",
            "Use the VAE (or the empty latent node) that belongs to the model.",
        )
    side = -(-max(latent.shape[2:]) // family.patch_size)
    if family.max_side is not None and side > family.max_side:
        raise UserError(
            f"The latent is {latent.shape[3]} wide and {latent.shape[2]} high, which makes {side} rows or columns of "
            f"tokens; this {family.name} model has positions for {family.max_side}.",
            f"Make the latent at most {family.max_side * family.patch_size} wide and high.",
        )
    if not torch.isfinite(latent).all():
        raise UserError(
            "The latent that comes in holds NaN or infinite values.",
            "Look at the node that made it; sampling did not start.",
        )


def noise_of(request: Sample, like: Tensor) -> NoiseSource | None:
    """What a stochastic sampler draws from, where it is not the same in all versions of ComfyUI."""
    if find_sampler(request.sampler).noise is not NoiseKind.GAUSSIAN:
        return None
    return GaussianNoise(like, request.seed, request.cpu_noise_offset)


def sigmas_of(request: Sample, tensors: Mapping[str, Tensor], model_sampling: ModelSampling) -> Tensor:
    """The noise levels: the graph's own where it sent them, else the family's for the named schedule."""
    if request.schedule is None:
        sigmas = needed("sigmas", tensors)
        if sigmas.ndim != 1:
            raise UserError(
                f"The sigmas have the shape {list(sigmas.shape)}; they are one row of noise levels.",
                "Look at the node that made them.",
            )
        return sigmas
    schedule = request.schedule
    return sigmas_for(model_sampling, schedule.scheduler, schedule.steps, schedule.denoise, request.sampler)
