"""Conditions of a run whose sampler is the client's own: the ranks keep them between the run's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..protocol.messages import ControlUse, ImagePromptUse, ModelRef

if TYPE_CHECKING:
    from torch import Tensor

    from ..families.condition import Condition


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

    def begin(self, run: str, model: ModelRef) -> None:
        if self._run != (run, model):
            self.clear()
            self._run = (run, model)

    def end(self, run: str) -> None:
        if self._run is not None and self._run[0] == run:
            self.clear()
            self._run = None
