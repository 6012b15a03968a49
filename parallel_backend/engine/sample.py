"""From a `Sample` request to its latent: what is checked, who computes what, and what is told on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.controlnet.nets import ControlNet
from ..adapters.ip_adapter import IPAdapter
from ..attention.usp import AttentionCore, make_attention
from ..distributed.mesh import Mesh
from ..errors import Cancelled, UserError
from ..families.family import Family
from ..layout.fitting import Work, check_layout
from ..layout.layout import patches_of
from ..layout.split import split_sizes
from ..layout.stages import Stage
from ..protocol.messages import Sample
from ..sampling.driver import SamplingJob, StepContext, check_result, latent_mask
from ..sampling.driver import run as run_sampler
from ..sampling.noise import initial_noise
from ..sampling.samplers import SAMPLERS, find_sampler
from ..sampling.solver import Denoise
from ..strategies.guidance import Guidance
from ..strategies.pipefusion.pipefusion import PipeFusion
from ..strategies.select import strategy_of
from .checks import check_latent, fail_together, needed, noise_of, sigmas_of, warn_of_warmup
from .conditioning import Inputs, control_of, entries_of_side, sizes_of_controls

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
