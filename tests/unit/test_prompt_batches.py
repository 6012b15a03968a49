"""Prompts that are evaluated as one batch: which, and that the result stays what it is one by one."""

from dataclasses import replace

import pytest
import torch
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.strategies.prompt_batches import (
    Asked,
    JoinedConditions,
    PromptBatches,
    joined_outputs,
    one_by_one,
)
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.tests.tiny_models import TINY_MODELS

LATENT, TIME = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)), torch.full((2,), 0.5)
OUTPUTS = 100
"""Of a layer, for one picture of the stand-in's."""


class StandIn:
    """A strategy whose prediction is the latent times the mean of the prompt's row. Notes the batches that it got."""

    def __init__(self):
        self.batches = []

    def outputs_of(self, latent, condition):
        return OUTPUTS

    def predict(self, latent, timestep, condition, next_timestep=None):
        self.batches.append(len(latent))
        assert len(timestep) == len(latent)
        return latent * condition["tokens"].mean((1, 2)).view(-1, 1, 1, 1)


class Control:
    def __init__(self, kind):
        self.kind = kind

    def join(self, others, batch):
        assert {other.kind for other in others} == {self.kind}
        return self


def prompt(length=5, rows=1, seed=0, **fields):
    tokens = torch.randn(rows, length, 3, generator=torch.Generator().manual_seed(seed))
    return Condition({"tokens": tokens}, **fields)


def asked(*conditions, latent=LATENT):
    return [Asked(latent, TIME, condition) for condition in conditions]


TWO = 2 * len(LATENT)
CASES = {
    "of one kind": ([prompt(), prompt(seed=1)], [TWO]),
    "one text for all pictures, and one for each": ([prompt(), prompt(rows=2)], [TWO]),
    "of other lengths": ([prompt(5), prompt(7)], [2, 2]),
    "some of one kind": ([prompt(5), prompt(7), prompt(5)], [TWO, 2]),
    "another guidance": ([prompt(guidance=3.0), prompt(guidance=4.0)], [2, 2]),
    "another size": ([prompt(size=(8, 8)), prompt(size=(8, 16))], [2, 2]),
    "references of other sizes": ([prompt(references=(LATENT,)), prompt(references=(LATENT[..., :3],))], [2, 2]),
    "references": ([prompt(references=(LATENT,)), prompt(references=(LATENT[:1],))], [TWO]),
    "the same control": ([prompt(controls=(Control("a"),)), prompt(controls=(Control("a"),))], [TWO]),
    "other controls": ([prompt(controls=(Control("a"),)), prompt(controls=(Control("b"),))], [2, 2]),
    "pictures as prompts": ([prompt(image_prompts=("one",)), prompt(image_prompts=("one",))], [2, 2]),
}


@pytest.mark.parametrize(("conditions", "batches"), CASES.values(), ids=CASES)
def test_prompts_of_one_kind_are_one_batch(conditions, batches):
    alone, together = StandIn(), StandIn()
    shares = [asked(*conditions)]
    expected = one_by_one(alone.predict)(shares, 0)
    found = PromptBatches(together, outputs=10**6, batch=2).predict_all(shares, 0)
    assert together.batches == batches
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_areas_of_other_sizes_are_other_batches():
    strategy = StandIn()
    share = [Asked(part, TIME, prompt()) for part in (LATENT, LATENT[..., :4], LATENT[..., 2:])]
    PromptBatches(strategy, outputs=10**6, batch=2).predict_all([share], 0)
    assert strategy.batches == [2, TWO]


@pytest.mark.parametrize(
    ("outputs", "batches"), [(OUTPUTS, [2] * 5), (4 * OUTPUTS, [TWO, TWO, 2]), (10 * OUTPUTS, [10])]
)
def test_a_batch_is_no_larger_than_fills_a_gpu(outputs, batches):
    strategy = StandIn()
    share = asked(*(prompt(seed=seed) for seed in range(5)))
    PromptBatches(strategy, outputs=outputs, batch=2).predict_all([share], 0)
    assert strategy.batches == batches


def test_weights_that_are_gathered_are_worth_larger_batches():
    whole, sharded = (joined_outputs(Layout(weights=weights)) for weights in ("whole", "sharded"))
    assert sharded > whole


def test_ranks_make_equally_many_evaluations():
    shares = [asked(prompt(), prompt(seed=1)), asked(prompt(5), prompt(7))]
    for rank in range(2):
        strategy = StandIn()
        PromptBatches(strategy, outputs=10**6, batch=2).predict_all(shares, rank)
        assert strategy.batches == [2, 2]


def test_a_cancel_is_looked_for_between_evaluations():
    for make in (
        lambda between: PromptBatches(StandIn(), outputs=0, batch=2, between=between).predict_all,
        lambda between: one_by_one(StandIn().predict, between),
    ):
        looks = []
        make(lambda looks=looks: looks.append(1))([asked(prompt(), prompt(seed=1), prompt(seed=2))], 0)
        assert len(looks) == 2


def test_the_condition_of_a_batch_stays_the_same_object():
    joined, one, other = JoinedConditions(), prompt(), prompt(seed=1)
    assert joined.of(one, (other,), 2) is joined.of(one, (other,), 2)
    assert joined.of(one, (other,), 2) is not joined.of(other, (one,), 2)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_a_batch_predicts_what_its_prompts_do_one_by_one(model):
    """Two pictures, of three prompts: one with a text for each picture."""
    tiny, batch, text = TINY_MODELS[model], 2, 5
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    latent = tiny.latent(draw, batch, 8, 6)
    conditions = [replace(tiny.condition(draw, rows, text), size=(64, 48)) for rows in (1, batch, 1)]
    family = tiny.make_family(2, torch.float32, 2)
    alone = Axis("alone", [0], None, Ledger())
    strategy = SequenceParallel(family, alone, AttentionCore(alone, alone, KERNELS["sdpa"]))
    timestep = torch.full((batch,), 0.4)
    shares = [[Asked(latent, timestep, condition) for condition in conditions]]
    with torch.inference_mode():
        expected = one_by_one(strategy.predict)(shares, 0)
        batches = PromptBatches(strategy, outputs=10**9, batch=batch)
        for _ in range(2):
            for found, one in zip(batches.predict_all(shares, 0), expected, strict=True):
                assert (found - one).norm() / one.norm() <= 1e-5
    assert (expected[0] - expected[1]).norm() > 1e-3 * expected[0].norm()


def test_one_prompt_is_not_counted():
    strategy = StandIn()
    strategy.outputs_of = None
    PromptBatches(strategy, outputs=10**6, batch=2).predict_all([asked(prompt()), asked(prompt(7))], 1)
    assert strategy.batches == [2]
