"""What ranks keep between the predictions of a sampler elsewhere: a step cache ends with its run and its weights."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from paralleldit.parallel_backend.caches.policy import CountedComputeAll
from paralleldit.parallel_backend.engine import run_conditions
from paralleldit.parallel_backend.engine.run_conditions import RunConditions, Runs
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol.messages import Adapters, LoraRef, ModelRef, Predict, StepCache, WeightChange

HIGH, LOW, OTHER = (ModelRef(path=f"/models/{name}.safetensors") for name in ("high", "low", "other"))
FIRST, SECOND = "1" * 32, "2" * 32
ANYTHING: Any = None
EVALUATION: Any = mock.Mock(condition=Condition({}))


@pytest.fixture(autouse=True)
def counted():
    """Caches that count and do nothing else."""
    with mock.patch.object(run_conditions, "step_cache_of", side_effect=lambda *_: CountedComputeAll()):
        yield


def asked(**changes: Any) -> Predict:
    return Predict(
        id=1, model=HIGH, layout=Layout(), run=FIRST, conditions=("3" * 32,), cache=StepCache(threshold=0.2)
    ).model_copy(update=changes)


def cache_of(conditions: RunConditions, **changes: Any) -> Any:
    return conditions.cache_for(asked(**changes), ANYTHING, ANYTHING)


LORA = Adapters(files=(LoraRef(path="/loras/a.safetensors"),))
STRONGER = Adapters(files=(LoraRef(path="/loras/a.safetensors", strength=2.0),))
SENT = Adapters(changes=(WeightChange(key="a.weight", digest="4" * 32, strength=1.0),))


def test_a_run_goes_on_with_its_cache_until_its_weights_or_its_ranks_are_others():
    run = Runs().at(FIRST, HIGH)
    cache = cache_of(run)
    assert cache_of(run) is cache
    different = [{"adapters": each} for each in (LORA, STRONGER, SENT)]
    different += [{"layout": Layout(ulysses_degree=2)}, {"cache": StepCache(threshold=0.3)}]
    others = [cache_of(run, **each) for each in different]
    assert len({id(each) for each in (cache, *others)}) == len(others) + 1
    assert cache_of(run, adapters=LORA) is others[0], "a hook may bring a LoRA again"


def test_a_new_run_has_a_cache_of_its_own():
    runs = Runs()
    cache = cache_of(runs.at(FIRST, HIGH))
    assert cache_of(runs.at(SECOND, HIGH)) is not cache


def test_two_models_of_one_sampler_keep_what_each_has():
    runs = Runs()
    caches = [cache_of(runs.at(run, model)) for run, model in ((FIRST, HIGH), (SECOND, LOW))]
    for _ in range(3):
        assert cache_of(runs.at(FIRST, HIGH)) is caches[0]
        assert cache_of(runs.at(SECOND, LOW)) is caches[1]


def test_of_three_runs_the_one_that_rested_longest_is_forgotten():
    runs = Runs()
    first, second = (cache_of(runs.at(run, HIGH)) for run in (FIRST, SECOND))
    cache_of(runs.at(FIRST, HIGH))
    runs.at("5" * 32, OTHER)
    assert cache_of(runs.at(FIRST, HIGH)) is first
    assert cache_of(runs.at(SECOND, HIGH)) is not second


def test_the_end_of_a_run_tells_its_evaluations_those_without_the_cache_among_them():
    runs = Runs()
    run = runs.at(FIRST, HIGH)
    for cache in (None, StepCache(threshold=0.2), StepCache(threshold=0.2)):
        cache_of(run, cache=cache).policy(EVALUATION)
    assert runs.end(FIRST) == (3, 3)
    assert runs.end(FIRST) is None
    cache_of(runs.at(SECOND, HIGH), cache=None).policy(EVALUATION)
    assert runs.end(SECOND) is None, "it had no step cache"


def test_conditions_of_every_run_under_way_are_known():
    runs = Runs()
    condition: Any = object()
    runs.at(FIRST, HIGH)["6" * 32] = condition
    runs.at(SECOND, LOW)
    assert runs.condition("6" * 32) is condition
    runs.forget()
    assert runs.condition("6" * 32) is None
