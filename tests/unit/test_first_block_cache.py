"""What a skipped evaluation adds: controls anew, a polynomial of what blocks added, and when it is not skipped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paralleldit.parallel_backend.caches.first_block import Agreement, FirstBlockCache
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.families.blocks import run_blocks
from paralleldit.parallel_backend.families.state import State

BLOCKS, LARGE = 4, 10.0
FAMILY: Any = SimpleNamespace(
    add_residual=lambda state, block, residual: state.with_streams(image=state["image"] + residual)
)


def cache(threshold: float = LARGE, **more: Any) -> FirstBlockCache:
    agreement = Agreement(Axis("sequence", [0], None, Ledger()))
    return FirstBlockCache(BLOCKS, "image", agreement, threshold=threshold, **more)


def evaluated(cache: FirstBlockCache, first: float, others: float, controls: Any = None, name: str = "", batch=1):
    """The tokens behind all blocks, and how many blocks were computed; the tokens before them are zero.

    The first block adds `first` (a number, or one for each picture), each of the others `others`; behind each of them
    a control adds its number of `controls`.
    """
    computed: list[int] = []

    def block(number: int):
        def add(state: State) -> State:
            computed.append(number)
            more = torch.as_tensor(first if number == 0 else others, dtype=torch.float32).reshape(-1, 1, 1)
            return state.with_streams(image=state["image"] + more)

        return add

    evaluation: Any = SimpleNamespace(condition=SimpleNamespace(name=name), batch=batch, grids={"image": "a grid"})
    residuals = {number: torch.full((1, 2, 3), value) for number, value in enumerate(controls or [])}
    state = State({"image": torch.zeros(batch, 2, 3)})
    policy = cache.policy(evaluation)
    behind = run_blocks(FAMILY, state, [block(n) for n in range(BLOCKS)], policy=policy, residuals=residuals)
    return float(behind["image"][0, 0, 0]), len(computed)


def test_controls_are_added_anew_and_never_twice():
    run = cache()
    assert evaluated(run, 1.0, 2.0, [10.0, 20.0, 30.0, 40.0]) == (107.0, BLOCKS)
    assert evaluated(run, 1.5, 99.0, [1.0, 2.0, 3.0, 4.0]) == (1.5 + 3 * 2.0 + 10.0, 1)


@pytest.mark.parametrize(("order", "expected"), [(0, 4.0), (1, 7.0), (2, 9.0)])
def test_what_blocks_add_is_extrapolated_from_as_many_whole_evaluations_as_the_order_takes(order, expected):
    """The other blocks add 0, 1, 4 in whole evaluations: order 0 repeats 4, order 1 goes on to 7, order 2 to 9."""
    run = cache(order=order)
    for square in (0.0, 1.0, 4.0):
        run.threshold = 0.0
        evaluated(run, 1.0, square / (BLOCKS - 1))
    run.threshold = LARGE
    added = evaluated(run, 1.0, 99.0)[0] - 1.0
    assert added == pytest.approx(expected)


@pytest.mark.parametrize(
    ("run", "whole"),
    [
        (cache(0.0), [True, True, True, True]),
        (cache(), [True, False, False, False]),
        (cache(max_skips=1), [True, False, True, False]),
        (cache(levels=(0.8, 0.3)), [True, True, False, True]),
    ],
    ids=["a threshold of 0", "any change", "one skip in a row", "a part of the run"],
)
def test_evaluations_that_are_computed_whole(run, whole):
    found = []
    for sigma in (0.9, 0.7, 0.4, 0.2):
        run.at(sigma)
        found.append(evaluated(run, 1.0, 2.0)[1] == BLOCKS)
    assert found == whole
    assert (run.whole, run.all) == (sum(whole), 4)


def test_the_picture_that_changes_most_decides_for_its_batch():
    run = cache(0.5)
    assert evaluated(run, torch.tensor([1.0, 1.0]), 2.0, batch=2)[1] == BLOCKS
    assert evaluated(run, torch.tensor([1.0, 1.4]), 2.0, batch=2)[1] == 1
    assert evaluated(run, torch.tensor([1.0, 1.6]), 2.0, batch=2)[1] == BLOCKS


def test_each_prompt_has_what_its_own_evaluations_left():
    run = cache()
    assert [evaluated(run, 1.0, 2.0, name=name)[1] for name in ("positive 0", "negative 0")] == [BLOCKS, BLOCKS]
    assert evaluated(run, 1.0, 99.0, name="negative 0") == (7.0, 1)
