"""A block that is skipped in some evaluations shifts nothing of what the others keep."""

from collections import Counter
from unittest import mock

import pytest
from paralleldit.parallel_backend.engine import sample
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.tests.ranks.stale_families import HEADS, relative_error, sampled, sampled_by
from paralleldit.tests.ranks.test_distrifusion import LateFamily
from paralleldit.tests.ranks.test_pipefusion_families import StripModel
from paralleldit.tests.tiny_models import TINY_MODELS

SKIPPED = 1
"""The block that is computed while the run warms up, and never again."""


class SkipsLater:
    """A policy that takes the tokens before a block for those behind it, once both prompts have been through it."""

    def __init__(self):
        self.calls = Counter()

    def at(self, sigma):
        pass

    def policy(self, evaluation):
        return self

    def before(self, block, state):
        self.calls[block] += 1
        return state if block == SKIPPED and self.calls[block] > 2 else None

    def after(self, block, before, after):
        assert before is not after


def skipping(world, model, layout, path=None):
    with mock.patch.object(sample, "COMPUTE_ALL", SkipsLater()):
        return sampled(world, model, layout, path)


def skipping_serially(world, model, layout):
    stale_model = StripModel if layout.pipefusion_degree > 1 else LateFamily
    with mock.patch.object(sample, "COMPUTE_ALL", SkipsLater()):
        return sampled_by(stale_model, world, model, layout)


@pytest.mark.parametrize("model", ["flux dev", "sd3.5 medium"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(distrifusion_degree=2),
        Layout(pipefusion_degree=2, num_patches=2),
        Layout(pipefusion_degree=2, ulysses_degree=2, num_patches=2),
    ],
    ids=str,
)
def test_a_block_that_is_skipped_shifts_no_buffer(ranks, model, layout):
    serial = layout.model_copy(update={"ulysses_degree": 1})
    (computed,) = ranks.once(1, sampled, model, Layout())
    (expected,) = ranks.once(1, skipping_serially, model, serial)
    assert relative_error(expected, computed) > 1e-3, "the block must matter"
    for answer in ranks.run(layout.ranks, skipping, model, layout):
        assert relative_error(answer, expected) <= 1e-5


def test_sharded_weights_of_a_skipped_block_stay_where_they_are(ranks, tmp_path):
    TINY_MODELS["sd3.5 medium"].make_family(HEADS).transformer.save_pretrained(tmp_path)
    layout = Layout(ulysses_degree=2, weights="sharded")
    (expected,) = ranks.once(1, skipping, "sd3.5 medium", Layout())
    for answer in ranks.run(layout.ranks, skipping, "sd3.5 medium", layout, tmp_path):
        assert relative_error(answer, expected) <= 1e-5
