"""The step cache that a request asks for, over the ranks of its layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..caches.first_block import Agreement, FirstBlockCache
from ..distributed.mesh import Mesh
from ..families.family import Family, with_tokens
from ..protocol.messages import StepCache
from ..sampling.model_sampling import ModelSampling


def step_cache_of(
    settings: StepCache, family: Family, mesh: Mesh, model_sampling: ModelSampling | None = None
) -> FirstBlockCache:
    """Raises `UserError` for a family without blocks. Without `model_sampling` it works at all noise levels."""
    tokens = with_tokens(family, "A step cache")
    # The pictures of a batch are skipped together, as on one rank. Shares of weights are gathered by all ranks that
    # compute with them, whichever prompt each of them evaluates.
    voting = (mesh.tensor, mesh.data if mesh.layout.weights == "whole" else mesh.replicas)
    agreement = Agreement(mesh.sequence, [axis for axis in voting if axis.size > 1])
    start, end = math.inf, -math.inf
    if model_sampling is not None:
        start = float(model_sampling.percent_to_sigma(settings.start)) if settings.start > 0.0 else start
        end = float(model_sampling.percent_to_sigma(settings.end)) if settings.end < 1.0 else end
    return FirstBlockCache(
        len(tokens.blocks),
        tokens.controlled,
        agreement,
        threshold=settings.threshold,
        max_skips=settings.max_skips,
        order=settings.order,
        levels=(start, end),
    )


def report(caches: Sequence[FirstBlockCache]) -> str:
    """What a run has skipped, for the user; of the prompts that this rank evaluates."""
    whole, count = sum(cache.whole for cache in caches), sum(cache.all for cache in caches)
    return f"Step cache: {whole} of {count} evaluations were computed in full."
