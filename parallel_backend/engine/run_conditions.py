"""Conditions of runs whose sampler is the client's own: the ranks keep them between a run's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..caches.attention import AttentionCache
from ..caches.policy import CountedComputeAll, StepCache
from ..caches.residuals import ResidualCache
from ..protocol.messages import ControlUse, ImagePromptUse, ModelRef, Predict
from ..strategies.prompt_batches import JoinedConditions
from .step_caches import count, step_cache_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..distributed.mesh import Mesh
    from ..families.condition import Condition
    from ..families.family import Family

RUNS_AT_ONCE = 2
"""A guider may ask one model for the positive prompt, and another one for the negative."""


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
    """The conditions of one run, by their keys, and its step caches."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = JoinedConditions()
        self._caches: dict[tuple[object, ...], ResidualCache | AttentionCache] = {}
        """By what they are for. Other weights, and another mesh, have a cache of their own."""
        self._uncached = CountedComputeAll()

    def cache_for(self, request: Predict, family: Family, mesh: Mesh) -> StepCache:
        """The step cache of this evaluation; one that computes all blocks where the request names none.

        Raises `UserError` for a family without blocks.
        """
        if request.cache is None:
            return self._uncached
        use = request.cache, request.adapters, request.layout
        if use not in self._caches:
            self._caches[use] = step_cache_of(request.cache, family, mesh)
        return self._caches[use]

    def evaluations(self) -> tuple[int, int] | None:
        """How many were computed in full, of how many; None where the run had no step cache."""
        return count([*self._caches.values(), self._uncached]) if self._caches else None


class Runs:
    """The runs that are under way: of other ones, and of other models, nothing is kept."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, ModelRef], RunConditions] = {}

    def at(self, run: str, model: ModelRef) -> RunConditions:
        """Those of this run, which goes on or begins. Of too many, the run that has rested longest is forgotten."""
        found = self._runs.pop((run, model), None)
        self._runs[run, model] = conditions = RunConditions() if found is None else found
        while len(self._runs) > RUNS_AT_ONCE:
            del self._runs[next(iter(self._runs))]
        return conditions

    def condition(self, key: str) -> RunCondition | None:
        """The condition of any of the runs."""
        return next((run[key] for run in self._runs.values() if key in run), None)

    def end(self, run: str) -> tuple[int, int] | None:
        """Forgets the run. Returns its `evaluations`; None for one that is not known."""
        known = [each for each in self._runs if each[0] == run]
        return next(iter([self._runs.pop(each).evaluations() for each in known]), None)

    def forget(self) -> None:
        """Forgets all runs."""
        self._runs.clear()
