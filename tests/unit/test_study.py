"""What a study measures, what follows from it, and a cache by its schedule."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paralleldit.nodes.study.findings import PARTS, Findings, Measured, check_blocks, load, path_beside
from paralleldit.nodes.study.heatmaps import heat_maps, to_image
from paralleldit.parallel_backend.caches.residuals import Limits
from paralleldit.parallel_backend.caches.schedule import ScheduleCache, integral
from paralleldit.parallel_backend.caches.study import QUANTITIES, Study
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.blocks import run_blocks
from paralleldit.parallel_backend.families.state import State
from paralleldit.parallel_backend.sampling.model_sampling import DiscreteFlow, EpsPrediction, FluxFlow
from paralleldit.tests.unit.test_step_caches import AGREEMENT, BLOCKS, FAMILY, evaluated


def measured(levels: list[float], change: Any, name: str = "a run") -> Measured:
    """A run whose residual changes by `change(higher level, lower level)` from one evaluation to the next; its input by
    a tenth of that."""
    pairs = list(pairwise(levels))
    whole = torch.zeros(len(pairs), 3, 2)
    whole[:, 1, 0] = torch.tensor([change(*pair) for pair in pairs])
    whole[:, 0, 0] = whole[:, 1, 0] / 10
    return Measured(name, torch.tensor(levels), torch.rand(len(pairs), BLOCKS, len(QUANTITIES), 2), whole)


def steps(count: int) -> list[float]:
    return [1 - step / count for step in range(count)]


def test_the_rates_do_not_depend_on_the_number_of_steps():
    change = lambda high, low: high**2 - low**2  # noqa: E731
    few, many = (measured(steps(count), change).rates().tolist() for count in (PARTS, 10 * PARTS))
    expected = [(2 * part + 1) / PARTS for part in range(PARTS)]
    assert many[1:] == pytest.approx(expected[1:], rel=1e-3)
    assert few[1:] == pytest.approx(expected[1:], rel=1e-3)


def test_where_a_run_has_no_evaluations_the_nearest_rate_counts():
    rates = measured([0.9, 0.8, 0.7], lambda high, low: high - low).rates().tolist()
    assert rates == pytest.approx([1.0] * PARTS, rel=1e-3)


def test_findings_tell_the_polynomial_and_how_far_runs_differ():
    same = [measured(steps(count), lambda high, low: high**2 - low**2, str(count)) for count in (20, 40)]
    found = Findings.of(same)
    assert (found.blocks, found.runs) == (BLOCKS, ("20", "40"))
    assert found.correlation > 0.99
    assert found.difference < 0.05
    assert [float(torch.tensor(x)) * 10 for x in (0.01, 0.005)] == pytest.approx(
        [
            sum(c * x ** (len(found.coefficients) - 1 - n) for n, c in enumerate(found.coefficients))
            for x in (0.01, 0.005)
        ],
        rel=1e-2,
    )
    other = Findings.of([same[0], measured(steps(20), lambda high, low: 3 * (high - low))])
    assert other.difference > 0.5


def test_findings_are_read_again_beside_the_model(tmp_path):
    found = Findings.of([measured(steps(20), lambda high, low: high - low)])
    model = tmp_path / "flux.safetensors"
    with pytest.raises(UserError, match=r"no flux\.safetensors\.redundancy\.json"):
        load(model)
    assert found.save(model) == path_beside(model)
    assert load(model) == found
    path_beside(model).write_text('{"blocks": 3}')
    with pytest.raises(UserError, match="is no study"):
        load(model)
    check_blocks(found, BLOCKS)
    with pytest.raises(UserError, match=f"{BLOCKS} blocks, and this one has 57"):
        check_blocks(found, 57)


def test_a_run_of_two_evaluations_is_no_study():
    run = measured(steps(2), lambda high, low: high - low)
    with pytest.raises(UserError, match="2 evaluations"):
        Measured.of("short", {f"study.{name}": getattr(run, name) for name in ("levels", "changes", "whole")})


def test_heat_maps_are_pictures_of_one_size_with_a_colour_for_each_change():
    changes = torch.zeros(3, 2, len(QUANTITIES), 2)
    changes[..., 1, :] = torch.nan
    changes[2, 1, 0, 0] = 1.0
    image = to_image(heat_maps(changes, "a model"))
    assert image.shape[0] == 2
    colours = {tuple(each) for each in (image[0].flatten(0, 1) * 255).round().int().tolist()}
    assert {(13, 8, 135), (240, 249, 33), (217, 217, 217)} <= colours, "nothing, the largest, and not measured"


def test_a_study_measures_blocks_between_evaluations_of_one_prompt():
    study = Study(BLOCKS, "image", lambda state: state["image"], AGREEMENT.tokens)
    for time, scale in ((1.0, 1.0), (0.5, 1.5), (0.25, 1.5)):
        for name in ("positive", "negative"):
            condition = SimpleNamespace(name=name)
            evaluation: Any = SimpleNamespace(
                condition=condition, batch=1, grids={"image": "a grid"}, timestep=torch.tensor([time])
            )
            blocks = [
                lambda state, n=n, scale=scale: state.with_streams(image=state["image"] + scale * (n + 1))
                for n in range(BLOCKS)
            ]
            run_blocks(FAMILY, State({"image": torch.ones(1, 4, 3)}), blocks, policy=study.policy(evaluation))
    found = study.measured()
    assert found["times"].tolist() == [1.0, 0.5, 0.25]
    block = found["changes"][:, :, QUANTITIES.index("block")]
    assert block[0].tolist() == [[pytest.approx(0.5), pytest.approx(1.0)]] * BLOCKS
    assert block[1, :, 0].tolist() == [0.0] * BLOCKS
    assert found["changes"][:, :, QUANTITIES.index("text")].isnan().all()
    assert found["whole"][:, :, 0].tolist() == [[0.0, pytest.approx(0.5), pytest.approx(0.5)], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "kind", [FluxFlow(), DiscreteFlow(shift=3.0), EpsPrediction("linear", linear_end=0.02)], ids=str
)
def test_levels_go_from_one_to_none(kind):
    ends = [kind.level(float(kind.timestep(sigma))) for sigma in (kind.sigma_max, kind.sigma_min)]
    assert ends == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(
    ("rates", "threshold", "whole"),
    [
        ((1.0,), 0.0, [True, True, True, True, True]),
        ((1.0,), 0.35, [True, False, True, False, True]),
        ((0.0, 2.0), 0.35, [True, True, True, False, False]),
    ],
    ids=["0", "even", "only at first"],
)
def test_a_schedule_says_which_evaluations_are_computed_whole(rates, threshold, whole):
    cache = ScheduleCache(range(BLOCKS), lambda time: time, AGREEMENT, Limits(), threshold=threshold, rates=rates)
    found = [evaluated(cache, 1.0, 2.0, time=time)[1] == BLOCKS for time in (1.0, 0.8, 0.6, 0.4, 0.2)]
    assert found == whole


def test_the_integral_of_a_schedule_is_over_its_parts():
    assert integral((1.0, 3.0), 0.25, 0.75) == pytest.approx(0.25 + 0.75)
    assert integral((1.0, 3.0), 0.0, 1.0) == pytest.approx(2.0)
