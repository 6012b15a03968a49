"""PipeFusion with the other families: exact where nothing is old, else equal to a serial model of stale attention."""

from itertools import product
from math import prod

import pytest
import torch
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.tests.covering import covering, pairs_of
from paralleldit.tests.ranks.matrix import EXACT as EXACTLY
from paralleldit.tests.ranks.matrix import LATE, cell
from paralleldit.tests.ranks.stale_families import STEPS, StaleModel, relative_error, sampled, sampled_by
from paralleldit.tests.tiny_models import ONE_OF_EACH, TINY_MODELS

MODELS = ["sd3 medium", *(model for model in ONE_OF_EACH if model != "flux dev")]
"""Those of Flux are in test_pipefusion.py."""
EXACT = [
    # pipefusion, ulysses, ring, cfg, data; patches, warm-up
    ((2, 1, 1, 1, 1), (3, STEPS)),
    ((4, 1, 1, 1, 1), (1, 1)),
    ((2, 2, 1, 2, 1), (1, 1)),
    ((2, 1, 2, 1, 2), (3, STEPS)),
]
STALE = [
    ((2, 1, 1, 1, 1), (2, 1)),
    ((3, 1, 1, 1, 1), (5, 2)),
    ((2, 2, 1, 1, 1), (3, 1)),
    ((2, 2, 2, 1, 1), (2, 1)),
    ((2, 1, 2, 2, 1), (3, 1)),
]


def layout_of(degrees, plan) -> Layout:
    names = ("pipefusion", "ulysses", "ring", "cfg", "data")
    settings = {f"{name}_degree": degree for name, degree in zip(names, degrees, strict=True)}
    return Layout(**settings, num_patches=plan[0], warmup_steps=plan[1])


def cells():
    """What the tests of this module note."""
    for table, cases in ((EXACTLY, EXACT), (LATE, STALE)):
        for (degrees, plan), model in product(cases, MODELS):
            yield cell(table, layout_of(degrees, plan), TINY_MODELS[model].spec.name)


def covering_cases(cases):
    cases = [(degrees, plan, model) for (degrees, plan), model in product(cases, MODELS)]
    return covering(cases, lambda case: pairs_of(layout_of(*case[:2]), case[2]), lambda case: prod(case[0]))


class StripModel(StaleModel):
    """Strips of the picture, or of a video some frames, each seeing what was computed of those before it."""

    def stale_parts(self, length, grid, pads):
        patches = self.layout.num_patches
        tokens = torch.arange(grid.count).view(grid.frames, grid.rows, grid.columns)
        strips = tokens.tensor_split(patches, dim=0 if grid.frames >= patches else 1)
        for number, strip in enumerate(strips):
            yield slice(0, 0 if number else length), strip.flatten(), slice(0, 0 if number else pads)

    def end_part(self):
        self.attention.keep()


def sampled_strip_by_strip(world, model, layout):
    return sampled_by(StripModel, world, model, layout)


@pytest.mark.parametrize(("degrees", "plan", "model"), covering_cases(EXACT), ids=str)
def test_run_without_old_keys_equals_one_rank(ranks, figures, model, degrees, plan):
    layout = layout_of(degrees, plan)
    (alone,) = ranks.once(1, sampled, model, Layout())
    for answer in ranks.run(layout.ranks, sampled, model, layout):
        error = relative_error(answer, alone)
        figures.note(EXACTLY, layout, TINY_MODELS[model].spec.name, error)
        assert error <= 1e-5


@pytest.mark.parametrize(("degrees", "plan", "model"), covering_cases(STALE), ids=str)
def test_run_with_old_keys_equals_a_serial_model_of_them(ranks, figures, model, degrees, plan):
    layout = layout_of(degrees, plan)
    (alone,) = ranks.once(1, sampled, model, Layout())
    strips = Layout(pipefusion_degree=2, num_patches=layout.num_patches, warmup_steps=layout.warmup_steps)
    (expected,) = ranks.once(1, sampled_strip_by_strip, model, strips)
    assert relative_error(expected, alone) > 1e-4, "the case must be able to tell old keys from fresh ones"
    for answer in ranks.run(layout.ranks, sampled, model, layout):
        error = relative_error(answer, expected)
        figures.note(LATE, layout, TINY_MODELS[model].spec.name, error)
        assert error <= 1e-5
