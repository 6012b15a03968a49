"""DistriFusion: exact where nothing is old, else equal to a serial model of stale keys and values."""

from unittest import mock

import pytest
import torch
from paralleldit.parallel_backend import sample_request
from paralleldit.parallel_backend.comm import split_sizes
from paralleldit.parallel_backend.layout import Layout
from paralleldit.tests.ranks.stale_flux import StaleModel, relative_error, sampled

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

    with mock.patch.object(sample_request, "SequenceParallel", Model):
        return sampled(world, Layout(), steps, size, sampler)


@pytest.mark.parametrize(("degrees", "plan", "size", "sampler"), EXACT, ids=str)
def test_run_that_warms_up_all_the_time_equals_one_rank(ranks, figures, degrees, plan, size, sampler):
    warmup, steps = plan
    layout = layout_of(degrees, warmup)
    (alone,) = ranks.run(1, sampled, Layout(), steps, size, sampler)
    for answer in ranks.run(layout.ranks, sampled, layout, steps, size, sampler):
        error = relative_error(answer, alone)
        figures.note(f"{layout.ranks} | {layout}", "flux", error)
        assert error <= 1e-5


@pytest.mark.parametrize(("degrees", "plan", "size", "sampler", "refresh"), STALE, ids=str)
def test_run_equals_serial_model_of_late_keys(ranks, degrees, plan, size, sampler, refresh):
    warmup, steps = plan
    layout = layout_of(degrees, warmup, refresh)
    (alone,) = ranks.run(1, sampled, Layout(), steps, size, sampler)
    (expected,) = ranks.run(1, sampled_with_late_model, layout, steps, size, sampler)
    assert relative_error(expected, alone) > 1e-4, "the case must be able to tell old keys from fresh ones"
    for answer in ranks.run(layout.ranks, sampled, layout, steps, size, sampler):
        assert relative_error(answer, expected) <= 1e-5
