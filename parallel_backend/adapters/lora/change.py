"""Changes of a model's parameters, before they are cut to what a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import UserError
from .delta import Delta, Magnitude, Parts, make_delta
from .module_names import Place


@dataclass(frozen=True)
class Change:
    """`strength` times `delta` is added to a parameter, whose rows are those of the delta that `place` gives."""

    place: Place
    delta: Delta
    magnitude: Magnitude | None
    strength: float = 1.0

    def times(self, strength: float) -> Change:
        return replace(self, strength=self.strength * strength)


def changes_of(places: Sequence[Place], parts: Parts) -> list[Change]:
    """The changes of the parameters that together are what `parts` describe a change of.

    Raises `UserError` for parts that do not fit together or to the parameters.
    """
    delta, magnitude = make_delta(parts)
    if not places:
        raise UserError("It changes a bias, and this model has none there.", "Choose a LoRA for this kind of model.")
    rows = max(int(place.rows.max()) for place in places) + 1
    if delta.shape[0] != rows:
        raise UserError(
            f"It changes {delta.shape[0]} rows, but this model has {rows} there.",
            "Choose a LoRA that was trained for this model.",
        )
    if magnitude and not magnitude.of_rows and not all(place.is_whole for place in places):
        raise UserError(
            "It is a DoRA that scales the inputs of several projections as one, which are apart in the ranks.",
            "Use a DoRA that scales outputs, as PEFT and newer LyCORIS make them.",
        )
    return [Change(place, delta, magnitude) for place in places]
