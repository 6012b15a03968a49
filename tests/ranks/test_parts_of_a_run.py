"""Parts of a run's steps, masks of single latents and previews: of a model of video and sound, on real ranks."""

from typing import Any

import pytest
import torch
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine import sample
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.made_up import cases
from paralleldit.tests.ranks.stale_flux import run_of
from torch import Tensor

STEPS = 4


def sampled(
    world: Any, layout: Layout, changes: dict[str, Any], more: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """The latents of a run with these `changes` of its request and `more` tensors, and the shapes of its previews."""
    condition = cases.condition()
    tensors = {f"latent.{name}": latent for name, latent in cases.latents().items()}
    tensors |= {f"positive.0.{name}": x for name, x in condition.tensors.items()} | more
    request = messages.Sample(
        id=1,
        model=messages.ModelRef(path="unused"),
        layout=layout,
        positive=(messages.Conditioning(),),
        sampler="euler",
        schedule=messages.Schedule(scheduler="simple", steps=STEPS, denoise=0.8),
        seed=42,
        **changes,
    )
    run, events = run_of(request)
    found = sample.sample(request, tensors, cases.family(), Mesh(layout), run)
    return found, [list(tensors["preview"].shape) for _, tensors in events if "preview" in tensors]


def alone(ranks, changes, more):
    return ranks.once(1, sampled, Layout(), changes, more)[0]


def relative_error(actual, expected):
    return max(float((actual[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("layout", [Layout(), Layout(ulysses_degree=2)], ids=str)
def test_two_parts_of_a_run_are_the_whole_where_the_first_leaves_its_noise(ranks, layout):
    whole, _ = alone(ranks, {}, {})
    (first, _), *_ = ranks.run(layout.ranks, sampled, layout, {"end_step": 2, "leftover_noise": True}, {})
    for second, _ in ranks.run(layout.ranks, sampled, layout, {"start_step": 2, "add_noise": False}, first):
        assert relative_error(second, whole) <= 1e-5
    clean, _ = alone(ranks, {"end_step": 2}, {})
    assert relative_error(clean, first) > 1e-2


@pytest.mark.parametrize("layout", [Layout(), Layout(pipefusion_degree=2)], ids=str)
def test_a_part_of_no_steps_gives_back_the_latents_that_came(ranks, layout):
    given = {f"latent.{name}": torch.zeros_like(latent) for name, latent in cases.latents().items()}
    for found, previews in ranks.run(layout.ranks, sampled, layout, {"start_step": STEPS}, given):
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], given[name]) for name in given)
        assert not previews


@pytest.mark.parametrize("layout", [Layout(), Layout(pipefusion_degree=2, num_patches=3, warmup_steps=STEPS)], ids=str)
def test_a_mask_of_one_of_two_latents_keeps_its_part_and_the_preview_is_the_first_frame(ranks, layout):
    frames, rows, columns = cases.SIZES["video"]
    mask = torch.ones(1, 1, frames, rows, columns)
    mask[:, :, :2] = 0
    given = cases.latents()
    whole, _ = alone(ranks, {}, {})
    for found, previews in ranks.run(layout.ranks, sampled, layout, {"preview": True}, {"noise_mask.video": mask}):
        kept, changed = (given["video"] - found["latent.video"]).split([2, frames - 2], dim=2)
        assert float(kept.abs().max()) < 1e-5
        assert float(changed.abs().min(dim=1).values.max()) > 1e-2
        assert relative_error({"sound": found["latent.sound"]}, {"sound": given["sound"]}) > 1e-2
        assert found.keys() == whole.keys()
        assert previews in ([], [[1, 3, 1, rows, columns]] * STEPS)
