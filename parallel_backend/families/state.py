"""The state that passes through a family's blocks, and the inputs of one evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..tokens.grid import Grid
from ..tokens.plan import Shard
from ..tokens.rotary import Rotary

if TYPE_CHECKING:
    from .condition import Condition, TimedImagePrompt


@dataclass(frozen=True)
class Evaluation:
    """One call of the network: the inputs that all ranks which share it have.

    `tokens`: of each whole latent, by its name, `[B, S, C * pt * ph * pw]` (none where the tokens come from another
    rank's blocks); `grids`: theirs. `timestep` `[B]`, or `[B, T]` where frames have times of their own, is what
    `ModelSampling.timestep` gives; `next_timestep` `[B]`: that of the noise level to which the sampler will step, where
    it is known. `shard`: the tokens of every stream that this rank holds.
    """

    tokens: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    timestep: Tensor
    condition: Condition
    shard: Shard
    next_timestep: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.timestep.shape[0]

    @property
    def grid(self) -> Grid:
        """The grid of the first latent."""
        return next(iter(self.grids.values()))


@dataclass
class State:
    """The tokens that one rank holds between two blocks. A block returns a new state.

    `streams` by their names, `[B, S, width]` each; `modulation`: what the family's blocks make of the time and of
    pooled text, as they take it; `rotary`: the rotary of a site's tokens; `skips`: tokens that a later block takes
    in, by the number of the block that gave them; `prompts`: the image prompts of its blocks.
    """

    streams: dict[str, Tensor]
    modulation: Any = None
    rotary: Rotary | None = None
    skips: Mapping[int, Tensor] = field(default_factory=dict)
    prompts: tuple[TimedImagePrompt, ...] = ()

    def __getitem__(self, stream: str) -> Tensor:
        return self.streams[stream]

    def with_streams(self, **streams: Tensor) -> State:
        """The same state with these streams in the place of those of their names."""
        return replace(self, streams={**self.streams, **streams})
