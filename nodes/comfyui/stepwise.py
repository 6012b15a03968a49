"""A run of a sampler that works in this process: one request to the ranks for each of its model evaluations."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...launcher.client import Client
from ...parallel_backend.errors import UserError
from ...parallel_backend.layout.layout import AttentionKernel, Layout
from ...parallel_backend.protocol.messages import (
    Adapters,
    ControlUse,
    EndRun,
    ImagePromptUse,
    Predict,
    RunPrompt,
    StepCache,
    WeightChange,
)
from .. import host
from ..handles import OWN_LOADER, ModelHandle, SentChange
from ..layout_choice import LayoutChoice
from ..request import image_prompts
from ..request.controls import PendingControl, active_controls
from ..request.latent import names_of
from ..request.network_inputs import entry_of_inputs, is_repeated, refuse_inputs, residuals_of
from ..session import session, weight_delivery
from ..session.activity import FAILURES

WORDS = {ImagePromptUse: "IP-Adapter", ControlUse: "ControlNet", StepCache: "step cache"}
"""What works for a part of a run."""

END_S = 10.0
"""The time limit for the ranks to hear that a run is over. They forget it with the next one anyway."""


@dataclass
class _Prompt:
    """One condition of a run: `tensors` of one row, or of one for each picture."""

    key: str
    entry: RunPrompt
    tensors: dict[str, Tensor]

    def equals(self, entry: RunPrompt, tensors: Mapping[str, Tensor]) -> bool:
        return (
            entry == self.entry
            and tensors.keys() == self.tensors.keys()
            and all(is_repeated(self.tensors[name], tensor) for name, tensor in tensors.items())
        )


@dataclass
class _Run:
    key: str
    handle: ModelHandle
    client: Client
    percent_to_sigma: Callable[[float], float]
    """The noise level at a part of the run."""
    attention: AttentionKernel = "auto"
    """The kernel that a node has chosen."""
    control_pictures: dict[tuple[PendingControl, int, int, int], Tensor] = field(default_factory=dict)
    """By the control, the rows and columns of cells that it covers, and the batch."""
    prompts: list[_Prompt] = field(default_factory=list)
    sent: set[str] = field(default_factory=set)
    delivered: set[WeightChange] = field(default_factory=set)
    layouts: dict[tuple[int, bool], Layout] = field(default_factory=dict)
    """By the batch, and whether several conditions are asked for at once."""
    warned: bool = False

    def is_active(self, use: ImagePromptUse | ControlUse | StepCache, sigma: float | None) -> bool:
        """Whether it works at the noise level `sigma`. Raises `UserError` where that would have to be known."""
        if (use.start, use.end) == (0.0, 1.0):
            return True
        if sigma is None:
            raise UserError(
                f"The {WORDS[type(use)]} works from {use.start:g} to {use.end:g} of the run, but the sampler does not "
                "say at which noise level it is.",
                "Set start_percent to 0 and end_percent to 1, or use Parallel Sampler.",
            )
        start, end = (float(self.percent_to_sigma(percent)) for percent in (use.start, use.end))
        return end <= sigma <= start

    def picture_of(self, control: PendingControl, height: int, width: int, batch: int) -> Tensor:
        """The control's picture for so many rows and columns of cells, encoded once a run."""
        key = control, height, width, batch
        if key not in self.control_pictures:
            self.control_pictures[key] = control.picture(height, width, batch)
        return self.control_pictures[key]


def _layout_for(
    handle: ModelHandle, client: Client, *, batch: int | None, guided: bool, attention: AttentionKernel = "auto"
) -> Layout:
    """Raises `UserError` for a layout that does not fit a sampler that asks for one step at a time."""
    facts = replace(handle.facts(client.welcome.ranks), stepwise=True, batch=batch)
    return (handle.layout or LayoutChoice()).resolve(facts, guided=guided, preferred_attention=attention)


class StepwiseModel:
    """Predicts in the ranks. Conditions and changes of weights are sent once a run, the latent each time."""

    def __init__(self) -> None:
        self.changes: Sequence[SentChange] = ()
        """The changes of the weights for later predictions."""
        self._run: _Run | None = None

    def begin(
        self,
        handle: ModelHandle,
        changes: Sequence[SentChange],
        percent_to_sigma: Callable[[float], float],
        attention: AttentionKernel = "auto",
    ) -> None:
        """A sampler starts with the model of `handle`. Connects to the sidecar, started if need be.

        `percent_to_sigma`: the noise level at a part of the run. `attention`: the kernel that a node has chosen.
        """
        self.end()
        client = session.client_for(handle.layout)
        # What no guidance and no batch would change is refused before anything is sent.
        _layout_for(handle, client, batch=None, guided=False)
        self.changes = changes
        self._run = _Run(uuid.uuid4().hex, handle, client, percent_to_sigma, attention)
        host.current().beginning(client.welcome)

    def end(self) -> None:
        """The sampler is done, however it ended: this can be neither cancelled nor fail in its stead."""
        run, self._run = self._run, None
        if run is None or not run.sent or not run.client.alive:
            return
        try:
            run.client.request(EndRun(id=0, run=run.key), on_event=session.hear, timeout=END_S)
        except FAILURES as error:
            host.logger.warning("The ranks could not be told that a run is over: %s", error)

    def predict(
        self,
        latents: Sequence[Tensor],
        timestep: Tensor,
        inputs: Mapping[str, Any],
        sides: Sequence[int],
        sigma: float | None = None,
        next_timestep: Tensor | None = None,
    ) -> list[Tensor]:
        """The network's output for each of its `latents`, `[N * B, C, H, W]` or `[N * B, C, T, H, W]`.

        `timestep`: `[N * B]` or `[N * B, frames]`, at the noise level `sigma`, if that is known; `next_timestep`
        `[N * B]`: that of the run's level after it, where there is one. `inputs`: the other inputs of ComfyUI's
        network, for each of N conditions after the other, which are of the `sides` POSITIVE or NEGATIVE. Raises
        `UserError` naming what cannot be sent to the ranks.
        """
        run = self._run
        if run is None:
            raise UserError(
                "The model was asked for a prediction by a node that is no sampler.",
                f"Remove that node, or {OWN_LOADER}",
            )
        refuse_inputs(inputs, run.handle.spec)
        names = names_of(len(latents), run.handle.spec.latents, run.handle.family)
        residuals, residual_tensors = residuals_of(inputs.get("control"), run.handle.family)
        conditions = len(sides)
        batch = latents[0].shape[0] // conditions
        rows = [slice(start, start + batch) for start in range(0, batch * conditions, batch)]
        controls = self._controls(run, inputs.get("control"), latents[0][:batch])
        keys = tuple(self._key(run, inputs, own, side, sigma, controls) for own, side in zip(rows, sides, strict=True))
        layout = run.layouts.get((batch, conditions > 1))
        if layout is None:
            layout = _layout_for(run.handle, run.client, batch=batch, guided=conditions > 1, attention=run.attention)
            run.layouts[batch, conditions > 1] = layout
        if layout.cfg_degree > conditions and not run.warned:
            run.warned = True
            host.current().say(
                "cfg_degree=2, but the prompts come one at a time (at cfg 1, or of different lengths): half of the "
                "ranks repeat the work of the others. Set cfg_degree to 0 to have the layout chosen for each."
            )
        changes = tuple(change.message for change in self.changes)
        cache = run.handle.cache
        message = Predict(
            id=0,
            model=run.handle.ref,
            layout=layout,
            run=run.key,
            conditions=keys,
            adapters=Adapters(files=run.handle.loras, changes=changes),
            residuals=residuals,
            cache=cache if cache and run.is_active(cache, sigma) else None,
        )
        tensors = {f"latent{name}": latent for name, latent in zip(names, latents, strict=True)}
        tensors |= {"timestep": timestep, **residual_tensors}
        if next_timestep is not None and run.handle.spec.takes_next_time:
            tensors["next_timestep"] = next_timestep
        answered = self._first(run, message, tensors) if not run.sent else self._ask(run, message, tensors)
        return [answered[f"prediction{name}"].to(latents[0].device) for name in names]

    def _controls(self, run: _Run, control: Any, latent: Tensor) -> list[tuple[ControlUse, Tensor]]:
        """The ControlNets that the ranks are to evaluate now over a condition's `latent`, and their pictures."""
        return [
            (each.message, run.picture_of(each, latent.shape[-2], latent.shape[-1], len(latent)))
            for asked in active_controls(control)
            for each in asked.controls
            if each.message.strength and run.is_active(each.message, asked.sigma)
        ]

    def _key(
        self,
        run: _Run,
        inputs: Mapping[str, Any],
        rows: slice,
        side: int,
        sigma: float | None,
        controls: Sequence[tuple[ControlUse, Tensor]],
    ) -> str:
        """The key of the condition of these rows; the ranks hear of it when they need it."""
        pictures = [
            picture
            for picture in run.handle.pictures
            if picture.message.weight and run.is_active(picture.message, sigma)
        ]
        tensors = {
            each.name: inputs[each.network][rows]
            for each in run.handle.spec.inputs
            if each.network and inputs.get(each.network) is not None
        }
        references = enumerate(inputs.get("ref_latents") or ())
        tensors |= {f"reference.{number}": reference[rows] for number, reference in references}
        tensors |= image_prompts.embeddings(pictures, side)
        tensors |= {f"control.{number}": picture for number, (_, picture) in enumerate(controls)}
        shown = {
            "image_prompts": tuple(picture.message for picture in pictures),
            "controls": tuple(use for use, _ in controls),
        }
        entry = entry_of_inputs(inputs, rows).model_copy(update=shown)
        for prompt in run.prompts:
            if prompt.equals(entry, tensors):
                return prompt.key
        kept = {name: tensor[:1] if is_repeated(tensor[:1], tensor) else tensor for name, tensor in tensors.items()}
        prompt = _Prompt(uuid.uuid4().hex, entry, kept)
        run.prompts.append(prompt)
        return prompt.key

    def _first(self, run: _Run, message: Predict, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `_ask`. The sidecar of a run of which nothing has begun may be replaced."""

        def ask(client: Client) -> dict[str, Tensor]:
            run.client = client
            run.delivered.clear()
            return self._ask(run, message, tensors)

        return session.with_living(run.client, ask)

    def _ask(self, run: _Run, message: Predict, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sends what the ranks do not hold: what is new in this run, then what they report as missing."""
        if not run.delivered.issuperset(message.adapters.changes):
            weight_delivery.deliver(run.client, self.changes)
            run.delivered.update(message.adapters.changes)
        unknown = set(message.conditions) - run.sent
        while True:
            prompts = [prompt for prompt in run.prompts if prompt.key in unknown]
            run_conditions = {prompt.key: prompt.entry for prompt in prompts}
            bodies = {f"{p.key}.0.{name}": tensor for p in prompts for name, tensor in p.tensors.items()}
            reply = session.ask(
                run.client, message.model_copy(update={"run_conditions": run_conditions}), {**tensors, **bodies}
            )
            run.sent |= unknown
            if reply.tensors:
                return reply.tensors
            missing = reply.result.data["missing"]
            assert isinstance(missing, list)
            unknown |= set(missing)
