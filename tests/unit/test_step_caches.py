"""Step caches: what a skipped evaluation adds, controls anew, a polynomial of what blocks added; when none is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paralleldit.parallel_backend.caches.attention import AttentionCache
from paralleldit.parallel_backend.caches.first_block import FirstBlockCache
from paralleldit.parallel_backend.caches.residuals import Agreement, Limits, ResidualCache
from paralleldit.parallel_backend.caches.teacache import TeaCache
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.families.blocks import run_blocks
from paralleldit.parallel_backend.families.state import State

BLOCKS, LARGE = 4, 10.0
FAMILY: Any = SimpleNamespace(
    add_residual=lambda state, block, residual: state.with_streams(image=state["image"] + residual)
)


AGREEMENT = Agreement(Axis("sequence", [0], None, Ledger()))


def cache(threshold: float = LARGE, **limits: Any) -> FirstBlockCache:
    return FirstBlockCache(range(BLOCKS), "image", AGREEMENT, Limits(**limits), threshold=threshold)


def teacache(threshold: float, **more: Any) -> TeaCache:
    """It looks at the tokens before the blocks as they are."""
    return TeaCache(range(BLOCKS), lambda state: state["image"], AGREEMENT, Limits(), threshold=threshold, **more)


def evaluated(
    cache: ResidualCache,
    first: Any,
    others: float,
    controls: Any = None,
    name: str = "",
    batch: int = 1,
    start: Any = 0.0,
    time: float = 1.0,
):
    """The tokens behind all blocks, and how many blocks were computed; the tokens before them are `start`.

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

    evaluation: Any = SimpleNamespace(
        condition=SimpleNamespace(name=name), batch=batch, grids={"image": "a grid"}, timestep=torch.tensor([time])
    )
    residuals = {number: torch.full((1, 2, 3), value) for number, value in enumerate(controls or [])}
    state = State({"image": torch.as_tensor(start, dtype=torch.float32).reshape(-1, 1, 1).expand(batch, 2, 3)})
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


def computed(cache: ResidualCache, starts: Any, batch: int = 1) -> list[bool]:
    """Which evaluations are computed whole, where the tokens before the blocks are `starts`."""
    return [evaluated(cache, 1.0, 2.0, start=start, batch=batch)[1] == BLOCKS for start in starts]


@pytest.mark.parametrize(
    ("run", "whole"),
    [
        (teacache(0.0), [True, True, True, True, True]),
        (teacache(0.0, coefficients=(-1.0,)), [True, True, True, True, True]),
        (teacache(0.15), [True, False, True, False, True]),
        (teacache(0.25), [True, False, False, True, False]),
        (teacache(0.25, coefficients=(100.0, 0.0, 0.0)), [True, True, True, True, True]),
        (teacache(0.25, coefficients=(10.0, 0.0, 0.0)), [True, False, False, True, False]),
    ],
    ids=["0", "0, and a negative polynomial", "two", "three", "a steep polynomial", "a square"],
)
def test_teacache_adds_up_the_changes_of_its_input_since_the_last_whole_evaluation(run, whole):
    """Each input is larger by a tenth than the one before."""
    assert computed(run, [1.1**step for step in range(5)]) == whole


def test_teacache_adds_what_all_blocks_added():
    run = teacache(LARGE)
    assert evaluated(run, 1.0, 2.0, [10.0, 20.0, 30.0, 40.0], start=1.0) == (108.0, BLOCKS)
    assert evaluated(run, 99.0, 99.0, [1.0, 2.0, 3.0, 4.0], start=2.0) == (2.0 + 7.0 + 10.0, 0)


def test_each_picture_of_a_batch_counts_its_own_changes():
    starts = [torch.tensor(each) for each in ([1.0, 1.0], [1.1, 1.0], [1.1, 1.12], [1.1, 1.3])]
    assert computed(teacache(0.15), starts, batch=2) == [True, False, False, True]


def test_the_picture_that_changes_most_decides_for_its_batch():
    run = cache(0.5)
    assert evaluated(run, torch.tensor([1.0, 1.0]), 2.0, batch=2)[1] == BLOCKS
    assert evaluated(run, torch.tensor([1.0, 1.4]), 2.0, batch=2)[1] == 1
    assert evaluated(run, torch.tensor([1.0, 1.6]), 2.0, batch=2)[1] == BLOCKS


def test_each_prompt_has_what_its_own_evaluations_left():
    run = cache()
    assert [evaluated(run, 1.0, 2.0, name=name)[1] for name in ("positive 0", "negative 0")] == [BLOCKS, BLOCKS]
    assert evaluated(run, 1.0, 99.0, name="negative 0") == (7.0, 1)


class CountedAttention:
    """Gives each time a number more, and counts what it was sent."""

    keeps = False

    def __init__(self) -> None:
        self.sent = self.given = 0

    def send(self, x: Any, streams: Any, serves: Any = None) -> Any:
        self.sent += 1
        return x

    def __call__(self, site: Any, q: Any, *sets: Any, extra_kv: Any = None) -> Any:
        self.given += 1
        return self.given


def attended(cache: AttentionCache, attention: Any, level: float, between: bool = False) -> list[int]:
    """What the attention of two blocks gives in an evaluation at this level; with what attends `between` them, too."""
    evaluation: Any = SimpleNamespace(
        condition=SimpleNamespace(name=""), batch=1, grids={"image": "a grid"}, timestep=torch.tensor([level])
    )
    policy, around, state = cache.policy(evaluation), cache.around(attention), State({})
    found = []
    for block in range(2):
        policy.before(block, state)
        around.send(torch.zeros(1, 1, 1, 1), ("image",))
        found.append(around((block, "joint"), ANYTHING))
        policy.after(block, state, state)
        if between:
            found.append(around((block, "joint"), ANYTHING))
    return found


ANYTHING: Any = None
SHARED_BLOCK, OTHER = (1.0,), (9.0,)


def shared(**limits: Any) -> AttentionCache:
    return AttentionCache(lambda time: time, Limits(**limits), budget=0.25, rates=[SHARED_BLOCK, OTHER])


def test_attention_of_a_block_is_shared_while_its_change_is_within_the_budget():
    cache, attention = shared(), CountedAttention()
    found = [attended(cache, attention, level) for level in (1.0, 0.9, 0.8, 0.7, 0.6)]
    assert found == [[1, 2], [1, 3], [1, 4], [5, 6], [5, 7]]
    assert attention.sent == attention.given, "what is shared is not sent"
    assert (cache.whole, cache.all) == (2, 5)


def test_what_attends_between_blocks_is_never_shared_nor_kept():
    cache, attention = shared(), CountedAttention()
    assert attended(cache, attention, 1.0, between=True) == [1, 2, 3, 4]
    assert attended(cache, attention, 0.9, between=True) == [1, 5, 6, 7]


@pytest.mark.parametrize(("limits", "first"), [({"max_skips": 1}, [1, 1, 4]), ({"levels": (0.85, 0.0)}, [1, 3, 3])])
def test_attention_is_shared_within_its_limits(limits, first):
    cache, attention, found = shared(**limits), CountedAttention(), []
    for level in (1.0, 0.9, 0.8):
        cache.at(level)
        found.append(attended(cache, attention, level)[0])
    assert found == first
