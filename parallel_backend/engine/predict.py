"""From a `Predict` request to the transformer's output: the sampler is elsewhere, and asks for one step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.controlnet.residuals import given_residuals
from ..distributed.mesh import Mesh
from ..errors import UserError
from ..families.family import Family, with_tokens
from ..layout.split import split_sizes
from ..protocol.messages import Predict
from ..strategies.prompt_batches import Asked, PromptBatches, joined_outputs, one_by_one
from ..strategies.select import attention_of, strategy_of
from .checks import check_rows, latents_of, needed
from .conditioning import control_of, image_prompts_of, pictures_of, prompt_of
from .run_conditions import RunCondition, RunConditions
from .step_caches import around

if TYPE_CHECKING:
    from ..adapters.controlnet.nets import ControlNet
    from ..adapters.ip_adapter import IPAdapter
    from ..families.condition import Condition
    from ..run_context import Run


def predict(
    request: Predict,
    tensors: dict[str, Tensor],
    run_conditions: RunConditions,
    family: Family,
    mesh: Mesh,
    run: Run,
    adapters: Mapping[str, IPAdapter],
    nets: Mapping[str, ControlNet],
) -> dict[str, Tensor]:
    """The prediction for every row of each latent, fp32 on the CPU, the same on every rank. Exact.

    `adapters`: the conditions' IP-Adapters by path; `nets`: their ControlNets.

    Raises `UserError` for a request that does not fit the model or the layout, before any work starts, and for a
    prediction that is not finite; `Cancelled` between two conditions.
    """
    latents = latents_of(tensors, family, family.input_channels)
    packing, shape = family.packing(latents), latents[family.latent.name].shape
    latent, timestep = (each.to(family.device) for each in (packing.pack(latents), needed("timestep", tensors).float()))
    following = tensors["next_timestep"].float().to(family.device) if "next_timestep" in tensors else None
    count = len(request.conditions)
    batch = latent.shape[0] // count
    for each in (timestep, following):
        if each is not None:
            check_rows(latent, each, count)
    for key, entry in request.run_conditions.items():
        condition = prompt_of(entry, f"{key}.0.", "prompt's", tensors, family, torch.Size((batch, *shape[1:])))
        run_conditions[key] = RunCondition(
            replace(condition, name=key),
            entry.image_prompts,
            pictures_of(entry, f"{key}.0.", tensors, family),
            entry.controls,
            [tensors.get(f"{key}.0.control.{number}") for number in range(len(entry.controls))],
        )
    conditions = [
        _active(run_conditions[key], family, mesh, adapters, nets, (batch, shape[-2], shape[-1]))
        for key in request.conditions
    ]
    given = None
    if request.residuals:
        given = given_residuals(request.residuals, tensors, with_tokens(family, "A ControlNet"), shape)
    attention = attention_of(request.layout, mesh, family)
    cache = run_conditions.cache_for(request, family, mesh)
    strategy = strategy_of(request.layout, family, mesh, around(attention, cache), packing, cache)

    sizes = split_sizes(batch, mesh.data.size)
    start = sum(sizes[: mesh.data.rank])
    own = slice(start, start + sizes[mesh.data.rank])
    own_conditions = [condition.part(own, batch) for condition in conditions]

    def asked(index: int) -> Asked:
        rows = slice(index * batch + own.start, index * batch + own.stop)
        condition = own_conditions[index]
        if given:
            condition = replace(condition, controls=(*condition.controls, given.rows(rows)))
        return Asked(latent[rows], timestep[rows], condition, None if following is None else following[rows])

    rounds = range(0, count, mesh.cfg.size)
    # Ranks without a condition of their own compute the last one again: weights are gathered by all together.
    shares = [[asked(min(first + rank, count - 1)) for first in rounds] for rank in range(mesh.cfg.size)]
    if request.cache:
        # A cache decides for each prompt by itself.
        predict_all = one_by_one(strategy.predict, run.check_cancelled)
    else:
        predict_all = PromptBatches(
            strategy,
            outputs=joined_outputs(request.layout),
            batch=sizes[0],
            joined=run_conditions.joined,
            between=run.check_cancelled,
        ).predict_all
    outputs = predict_all(shares, mesh.cfg.rank)
    predictions: list[Tensor] = []
    for first, output in zip(rounds, outputs, strict=True):
        gathered = mesh.cfg.all_gather(output.float().unsqueeze(0), [1] * mesh.cfg.size, dim=0)
        predictions += [mesh.data.all_gather(each, sizes, dim=0) for each in gathered[: count - first]]
    prediction = torch.cat(predictions)
    if not torch.isfinite(prediction).all():
        raise UserError(
            "The model's prediction is not finite: it holds NaN or infinite values.",
            "Load the model in bfloat16 or float32 instead of float16, lower cfg, or check the file of the model.",
        )
    parts = packing.unpack(prediction.cpu())
    if len(parts) == 1:
        return {"prediction": prediction.cpu()}
    return {f"prediction.{name}": part for name, part in parts.items()}


def _active(
    known: RunCondition,
    family: Family,
    mesh: Mesh,
    adapters: Mapping[str, IPAdapter],
    nets: Mapping[str, ControlNet],
    size: tuple[int, int, int],
) -> Condition:
    """The condition with its picture prompts and controls, for a latent of `size` (batch, height, width)."""
    asked = list(zip(known.prompts, known.pictures, strict=True))
    prompts = image_prompts_of(asked, adapters, family, mesh.tensor, size[0])
    controls = tuple(
        control_of(control, picture, nets[control.net.path], family, None, size)
        for control, picture in zip(known.controls, known.control_pictures, strict=True)
    )
    # By the object a family keeps what it has made of a condition's text: one without pictures stays the same.
    is_plain = not prompts and not controls
    return known.condition if is_plain else replace(known.condition, image_prompts=prompts, controls=controls)
