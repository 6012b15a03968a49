"""Residuals that ControlNets of the client have made for one step, added where ComfyUI adds them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ...attention.site import Attention
from ...errors import UserError
from ...families.condition import Condition, rows_of
from ...families.family import TokenFamily
from ...families.state import Evaluation
from ...protocol.messages import ResidualList
from ...tokens.grid import Grid
from ...tokens.plan import Segment

Numbers = Mapping[ResidualList, Sequence[int | None]]
"""The number of the residual, if any, at each place of ComfyUI's lists "input" and "output"."""


@dataclass(frozen=True)
class GivenResiduals:
    """`residuals` of all image tokens, `[B, S, h]` each, of the family's dtype and on its device.

    `blocks`: from each block behind which one is added to its number.
    """

    given: tuple[Tensor, ...]
    blocks: Mapping[int, int]

    def rows(self, rows: slice) -> GivenResiduals:
        """Selects these rows of a latent of several conditions; a residual that all share stays one."""
        return replace(self, given=tuple(each if len(each) == 1 else each[rows] for each in self.given))

    def part(self, part: slice, batch: int) -> GivenResiduals:
        return self.rows(part)

    @property
    def kind(self) -> Hashable:
        return tuple(self.blocks.items())

    def join(self, others: Sequence[GivenResiduals], batch: int) -> GivenResiduals:
        given = zip(*(each.given for each in (self, *others)), strict=True)
        return replace(self, given=tuple(rows_of(same, batch) for same in given))

    def is_active(self, timestep: float) -> bool:
        return True

    def targets(self, family: TokenFamily) -> dict[int, int]:
        return dict(self.blocks)

    def segments(
        self, family: TokenFamily, condition: Condition, grids: Mapping[str, Grid]
    ) -> dict[str, list[Segment]]:
        return family.segments(replace(condition, references=()), grids)

    def residuals(self, evaluation: Evaluation, attention: Attention) -> list[Tensor]:
        return [each[:, evaluation.shard["image"]] for each in self.given]


def given_residuals(
    numbers: Numbers, tensors: Mapping[str, Tensor], family: TokenFamily, shape: Sequence[int]
) -> GivenResiduals:
    """The residuals of a request, for a latent of `shape` `[N, C, H, W]`. Raises `UserError` if they do not fit the
    model."""
    spec, blocks = family.spec, {}
    places = spec.residuals(family.transformer.config) if spec.residuals else {}
    for name, own in numbers.items():
        known = places.get(name, ())
        filled = [(place, number) for place, number in enumerate(own) if number is not None]
        if (spec.all_residuals and len(own) != len(known)) or any(place >= len(known) for place, _ in filled):
            raise UserError(
                f"The ControlNet adds {len(own)} residuals ({name}); this {family.name} model takes {len(known)}.",
                "Use a ControlNet that was made for the model.",
            )
        blocks |= {known[place]: number for place, number in filled}
    rows, wanted = shape[0], (Grid.of(shape[2:], family.latent.patch).count, family.hidden_size)
    given = []
    for number in range(max(blocks.values(), default=-1) + 1):
        tensor = tensors.get(f"residual.{number}")
        if tensor is None or tensor.ndim != 3 or tensor.shape[0] not in (1, rows) or tuple(tensor.shape[1:]) != wanted:
            found = "is missing" if tensor is None else f"has the shape {list(tensor.shape)}"
            raise UserError(
                f"A residual of the ControlNet {found}; the model's image tokens are {[rows, *wanted]}.",
                "Use a ControlNet that was made for the model.",
            )
        given.append(tensor.to(family.device, family.dtype))
    return GivenResiduals(tuple(given), blocks)
