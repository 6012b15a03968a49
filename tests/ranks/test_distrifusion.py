"""DistriFusion: exact where nothing is old, else equal to a serial model of stale keys and values."""

from itertools import accumulate
from unittest import mock

import pytest
import torch
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.split import split_sizes
from paralleldit.parallel_backend.strategies import select
from paralleldit.tests.covering import covering, pairs_of
from paralleldit.tests.ranks import stale_families
from paralleldit.tests.ranks.matrix import EXACT as EXACTLY
from paralleldit.tests.ranks.matrix import LATE, cell
from paralleldit.tests.ranks.stale_flux import StaleModel, relative_error, sampled
from paralleldit.tests.tiny_models import ONE_OF_EACH, TINY_MODELS

EXACT = [
    # degrees; warm-up, steps; latent height and width; sampler
    ({"distrifusion": 2}, (3, 3), (8, 8), "euler"),
    ({"distrifusion": 3}, (4, 3), (11, 9), "dpmpp_2m"),
    ({"distrifusion": 2, "ulysses": 2}, (3, 3), (11, 9), "heun"),
    ({"distrifusion": 2, "ring": 2, "cfg": 2}, (3, 3), (11, 9), "euler_ancestral"),
]
STALE = [
    ({"distrifusion": 2}, (1, 4), (8, 8), "euler", "all"),
    ({"distrifusion": 4}, (2, 4), (11, 9), "heun", "all"),
    ({"distrifusion": 2, "ulysses": 2}, (1, 4), (11, 9), "euler", "all"),
    ({"distrifusion": 2, "ring": 2}, (1, 4), (11, 9), "dpmpp_2m", "all"),
    ({"distrifusion": 2, "cfg": 2, "data": 2}, (1, 4), (8, 8), "euler_ancestral", "all"),
    ({"distrifusion": 3}, (1, 5), (11, 9), "euler", "in_turn"),
    ({"distrifusion": 2, "ulysses": 2}, (2, 5), (11, 9), "dpmpp_2m", "in_turn"),
]


def layout_of(degrees, warmup, refresh="all") -> Layout:
    return Layout(
        **{f"{axis}_degree": degree for axis, degree in degrees.items()}, warmup_steps=warmup, refresh=refresh
    )


class LateModel(StaleModel):
    """The shares of `ranks` ranks one after the other. None sees what another computed in the same evaluation."""

    ranks, inner, refresh = 1, 1, "all"

    def turns(self, evaluation, length, rows, columns):
        if evaluation < max(1, self.warmup_evaluations):
            yield torch.arange(length), torch.arange(rows * columns)
            return
        # Tokens are cut for all ranks that share the picture, of which `inner` neighbours see each other's at once.
        text = torch.arange(length).split(split_sizes(length, self.ranks * self.inner)[::-1])
        image = torch.arange(rows * columns).split(split_sizes(rows * columns, self.ranks * self.inner))
        for rank in range(self.ranks):
            group = slice(rank * self.inner, (rank + 1) * self.inner)
            yield torch.cat(text[group]), torch.cat(image[group])

    def keep(self, evaluation, turn, writes):
        is_sent = evaluation < max(1, self.warmup_evaluations) or self.refresh == "all"
        if is_sent or turn == evaluation % self.ranks:
            self.late = [*getattr(self, "late", []), *writes]

    def end_evaluation(self):
        super().keep(0, 0, self.late)
        self.late = []


def sampled_with_late_model(world, layout, steps, size, sampler):
    class Model(LateModel):
        ranks, inner = layout.distrifusion_degree, layout.ulysses_degree * layout.ring_degree
        refresh = layout.refresh
        warmup_evaluations = layout.warmup_steps * (2 if sampler == "heun" else 1)

    with mock.patch.object(select, "SequenceParallel", Model):
        return sampled(world, Layout(), steps, size, sampler)


@pytest.mark.parametrize(("degrees", "plan", "size", "sampler"), EXACT, ids=str)
def test_run_that_warms_up_all_the_time_equals_one_rank(ranks, figures, degrees, plan, size, sampler):
    warmup, steps = plan
    layout = layout_of(degrees, warmup)
    (alone,) = ranks.once(1, sampled, Layout(), steps, size, sampler)
    for answer in ranks.run(layout.ranks, sampled, layout, steps, size, sampler):
        error = relative_error(answer, alone)
        figures.note(EXACTLY, layout, "flux", error)
        assert error <= 1e-5


@pytest.mark.parametrize(("degrees", "plan", "size", "sampler", "refresh"), STALE, ids=str)
def test_run_equals_serial_model_of_late_keys(ranks, figures, degrees, plan, size, sampler, refresh):
    warmup, steps = plan
    layout = layout_of(degrees, warmup, refresh)
    (alone,) = ranks.once(1, sampled, Layout(), steps, size, sampler)
    (expected,) = ranks.run(1, sampled_with_late_model, layout, steps, size, sampler)
    assert relative_error(expected, alone) > 1e-4, "the case must be able to tell old keys from fresh ones"
    for answer in ranks.run(layout.ranks, sampled, layout, steps, size, sampler):
        error = relative_error(answer, expected)
        figures.note(LATE, layout, "flux", error)
        assert error <= 1e-5


FAMILIES = [*ONE_OF_EACH]
WARM = stale_families.STEPS
FAMILY_CASES = [
    *((Layout(distrifusion_degree=2, warmup_steps=WARM), model) for model in FAMILIES[1:]),
    *((Layout(distrifusion_degree=2), model) for model in FAMILIES[1:]),
    *((Layout(distrifusion_degree=2, ulysses_degree=2, cfg_degree=2), model) for model in FAMILIES[1:]),
    (Layout(distrifusion_degree=3, ring_degree=2, refresh="in_turn"), "sd3.5 medium"),
    (Layout(distrifusion_degree=3, refresh="in_turn"), "hunyuandit 1.1"),
]
PARTS_CASES = [
    *((Layout(distrifusion_degree=2, tensor_degree=2), model) for model in ("flux dev", "hunyuandit 1.1", "wan 2.1")),
    (Layout(distrifusion_degree=2, tensor_degree=3, refresh="in_turn"), "flux dev"),
    *((Layout(distrifusion_degree=2, weights="sharded"), model) for model in ("sd3.5 medium", "pixart alpha")),
    (Layout(distrifusion_degree=2, tensor_degree=2, ulysses_degree=2, weights="offloaded"), "flux dev"),
    (Layout(distrifusion_degree=2, tensor_degree=2, warmup_steps=WARM), "hunyuandit 1.1"),
]


def cells():
    """What the tests of this module note."""
    for degrees, *_ in EXACT:
        yield cell(EXACTLY, layout_of(degrees, 1), "flux")
    for degrees, _, _, _, refresh in STALE:
        yield cell(LATE, layout_of(degrees, 1, refresh), "flux")
    for layout, model in (*FAMILY_CASES, *PARTS_CASES):
        yield cell(LATE if layout.warmup_steps < WARM else EXACTLY, layout, TINY_MODELS[model].spec.name)


class LateFamily(stale_families.StaleModel):
    """As `LateModel`, of any family."""

    def stale_parts(self, length, grid, pads):
        ranks, inner = self.layout.distrifusion_degree, self.layout.ulysses_degree * self.layout.ring_degree
        image = torch.arange(grid.count).split(split_sizes(grid.count, ranks * inner))
        edges = {count: [0, *accumulate(split_sizes(count, ranks * inner)[::-1])] for count in (length, pads)}
        sent = []
        for rank in range(ranks):
            own = slice(rank * inner, (rank + 1) * inner)
            text, padding = (slice(edges[count][own.start], edges[count][own.stop]) for count in (length, pads))
            yield text, torch.cat(image[own]), padding
            fresh, self.attention.fresh = self.attention.fresh, []
            if self.layout.refresh == "all" or rank == self.evaluations[self.attention.prompt] % ranks:
                sent += fresh
        self.attention.fresh = sent


def sampled_by_late_family(world, model, layout):
    return stale_families.sampled_by(LateFamily, world, model, layout)


@pytest.mark.parametrize(
    ("layout", "model"),
    covering(
        [*FAMILY_CASES, *PARTS_CASES],
        lambda case: pairs_of(*case, case[0].warmup_steps < WARM),
        lambda case: case[0].ranks,
    ),
    ids=str,
)
def test_run_of_any_family_equals_serial_model_of_late_keys(ranks, figures, tmp_path, layout, model):
    (alone,) = ranks.once(1, stale_families.sampled, model, Layout())
    expected = alone
    if layout.warmup_steps < WARM:
        whole = {"tensor_degree": 1, "cfg_degree": 1, "weights": "whole"}
        (expected,) = ranks.once(1, sampled_by_late_family, model, layout.model_copy(update=whole))
        assert relative_error(expected, alone) > 1e-4, "the case must be able to tell old keys from fresh ones"
    if (layout, model) in PARTS_CASES:
        TINY_MODELS[model].make(stale_families.HEADS).save_pretrained(tmp_path)
    path = tmp_path if (layout, model) in PARTS_CASES else None
    for answer in ranks.run(layout.ranks, stale_families.sampled, model, layout, path):
        error = relative_error(answer, expected)
        figures.note(LATE if layout.warmup_steps < WARM else EXACTLY, layout, TINY_MODELS[model].spec.name, error)
        assert error <= 1e-5
