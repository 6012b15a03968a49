"""A run of a sampler that works in this process: one request to the ranks for each of its model evaluations."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..launcher.client import Client
from ..parallel_backend.errors import UserError
from ..parallel_backend.protocol.messages import Adapters, EndRun, Predict, Prompt, ResidualList, WeightChange
from . import host, ip_adapter, patches, session
from .conditioning import REFERENCE_PLACES
from .handles import OWN_LOADER, ModelHandle
from .layout import LayoutChoice
from .patches import SentChange

CLIP_AND_T5 = {"context": "tokens", "y": "pooled"}
T5 = {"context": "tokens"}
TAKES: dict[str, Mapping[str, str]] = {
    "flux": CLIP_AND_T5,
    "sd3": CLIP_AND_T5,
    "pixart-alpha": T5,
    "pixart-sigma": T5,
    "hunyuandit": {
        "context": "tokens",
        "text_embedding_mask": "mask",
        "encoder_hidden_states_t5": "tokens_2",
        "text_embedding_mask_t5": "mask_2",
    },
}
"""Per family: from the inputs of ComfyUI's network to the names of a condition's tensors."""

CONTROLLED = ("flux", "sd3", "hunyuandit")
"""Families whose networks add the residuals of ControlNets."""
CANNOT_TRAVEL = {
    "attention_mask": ("an attention mask", "Use a style model without strength, or attention at strength 1"),
    "style": ("a style", "Remove the node that sets it"),
}
"""Inputs of ComfyUI's networks that would change the picture, and what to do instead."""


@dataclass
class _Prompt:
    """One condition of a run: `tensors` of one row, or of one for each picture."""

    key: str
    entry: Prompt
    tensors: dict[str, Tensor]

    def equals(self, entry: Prompt, tensors: Mapping[str, Tensor]) -> bool:
        return (
            entry == self.entry
            and tensors.keys() == self.tensors.keys()
            and all(_is_repeated(self.tensors[name], tensor) for name, tensor in tensors.items())
        )


@dataclass
class _Run:
    key: str
    handle: ModelHandle
    client: Client
    spans: Sequence[tuple[float, float]]
    """Of each of the handle's pictures: the noise levels from which and down to which it works."""
    prompts: list[_Prompt] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    delivered: set[WeightChange] = field(default_factory=set)
    warned: bool = False


class StepwiseModel:
    """Predicts in the ranks. Conditions and changes of weights are sent once a run, the latent each time."""

    def __init__(self) -> None:
        self.changes: Sequence[SentChange] = ()
        """What lies beside the weights in the predictions that are asked for from now on."""
        self._run: _Run | None = None

    def begin(
        self,
        handle: ModelHandle,
        changes: Sequence[SentChange],
        percent_to_sigma: Callable[[float], float],
    ) -> None:
        """A sampler starts with the model of `handle`. Connects to the sidecar, started if need be.

        `percent_to_sigma`: the noise level at a part of the run.
        """
        self.end()
        layout = handle.layout
        client = session.client_for(layout.ranks if layout else None)
        self.changes = changes
        shown = [picture.message for picture in handle.pictures]
        spans = [(float(percent_to_sigma(each.start)), float(percent_to_sigma(each.end))) for each in shown]
        self._run = _Run(uuid.uuid4().hex, handle, client, spans)
        host.current().beginning(client.welcome)

    def end(self) -> None:
        """The sampler is done, however it ended."""
        run, self._run = self._run, None
        if run is not None and run.told and run.client.alive:
            session.ask(run.client, EndRun(id=0, run=run.key))

    def predict(
        self, latent: Tensor, timestep: Tensor, inputs: Mapping[str, Any], sides: Sequence[int], sigma: float = 0.0
    ) -> Tensor:
        """The network's output for `latent` `[N * B, C, H, W]` at `timestep` `[N * B]`, the noise level `sigma`.

        `inputs`: what ComfyUI's network would be given beside them, for each of N conditions after the other, which are
        of the `sides` POSITIVE or NEGATIVE. Raises `UserError` naming what cannot be sent to the ranks.
        """
        run = self._run
        if run is None:
            raise UserError(
                "The model was asked for a prediction by a node that is no sampler.",
                f"Remove that node, or {OWN_LOADER}",
            )
        refuse_inputs(inputs)
        residuals, residual_tensors = residuals_of(inputs.get("control"), run.handle.family)
        conditions = len(sides)
        batch = latent.shape[0] // conditions
        rows = [slice(start, start + batch) for start in range(0, batch * conditions, batch)]
        keys = tuple(self._key(run, inputs, own, side, sigma) for own, side in zip(rows, sides, strict=True))
        choice = run.handle.layout or LayoutChoice()
        layout = choice.resolve(run.client.welcome.ranks, batch=batch, guided=conditions > 1)
        if layout.cfg_degree > conditions and not run.warned:
            run.warned = True
            host.current().say(
                "cfg_degree=2, but the prompts come one at a time (at cfg 1, or of different lengths): half of the "
                "ranks repeat the work of the others. Set cfg_degree to 0 to have the layout chosen for each."
            )
        changes = tuple(change.message for change in self.changes)
        if not run.delivered.issuperset(changes):
            patches.deliver(run.client, self.changes)
            run.delivered.update(changes)
        message = Predict(
            id=0,
            model=run.handle.ref,
            layout=layout,
            run=run.key,
            conditions=keys,
            adapters=Adapters(files=run.handle.loras, changes=changes),
            residuals=residuals,
        )
        tensors = {"latent": latent, "timestep": timestep, **residual_tensors}
        return self._ask(run, message, tensors).to(latent.device)

    def _key(self, run: _Run, inputs: Mapping[str, Any], rows: slice, side: int, sigma: float) -> str:
        """The key of the condition of these rows; the ranks hear of it when they need it."""
        pictures = [
            picture
            for picture, (start, end) in zip(run.handle.pictures, run.spans, strict=True)
            if picture.message.weight and end <= sigma <= start
        ]
        names = TAKES[run.handle.family]
        tensors = {name: inputs[key][rows] for key, name in names.items() if inputs.get(key) is not None}
        references = enumerate(inputs.get("ref_latents") or ())
        tensors |= {f"reference.{number}": reference[rows] for number, reference in references}
        tensors |= ip_adapter.embeddings(pictures, side)
        prompts = tuple(picture.message for picture in pictures)
        entry = entry_of_inputs(inputs, rows).model_copy(update={"image_prompts": prompts})
        for prompt in run.prompts:
            if prompt.equals(entry, tensors):
                return prompt.key
        kept = {name: tensor[:1] if _is_repeated(tensor[:1], tensor) else tensor for name, tensor in tensors.items()}
        prompt = _Prompt(uuid.uuid4().hex, entry, kept)
        run.prompts.append(prompt)
        return prompt.key

    def _ask(self, run: _Run, message: Predict, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tells what the ranks do not hold: what is new in this run, then what they say that they miss."""
        unknown = set(message.conditions) - run.told
        while True:
            prompts = [prompt for prompt in run.prompts if prompt.key in unknown]
            told = {prompt.key: prompt.entry for prompt in prompts}
            bodies = {f"{p.key}.0.{name}": tensor for p in prompts for name, tensor in p.tensors.items()}
            reply = session.ask(run.client, message.model_copy(update={"told": told}), {**tensors, **bodies})
            run.told |= unknown
            if "prediction" in reply.tensors:
                return reply.tensors["prediction"]
            missing = reply.result.data["missing"]
            assert isinstance(missing, list)
            unknown |= set(missing)


def refuse_inputs(inputs: Mapping[str, Any]) -> None:
    """Raise `UserError` naming what a node gives the model and the ranks do not take."""
    for name, (what, advice) in CANNOT_TRAVEL.items():
        if inputs.get(name) is not None:
            raise UserError(
                f"The model is given {what}, which cannot be sent to the ranks.",
                f"{advice}, or {OWN_LOADER}",
            )
    places = inputs.get("ref_latents_method")
    if places is not None and places not in REFERENCE_PLACES:
        raise UserError(
            f"The model is given reference_latents_method={places}, which the ranks do not know.",
            f"Use one of {', '.join(REFERENCE_PLACES)}, or {OWN_LOADER}",
        )


def residuals_of(control: Any, family: str) -> tuple[dict[ResidualList, tuple[int | None, ...]], dict[str, Tensor]]:
    """What ComfyUI's ControlNets add in this step: the numbers of its lists, and the tensors, each of them once.

    Raises `UserError` for a model that takes none.
    """
    if not control:
        return {}, {}
    if family not in CONTROLLED:
        raise UserError(
            f"The model is given the residuals of a ControlNet, which a {family} model does not take.",
            f"Remove the Apply ControlNet node, or {OWN_LOADER}",
        )
    numbers: dict[int, int] = {}
    kept: dict[str, Tensor] = {}
    lists: dict[ResidualList, tuple[int | None, ...]] = {}
    names: tuple[ResidualList, ...] = ("input", "output")
    for name in names:
        for tensor in control.get(name) or ():
            if tensor is not None and id(tensor) not in numbers:
                numbers[id(tensor)] = len(numbers)
                kept[f"residual.{numbers[id(tensor)]}"] = tensor
        lists[name] = tuple(None if tensor is None else numbers[id(tensor)] for tensor in control.get(name) or ())
    return {name: own for name, own in lists.items() if own}, kept


def entry_of_inputs(inputs: Mapping[str, Any], rows: slice) -> Prompt:
    """What the networks are told beside tensors: distilled guidance, the picture's size, references."""
    guidance, size, target_size = _shared(inputs.get("guidance"), rows), None, None
    if inputs.get("c_size") is not None:
        height, width = size = _shared(inputs["c_size"], rows, 2)
        ratio = _shared(inputs.get("c_ar"), rows)
        if ratio is not None and abs(ratio - height / width) > 1e-4 * ratio:
            raise UserError(
                f"The conditioning says aspect_ratio={ratio:g} of a picture of {width} x {height}.",
                "Remove the node that sets it: the picture's own is taken.",
            )
    if inputs.get("image_meta_size") is not None:
        height, width, target_height, target_width, top, left = _shared(inputs["image_meta_size"], rows, 6)
        size, target_size = (height, width), (target_height, target_width)
        if top or left:
            raise UserError(
                f"The model is told of a crop at {left}, {top}, which cannot be sent to the ranks.",
                "Remove the node that sets it.",
            )
    return Prompt(
        guidance=guidance,
        size=size,
        target_size=target_size,
        references=len(inputs.get("ref_latents") or ()),
        reference_places=inputs.get("ref_latents_method") or REFERENCE_PLACES[0],
    )


def _shared(values: Tensor | None, rows: slice, numbers: int = 0) -> Any:
    """The number, or the whole `numbers`, that these rows of a tensor have in common."""
    if values is None:
        return None
    of_rows = values.reshape(values.shape[0], -1)[rows]
    if not _is_repeated(of_rows[:1], of_rows):
        raise UserError(
            "The pictures of one batch are told of different sizes or guidance, which the ranks take only once.",
            "Sample the pictures one after the other.",
        )
    return tuple(round(value) for value in of_rows[0].tolist()) if numbers else float(of_rows[0, 0])


def _is_repeated(row: Tensor, rows: Tensor) -> bool:
    """Whether `rows` are `row` (or rows), over and over."""
    fits = row.shape[1:] == rows.shape[1:] and row.shape[0] in (1, rows.shape[0]) and row.dtype == rows.dtype
    return fits and torch.equal(row.expand_as(rows), rows)
