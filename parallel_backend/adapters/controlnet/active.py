"""A control bound to its model for one run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ...attention.site import Attention
from ...families.condition import Condition, rows_of
from ...families.family import TokenFamily
from ...families.state import Evaluation
from ...tokens.grid import Grid
from ...tokens.plan import Segment
from .nets import ControlledEvaluation, ControlNet


@dataclass(frozen=True)
class ActiveControl:
    """A ControlNet that is evaluated in a run. `picture`: its input from the control picture, `[B, C, H, W]`.

    It works while the model's clock is from `start` down to `end`.
    """

    net: ControlNet
    picture: Tensor
    strength: float
    mode: int | None
    start: float
    end: float

    def part(self, part: slice, batch: int) -> ActiveControl:
        """Selects the pictures `part` of a batch; one control picture for all of them stays one."""
        return replace(self, picture=self.picture[part] if len(self.picture) == batch else self.picture[:1])

    @property
    def kind(self) -> Hashable:
        return self.net, self.strength, self.mode, self.start, self.end, self.picture.shape[1:]

    def join(self, others: Sequence[ActiveControl], batch: int) -> ActiveControl:
        return replace(self, picture=rows_of([each.picture for each in (self, *others)], batch))

    def is_active(self, timestep: float) -> bool:
        return self.strength != 0.0 and self.end <= timestep <= self.start

    def targets(self, family: TokenFamily) -> dict[int, int]:
        return self.net.targets(family)

    def segments(
        self, family: TokenFamily, condition: Condition, grids: Mapping[str, Grid]
    ) -> dict[str, list[Segment]]:
        return self.net.segments(condition, grids)

    def residuals(self, evaluation: Evaluation, attention: Attention) -> list[Tensor]:
        """Returns `ControlNet.residuals` times the strength."""
        view = self.net.view
        view.sites.attention = attention
        name = view.latent.name
        picture = view.tokenise({name: self.picture})[name].expand(evaluation.batch, -1, -1)
        state = self.net.embed(ControlledEvaluation(evaluation, picture, self.mode))
        return [self.strength * residual for residual in self.net.residuals(state)]
