"""From a `Sample` request to its latent: what is checked, who computes what, and what is told on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapters.controlnet import Control, ControlNet
from .adapters.ip_adapter import ImagePrompt, IPAdapter, check_family
from .attention.core import AttentionCore, make_attention
from .attention.site import Attention
from .comm import Axis, split_sizes
from .errors import UserError
from .families.base import CELL, CONDITION_TENSORS, Condition, Family
from .fitting import Work, check_layout
from .layout import Layout, patches_of
from .mesh import Mesh
from .protocol import messages
from .protocol.messages import Conditioning, Sample
from .sampling.driver import SamplingJob, StepContext, latent_mask
from .sampling.driver import run as run_sampler
from .sampling.model_sampling import ModelSampling
from .sampling.noise import GaussianNoise, initial_noise
from .sampling.samplers import SAMPLERS, NoiseKind, find_sampler
from .sampling.schedules import sigmas_for
from .sampling.solver import NoiseSource
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
    latent = tensors["latent"].float()
    check_latent(latent, family, family.latent_channels)
    batch = latent.shape[0]
    model_sampling = family.model_sampling(request.sampling_shift)
    controls = [
        control_from(
            control, tensors.get(f"control.{index}"), (nets or {})[control.net.path], family, model_sampling, latent
        )
        for index, control in enumerate(request.controls)
    ]

    def side(entries: tuple[Conditioning, ...], name: str) -> Condition:
        condition = condition_from(entries, name, tensors, family, latent.shape, controls)
        pictures = pictures_of(entries[0], f"{name}.0.", tensors, family)
        asked = list(zip(entries[0].image_prompts, pictures, strict=True))
        prompts = image_prompts_from(asked, adapters or {}, family, mesh, batch, model_sampling)
        return replace(condition, image_prompts=prompts)

    positive = side(request.positive, "positive")
    negative = side(request.negative, "negative") if request.negative else None
    token_rows = -(-latent.shape[2] // family.patch_size)
    work = Work(
        batch=batch,
        cfg=request.cfg,
        has_negative=negative is not None,
        blocks=len(family.blocks),
        token_rows=token_rows,
        sampler=find_sampler(request.sampler).name,
        controls=len(request.controls),
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
        positive.part(own, batch),
        negative.part(own, batch) if negative else None,
        request.cfg,
    )

    def model(x: Tensor, sigma: Tensor, step: StepContext) -> Tensor:
        run.check_cancelled()
        strategy.begin_step(step.index)
        return fail_together(guidance.denoised(x, sigma), mesh.data)

    def on_step(step: int, total: int, denoised: Tensor, x: Tensor, sigma: Tensor) -> None:
        run.progress("sample", step + 1, total, family.process_out(denoised[:1]) if request.preview else None)

    def on_piped_step(done: int, total: int, picture: Tensor) -> None:
        run.progress("sample", done, total, family.process_out(picture) if request.preview else None)

    steps = len(job.sigmas) - 1
    warn_of_warmup(request.layout, steps, run)
    if mesh.pipefusion.size == 1 or steps < 1:
        try:
            sampled = run_sampler(model, job, on_step)
        finally:
            strategy.finish()
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


def fail_together(denoised: Tensor, replicas: Axis) -> Tensor:
    """`denoised`, or NaN on every replica when one of them has a value that is not finite: all stop at one step."""
    if replicas.size == 1:
        return denoised
    is_finite = torch.isfinite(denoised).all().float().view(1)
    replica_is_finite = replicas.all_gather(is_finite, [1] * replicas.size, dim=0)
    return denoised if replica_is_finite.all() else torch.full_like(denoised, torch.nan)


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


def condition_from(
    entries: tuple[Conditioning, ...],
    side: str,
    tensors: dict[str, Tensor],
    family: Family,
    shape: torch.Size,
    controls: Sequence[Control] = (),
) -> Condition:
    """The condition of one side for a latent of `shape`, on the family's device.

    Raises `UserError` for what cannot be sampled.
    """
    if len(entries) != 1:
        raise UserError(
            f"The {side} conditioning has {len(entries)} entries; the Parallel Sampler takes one.",
            "Remove ConditioningCombine or ConditioningSetArea before it.",
        )
    condition = condition_of(entries[0], f"{side}.0.", side, tensors, family, shape)
    named = entries[0].controls
    if named and not 0 <= min(named) <= max(named) < len(controls):
        raise UserError(f"The {side} conditioning names controls {named}, of which {len(controls)} were sent.")
    return replace(condition, controls=tuple(controls[index] for index in named))


def condition_of(
    entry: Conditioning, prefix: str, side: str, tensors: dict[str, Tensor], family: Family, shape: torch.Size
) -> Condition:
    """One entry with those of its tensors whose names begin with `prefix`; errors say that it is of `side`.

    Where no size of the picture is told, the model is told that of the latent of `shape` `[B, C, H, W]`.
    """
    given: dict[str, Any] = {
        name: tensors[prefix + name].to(family.device) for name in CONDITION_TENSORS if prefix + name in tensors
    }
    check_condition_tensors(given, side, shape[0])
    size = entry.size or (shape[2] * CELL, shape[3] * CELL)
    condition = Condition(**given, guidance=entry.guidance, size=size, target_size=entry.target_size)
    family.check_condition(condition)
    return condition


def control_from(
    control: messages.Control,
    picture: Tensor | None,
    net: ControlNet,
    family: Family,
    model_sampling: ModelSampling,
    latent: Tensor,
) -> Control:
    """A ControlNet at work in a run over `latent`. Raises `UserError` for what does not fit together."""
    net.work_with(family, control.mode)
    wanted = list(latent.shape[1:])
    if net.info.takes_pixels:
        wanted = [3, latent.shape[2] * CELL, latent.shape[3] * CELL]
    if picture is None or picture.shape[0] not in (1, len(latent)) or list(picture.shape[1:]) != wanted:
        found = "is missing" if picture is None else f"has the shape {list(picture.shape)}"
        what = "control picture" if net.info.takes_pixels else "latent of the control picture"
        raise UserError(
            f"The {what} for {net.info.name} {found}; this run takes {[len(latent), *wanted]}.",
            "Look at the node that made it, and at its VAE.",
        )
    return Control(
        net,
        net.see(picture),
        control.strength,
        control.mode,
        start=clock_at(control.start, model_sampling),
        end=clock_at(control.end, model_sampling),
    )


def pictures_of(entry: Conditioning, prefix: str, tensors: dict[str, Tensor], family: Family) -> list[Tensor]:
    """The pictures of an entry's image prompts, on the family's device. Raises `UserError` when one is missing."""
    names = [f"{prefix}image.{number}" for number in range(len(entry.image_prompts))]
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"The request carries no {missing[0]}.", "Use one version of this node pack on all sides.")
    return [tensors[name].to(family.device, family.dtype) for name in names]


def image_prompts_from(
    asked: Sequence[tuple[messages.ImagePrompt, Tensor]],
    adapters: Mapping[str, IPAdapter],
    family: Family,
    mesh: Mesh,
    batch: int,
    model_sampling: ModelSampling | None = None,
) -> tuple[ImagePrompt, ...]:
    """Pictures at work in a run, in parts of it where the `model_sampling` is told. Raises `UserError` for misfits."""
    prompts = []
    for prompt, picture in asked:
        adapter = adapters[prompt.adapter.path]
        check_family(adapter.info, family)
        adapter.check_picture(picture, batch)
        start, end = math.inf, -math.inf
        if model_sampling:
            start, end = (clock_at(percent, model_sampling) for percent in (prompt.start, prompt.end))
        prompts.append(ImagePrompt(adapter, picture, prompt.weight, start, end, mesh.tensor))
    return tuple(prompts)


def clock_at(percent: float, model_sampling: ModelSampling) -> float:
    """The model's clock at that part of the run; beyond all of its times at the ends."""
    if percent in (0.0, 1.0):
        return math.inf if percent == 0.0 else -math.inf
    return float(model_sampling.timestep(torch.tensor(model_sampling.percent_to_sigma(percent))).float())


def check_condition_tensors(given: dict[str, Tensor], side: str, batch: int) -> None:
    """Raise `UserError` for tensors of a condition that do not fit each other or the batch."""
    shapes = {name: list(tensor.shape) for name, tensor in given.items()}
    fits = "tokens" in given and all(
        len(shape) == CONDITION_TENSORS[name] and shape[0] in (1, batch) and all(shape)
        for name, shape in shapes.items()
    )
    for mask, tokens in (("mask", "tokens"), ("mask_2", "tokens_2")):
        fits = fits and (mask not in given or (tokens in given and shapes[mask][1] == shapes[tokens][1]))
    if not fits:
        raise UserError(
            f"The {side} conditioning does not fit together, or not the batch of {batch}: {shapes}.",
            "Look at the node that made it.",
        )


def noise_of(request: Sample, like: Tensor) -> NoiseSource | None:
    """What a stochastic sampler draws from, where it is not the same in all versions of ComfyUI."""
    if find_sampler(request.sampler).noise is not NoiseKind.GAUSSIAN:
        return None
    return GaussianNoise(like, request.seed, request.cpu_noise_offset)


def sigmas_of(request: Sample, tensors: dict[str, Tensor], model_sampling) -> Tensor:
    """The noise levels: the graph's own where it sent them, else the family's for the named schedule."""
    if request.schedule is None:
        return tensors["sigmas"]
    schedule = request.schedule
    return sigmas_for(model_sampling, schedule.scheduler, schedule.steps, schedule.denoise, request.sampler)
