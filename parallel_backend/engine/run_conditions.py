"""Conditions of a run whose sampler is the client's own: the ranks keep them between the run's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..caches.first_block import FirstBlockCache
from ..caches.policy import COMPUTE_ALL, StepCache
from ..protocol.messages import ControlUse, ImagePromptUse, ModelRef, Predict
from .step_caches import report, step_cache_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..distributed.mesh import Mesh
    from ..families.condition import Condition
    from ..families.family import Family


@dataclass(frozen=True)
class RunCondition:
    """A condition without its picture prompts and controls; these, and their pictures: what evaluates them may have to
    be loaded again."""

    condition: Condition
    prompts: Sequence[ImagePromptUse]
    pictures: Sequence[Tensor]
    controls: Sequence[ControlUse]
    control_pictures: Sequence[Tensor | None]


class RunConditions(dict[str, RunCondition]):
    """The conditions of one run, by their keys. Those of another run, or for another model, are forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self._run: tuple[str, ModelRef] | None = None
        self._caches: dict[tuple[object, ...], FirstBlockCache] = {}
        """By what they are for. Other weights, and another mesh, have a cache of their own."""

    def begin(self, run: str, model: ModelRef) -> None:
        if self._run != (run, model):
            self.clear()
            self._caches.clear()
            self._run = (run, model)

    def cache_for(self, request: Predict, family: Family, mesh: Mesh) -> StepCache:
        """The step cache of this evaluation; one that computes all blocks where the request names none.

        Raises `UserError` for a family without blocks.
        """
        if request.cache is None:
            return COMPUTE_ALL
        use = request.cache, request.adapters, request.layout
        if use not in self._caches:
            self._caches[use] = step_cache_of(request.cache, family, mesh)
        return self._caches[use]

    def end(self, run: str) -> str:
        """Forgets the run, if it is this one. Returns what its step caches have to report."""
        if self._run is None or self._run[0] != run:
            return ""
        text = report(list(self._caches.values())) if self._caches else ""
        self.clear()
        self._caches.clear()
        self._run = None
        return text
