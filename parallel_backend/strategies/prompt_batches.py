"""Prompts that are evaluated together, as rows of one batch. Exact: no row of a batch sees another.

A batch of two needs half the kernels, collectives and gathers of weights that two evaluations need. It is worth it as
long as one prompt does not fill a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..families.condition import Condition
from ..layout.layout import Layout

Predict = Callable[[Tensor, Tensor, Condition, Tensor | None], Tensor]
"""`predict(latent [B, C, ...], timestep [B], condition, next timestep [B])`: a transformer's output, however many ranks
compute it."""

_FILLED = 4 * 132 * 128 * 128
"""How many outputs of a layer fill a GPU: four rounds of tiles of 128 x 128 on the 132 multiprocessors of an H100."""
_GATHERED = 4 * _FILLED
"""The same where weights are put together for each evaluation: a batch saves what comes over a link."""


def joined_outputs(layout: Layout) -> int:
    """How many outputs a layer may have before no more prompts are joined."""
    return _FILLED if layout.weights == "whole" else _GATHERED


@dataclass(frozen=True)
class Asked:
    """A prediction to make: the inputs of `Predict`."""

    latent: Tensor
    timestep: Tensor
    condition: Condition
    next_timestep: Tensor | None = None

    @property
    def kind(self) -> Hashable:
        """What those have in common that fit into one batch."""
        return self.latent.shape[1:], self.condition.kind


PredictAll = Callable[[Sequence[Sequence[Asked]], int], list[Tensor]]
"""`predict_all(shares, rank)`: the predictions that the share of `rank` asks for, in its order. All ranks know all
shares, and each asks for equally many."""


def one_by_one(predict: Predict, between: Callable[[], None] = lambda: None) -> PredictAll:
    """Makes each prediction by itself. `between` is called between two of them."""

    def predict_all(shares: Sequence[Sequence[Asked]], rank: int) -> list[Tensor]:
        outputs: list[Tensor] = []
        for each in shares[rank]:
            if outputs:
                between()
            outputs.append(predict(each.latent, each.timestep, each.condition, each.next_timestep))
        return outputs

    return predict_all


class JoinedConditions:
    """The conditions of batches of prompts: each the same object as long as its prompts are, by which families keep
    what they have made of it."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Condition, dict[tuple[Condition, ...], Condition]] = WeakKeyDictionary()

    def of(self, first: Condition, others: tuple[Condition, ...], batch: int) -> Condition:
        """`first.join(others, batch)`."""
        known = self._known.setdefault(first, {})
        if others not in known:
            known[others] = first.join(others, batch)
        return known[others]


class Strategy(Protocol):
    """A strategy, as far as batches need it."""

    def predict(
        self, latent: Tensor, timestep: Tensor, condition: Condition, next_timestep: Tensor | None = None
    ) -> Tensor: ...

    def outputs_of(self, latent: Tensor, condition: Condition) -> int:
        """How many outputs a layer has on each rank, for one picture of `latent`."""
        ...


class PromptBatches:
    """Predicts for several prompts, those that fit together as one batch.

    `outputs`: so many a layer may have before no more prompts are joined (`joined_outputs`). `batch`: how many
    pictures a prompt is evaluated for, the most of any rank: all ranks join alike. `joined`: of the run. `between` is
    called between two evaluations.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        outputs: int,
        batch: int,
        joined: JoinedConditions | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._strategy, self._outputs, self._batch, self._between = strategy, outputs, batch, between
        self._joined = joined or JoinedConditions()

    def predict_all(self, shares: Sequence[Sequence[Asked]], rank: int) -> list[Tensor]:
        """Has the contract of `PredictAll`. Every rank makes equally many evaluations: they may gather weights."""
        own, outputs = shares[rank], dict[int, Tensor]()
        for places in self._groups(shares)[rank]:
            if outputs:
                self._between()
            asked = [own[place] for place in places]
            parts = self._predict(asked).split([len(each.latent) for each in asked])
            outputs |= zip(places, parts, strict=True)
        return [outputs[place] for place in range(len(own))]

    def _groups(self, shares: Sequence[Sequence[Asked]]) -> list[list[list[int]]]:
        """Of each share the places of those that are evaluated together: one by one where others cannot keep step."""
        if len(shares[0]) > 1:
            groups = [self._groups_of(share) for share in shares]
            if len(set(map(len, groups))) == 1:
                return groups
        return [[[place] for place in range(len(share))] for share in shares]

    def _groups_of(self, share: Sequence[Asked]) -> list[list[int]]:
        by_kind: dict[Hashable, list[int]] = {}
        for place, asked in enumerate(share):
            by_kind.setdefault(asked.kind, []).append(place)
        groups = []
        for places in by_kind.values():
            first = share[places[0]]
            most = max(1, self._outputs // (self._batch * self._strategy.outputs_of(first.latent, first.condition)))
            groups += [places[start : start + most] for start in range(0, len(places), most)]
        return groups

    def _predict(self, asked: Sequence[Asked]) -> Tensor:
        first, *others = asked
        if not others:
            return self._strategy.predict(first.latent, first.timestep, first.condition, first.next_timestep)
        following = [each.next_timestep for each in asked if each.next_timestep is not None]
        return self._strategy.predict(
            torch.cat([each.latent for each in asked]),
            torch.cat([each.timestep for each in asked]),
            self._joined.of(first.condition, tuple(each.condition for each in others), len(first.latent)),
            torch.cat(following) if following else None,
        )
