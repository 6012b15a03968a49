"""DistriFusion (arXiv 2402.19481) for transformers: other ranks' keys and values are one step old. Approximate.

As sequence parallelism, but what a site gathers it uses only in the next step, so that nothing waits for it. The
warm-up steps gather at once: they are exact. The variant `in_turn` refreshes the keys and values of one rank a step,
and sends 1/N as much.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from ..attention.stale_kv import StaleAttention
from ..attention.usp import AttentionCore
from ..caches.policy import COMPUTE_ALL, StepCache
from ..distributed.mesh import Mesh
from ..families.condition import Condition
from ..families.family import TokenFamily
from ..tokens.grid import Packing
from .sequence import SequenceParallel


class DistriFusion(SequenceParallel):
    """Predicts for whole pictures, during one run."""

    def __init__(
        self,
        family: TokenFamily,
        mesh: Mesh,
        core: AttentionCore,
        packing: Packing | None = None,
        cache: StepCache = COMPUTE_ALL,
        *,
        warmup_steps: int,
        in_turn: bool,
    ) -> None:
        self._stale = StaleAttention(core, mesh.distrifusion, in_turn=in_turn)
        super().__init__(family, mesh.sequence, self._stale, packing, cache)
        self._warmup_steps = warmup_steps
        self._step = 0
        self._evaluations: Counter[int] = Counter()

    def begin_step(self, step: int) -> None:
        self._step = step

    def finish(self) -> None:
        # Every rank has sent what the others wait for here.
        self._stale.finish()

    def forget(self) -> None:
        self._stale.forget()

    def predict(
        self, latent: Tensor, timestep: Tensor, condition: Condition, next_timestep: Tensor | None = None
    ) -> Tensor:
        """Has the contract of `SequenceParallel.predict`."""
        evaluation = self._evaluations[id(condition)]
        self._evaluations[id(condition)] += 1
        synchronous = evaluation == 0 or self._step < self._warmup_steps
        self._stale.begin(id(condition), evaluation, synchronous=synchronous)
        return super().predict(latent, timestep, condition, next_timestep)
