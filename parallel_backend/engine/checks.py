"""Both requests' checks: one of the layout before any model is loaded, others of what a request brings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distributed.axis import Axis
from ..errors import UserError
from ..families.family import Family
from ..families.spec import LatentSpec
from ..files import Detected, detect, open_checkpoint
from ..files.states import FileState
from ..layout.fitting import check_layout
from ..layout.layout import Layout
from ..layout.rules import RunFacts
from ..protocol.messages import Predict, Sample
from ..sampling.model_sampling import ModelSampling
from ..sampling.names import check_negative
from ..sampling.noise import GaussianNoise
from ..sampling.samplers import NoiseKind, find_sampler
from ..sampling.schedules import part_of, sigmas_for
from ..sampling.solver import NoiseSource

if TYPE_CHECKING:
    from ..run_context import Run


def check_request(
    request: Sample | Predict, tensors: Mapping[str, Tensor], ranks: int, files: Sequence[FileState]
) -> None:
    """Raise `UserError` unless the layout fits the ranks, the request, and the model as the header of its `files` says.

    Nothing is loaded for that, and nothing later asks again.
    """
    if request.layout.compile != "off":
        check_compiler()
    model = _header(request.model.path, tuple(files))
    spec = model.spec
    shapes = {name.removeprefix("latent."): tensor.shape for name, tensor in tensors.items() if is_latent(name)}
    if len(spec.latents) == 1 and "latent" in shapes:
        shapes[spec.latent.name] = shapes["latent"]
    facts = RunFacts(
        ranks=ranks,
        batch=batch_of(request, tensors),
        blocks=spec.count_blocks(model.config),
        heads=spec.count_heads(model.config),
        can=spec.can,
        stepwise=isinstance(request, Predict),
        cache=request.cache.rule if request.cache else None,
        is_study=isinstance(request, Sample) and request.study,
    )
    if isinstance(request, Sample):
        sampler = find_sampler(request.sampler)
        check_negative(sampler.name, request.cfg, has_negative=bool(request.negative))
        facts = replace(
            facts,
            cfg=request.cfg,
            cfg_pp=sampler.cfg_pp,
            has_negative=bool(request.negative),
            token_rows=spec.count_rows(shapes),
            sampler=request.sampler,
            whole_batch=not sampler.elementwise,
            controls=len(request.controls),
            entries=(*request.positive, *request.negative),
        )
    check_layout(request.layout, facts)


def check_compiler() -> None:
    """Raise `UserError` where torch.compile finds no compiler for what it writes: C++ for a CPU, C for a GPU."""
    on_gpu = torch.cuda.is_available()
    variable, usual = ("CC", ("gcc", "clang")) if on_gpu else ("CXX", ("g++",))
    wanted = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(shutil.which(name.split()[0]) for name in wanted):
        raise UserError(
            f"compile=blocks needs a compiler on the ranks' host, and there is none: looked for {', '.join(wanted)}.",
            f"Install one (apt install {'gcc' if on_gpu else 'g++'}), name it in {variable}, or set compile to off.",
        )


def batch_of(request: Sample | Predict, tensors: Mapping[str, Tensor]) -> int:
    """How many pictures a request is for, whatever else is wrong with it. Raises `UserError` without any latent."""
    name = next((name for name in tensors if is_latent(name)), "latent")
    latent = needed(name, tensors)
    rows = latent.shape[0] if latent.ndim else 0
    return rows // len(request.conditions) if isinstance(request, Predict) else rows


def is_latent(name: str) -> bool:
    return name == "latent" or name.startswith("latent.")


@lru_cache(maxsize=8)
def _header(path: str, files: tuple[FileState, ...]) -> Detected:
    """What the model's files say, as long as they are `files`."""
    return detect(open_checkpoint(path))


def check_rows(latent: Tensor, timestep: Tensor, count: int) -> None:
    """Raise `UserError` unless the rows are as many for each of `count` conditions, with finite times for each."""
    rows = latent.shape[0]
    fits = timestep.ndim in (1, 2) and timestep.shape[0] == rows and timestep.numel()
    if rows % count or not fits or not torch.isfinite(timestep).all():
        raise UserError(
            f"The latent has {rows} rows for {count} conditions, and times of the shape {list(timestep.shape)}.",
            "Look at the node that samples: it asks for a prediction that does not fit together.",
        )


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


def over_replicas(noted: Tensor, replicas: Axis) -> Tensor:
    """The largest of every replica's numbers `[N]`."""
    if replicas.size == 1:
        return noted
    return replicas.all_gather(noted.float().unsqueeze(0), [1] * replicas.size, dim=0).amax(dim=0)


def needed(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise UserError(f"The request carries no {name}.", "Use one version of this node pack on all sides.")
    return tensors[name]


def latents_of(tensors: Mapping[str, Tensor], family: Family, channels: int | None = None) -> dict[str, Tensor]:
    """The latents of a request by name, fp32: a single one is called `latent` there, several `latent.<name>`.

    `channels`: of the first one, where they are not its family's. Raises `UserError` for those that cannot be sampled.
    """
    single = len(family.latents) == 1
    found = {}
    for spec in family.latents:
        latent = needed("latent" if single else f"latent.{spec.name}", tensors).float()
        check_latent(latent, family, spec, channels if channels and spec is family.latent else spec.channels)
        found[spec.name] = latent
    if len({len(latent) for latent in found.values()}) > 1:
        raise UserError(
            f"The latents are of different batches: { {name: len(each) for name, each in found.items()} }.",
            "Use latents that belong together.",
        )
    return found


def check_latent(latent: Tensor, family: Family, spec: LatentSpec, channels: int) -> None:
    """Raise `UserError` for a latent that is empty, too large, of other than `channels`, or not finite."""
    if latent.ndim != 2 + spec.dims or not latent.numel():
        kind, dims = ("picture", "height, width") if spec.dims == 2 else ("video", "frames, height, width")
        raise UserError(
            f"The latent has the shape {list(latent.shape)}; a {kind}'s latent is [batch, channels, {dims}].",
            "Give a batch, a width and a height of at least 1.",
        )
    if latent.shape[1] != channels:
        raise UserError(
            f"The latent has {latent.shape[1]} channels; this {family.name} model takes {channels}.",
            "Use the VAE (or the empty latent node) that belongs to the model.",
        )
    patch = spec.patch[1]
    side = -(-max(latent.shape[-2:]) // patch)
    if family.max_side is not None and side > family.max_side:
        raise UserError(
            f"The latent is {latent.shape[-1]} wide and {latent.shape[-2]} high, which makes {side} rows or columns of "
            f"tokens; this {family.name} model has positions for {family.max_side}.",
            f"Make the latent at most {family.max_side * patch} wide and high.",
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
    """The noise levels of the steps asked for: the graph's own where it sent them, else those of the named schedule."""
    return part_of(
        _levels_of(request, tensors, model_sampling), request.start_step, request.end_step, request.leftover_noise
    )


def _levels_of(request: Sample, tensors: Mapping[str, Tensor], model_sampling: ModelSampling) -> Tensor:
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
