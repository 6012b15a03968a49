"""The step cache that a request asks for, over the ranks of its layout."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from ..attention.site import Attention
from ..caches.attention import AttentionCache
from ..caches.first_block import FirstBlockCache
from ..caches.policy import Counts
from ..caches.policy import StepCache as Policies
from ..caches.residuals import Agreement, Limits, ResidualCache
from ..caches.schedule import ScheduleCache
from ..caches.study import Study, WatchedAttention
from ..caches.teacache import PLAIN, TeaCache
from ..distributed.mesh import Mesh
from ..errors import UserError
from ..families.family import Family, TokenFamily, with_tokens
from ..families.state import State
from ..protocol.messages import StepCache
from ..sampling.model_sampling import ModelSampling


def step_cache_of(
    settings: StepCache,
    family: Family,
    mesh: Mesh,
    model_sampling: ModelSampling | None = None,
    blocks: range | None = None,
) -> ResidualCache | AttentionCache:
    """Raises `UserError` for a family without blocks, or for a study of another number of blocks.

    Without `model_sampling` it works at all noise levels. `blocks`: the numbers of those that this rank computes, all
    of them by default.
    """
    tokens = with_tokens(family, "A step cache")
    # The pictures of a batch are skipped together, as on one rank. Shares of weights are gathered by all ranks that
    # compute with them, whichever prompt each of them evaluates.
    voting = (mesh.tensor, mesh.data if mesh.layout.weights == "whole" else mesh.replicas)
    agreement = Agreement(mesh.sequence, [axis for axis in voting if axis.size > 1])
    start, end = math.inf, -math.inf
    if model_sampling is not None:
        start = float(model_sampling.percent_to_sigma(settings.start)) if settings.start > 0.0 else start
        end = float(model_sampling.percent_to_sigma(settings.end)) if settings.end < 1.0 else end
    limits = Limits(settings.max_skips, settings.order, (start, end))
    blocks, threshold = blocks or range(len(tokens.blocks)), settings.threshold
    if settings.rule == "teacache":
        coefficients = settings.coefficients or tokens.spec.teacache.get(len(blocks), PLAIN)
        return TeaCache(
            blocks, partial(_modulated_input, tokens), agreement, limits, threshold=threshold, coefficients=coefficients
        )
    if settings.rule == "schedule":
        level = (model_sampling or tokens.model_sampling(None)).level
        return ScheduleCache(blocks, level, agreement, limits, threshold=threshold, rates=settings.rates)
    if settings.rule == "attention":
        if len(settings.attention) != len(blocks):
            raise UserError(
                f"The study is of a model of {len(settings.attention)} blocks, and this one has {len(blocks)}.",
                "Connect a Parallel Redundancy with this model to Parallel Cache.",
            )
        level = (model_sampling or tokens.model_sampling(None)).level
        return AttentionCache(level, limits, budget=threshold, rates=settings.attention)
    return FirstBlockCache(blocks, tokens.controlled, agreement, limits, threshold=threshold)


def study_of(family: Family, mesh: Mesh) -> Study:
    """Raises `UserError` for a family without blocks."""
    tokens = with_tokens(family, "A study")
    knows_input = type(tokens).modulated_input is not TokenFamily.modulated_input
    signal = partial(_modulated_input, tokens) if knows_input else None
    return Study(len(tokens.blocks), tokens.controlled, signal, mesh.sequence)


def around(attention: Attention, cache: Policies) -> Attention:
    """`attention`, as far as `cache` looks at it or answers in its place."""
    if isinstance(cache, Study):
        return WatchedAttention(attention, cache)
    return cache.around(attention) if isinstance(cache, AttentionCache) else attention


def watching(study: Study, family: Family) -> AbstractContextManager[None]:
    """`study` looks at the feed-forwards of `family`."""
    lists = [with_tokens(family, "A study").transformer.get_submodule(each.names[0]) for each in family.spec.blocks]
    return study.watching(lists)


def _modulated_input(family: TokenFamily, state: State) -> Tensor:
    family.hold_first_block()
    return family.modulated_input(state)


def count(caches: Iterable[Counts]) -> tuple[int, int]:
    """How many evaluations were computed whole, of how many: of the prompts that this rank evaluates."""
    return sum(cache.whole for cache in caches), sum(cache.all for cache in caches)
