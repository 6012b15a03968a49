"""ComfyUI's rule for several prompts a side, against one written out cell by cell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paralleldit.nodes.request.conditioning import to_message
from paralleldit.nodes.request.regions import placed_sides
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.engine.conditioning import Inputs, entries_of_side, sizes_of_controls
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.parallel_backend.families.keys.pixart import PIXART_SIGMA
from paralleldit.parallel_backend.families.spec import LatentSpec
from paralleldit.parallel_backend.layout.fitting import misfit_of
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.rules import RunFacts
from paralleldit.parallel_backend.protocol.messages import Conditioning
from paralleldit.parallel_backend.sampling.model_sampling import DiscreteFlow
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.strategies.prompt_batches import one_by_one

SHAPE = torch.Size((2, 4, 20, 14))
CFG = 3.0
SAMPLING = DiscreteFlow(shift=1.0, multiplier=1.0)
FAMILY: Any = SimpleNamespace(
    name="pixart-sigma",
    device=torch.device("cpu"),
    spec=PIXART_SIGMA,
    process_in=None,
    latents=(LatentSpec(channels=16),),
    latent=LatentSpec(channels=16),
    check_condition=lambda condition: None,
)
LEFT = torch.zeros(1, *SHAPE[2:])
LEFT[..., :6] = 0.5
TWO = torch.stack([LEFT[0], 1 - LEFT[0]])
DOT = torch.zeros(1, *SHAPE[2:])
DOT[..., 4, 9] = 1


def predict(latent: torch.Tensor, timestep: torch.Tensor, condition: Condition, _: None = None) -> torch.Tensor:
    """Stands in for a network: mixes the cells that it sees, and knows its prompt."""
    return torch.sin(latent * condition["tokens"].mean() + latent.mean(dim=(2, 3), keepdim=True))


def prompts(entries: list[dict[str, Any]], start: int) -> list[Any]:
    return [[torch.full((1, 3, 5), start + 0.5 * number), entry] for number, entry in enumerate(entries, 1)]


def expected(entries: list[Any], x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A side's prediction, from entries with areas in cells and masks of the latent's size."""
    total, weights = torch.zeros(SHAPE), torch.zeros(SHAPE)
    for tokens, entry in entries:
        if not 1 - entry.get("end_percent", 1) <= sigma <= 1 - entry.get("start_percent", 0):
            continue
        height, width, top, left = entry.get("area", (*SHAPE[2:], 0, 0))
        height, width = min(height, SHAPE[2] - top), min(width, SHAPE[3] - left)
        crop = x[:, :, top : top + height, left : left + width]
        denoised = crop - sigma * predict(crop, torch.ones(2), Condition({"tokens": tokens}))
        for picture in range(SHAPE[0]):
            for row in range(height):
                for column in range(width):
                    weight = entry.get("strength", 1.0)
                    if "mask" in entry:
                        mask = entry["mask"][picture % len(entry["mask"])]
                        weight *= entry.get("mask_strength", 1.0) * float(mask[top + row, left + column])
                    elif "area" in entry:
                        weight *= fade(row, height, top, SHAPE[2]) * fade(column, width, left, SHAPE[3])
                    total[picture, :, top + row, left + column] += weight * denoised[picture, :, row, column]
                    weights[picture, :, top + row, left + column] += weight
    return torch.where(weights > 0, total / weights, 0.0)


def fade(at: int, length: int, start: int, whole: int) -> float:
    steps = min(8, length // 4)
    before = (at + 1) / steps if start > 0 and at < steps else 1.0
    after = (length - at) / steps if start + length < whole and length - at <= steps else 1.0
    return before * after


@pytest.mark.parametrize("sigma", [0.9, 0.3])
@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        ([{}], [{}]),
        ([{"strength": 0.5}, {"strength": 1.5}], [{}]),
        ([{}, {"area": (12, 9, 0, 5), "strength": 0.8}], [{}]),
        ([{"area": (8, 30, 7, 0)}, {"area": (3, 3, 1, 1)}], [{"strength": 0.2}, {"area": (16, 14, 4, 0)}]),
        ([{}], [{}, {"area": (12, 9, 0, 5)}]),
        ([{"mask": LEFT, "mask_strength": 0.7}, {"mask": TWO, "strength": 0.3}], [{}]),
        ([{"mask": LEFT, "area": (9, 9, 3, 3)}], [{}]),
        (
            [{"end_percent": 0.4}, {"start_percent": 0.4, "strength": 0.3}, {"start_percent": 0.2}],
            [{"end_percent": 0.5}],
        ),
        ([{"start_percent": 0.4, "end_percent": 0.5}], [{"start_percent": 0.4, "end_percent": 0.5}]),
    ],
    ids=[
        "one",
        "strengths",
        "area",
        "areas",
        "area against",
        "masks",
        "mask in an area",
        "parts of the run",
        "none now",
    ],
)
def test_a_side_is_the_weighted_mean_of_its_entries(positive, negative, sigma):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    sides = placed_sides(prompts(positive, 0), prompts(negative, 5), SHAPE)
    entries = {}
    for side, each in sides.items():
        messages, tensors = to_message(side, each, FAMILY.name, SHAPE)
        entries[side] = entries_of_side(messages, side, Inputs(tensors, FAMILY, SAMPLING, SHAPE))
    alone = Axis("alone", [0], None, Ledger())
    guidance = Guidance(one_by_one(predict), SAMPLING, alone, entries["positive"], entries["negative"], CFG)
    found = guidance.denoised(x, torch.tensor(sigma))
    yes, no = (expected(each, x, sigma) for each in sides.values())
    torch.testing.assert_close(found, no + CFG * (yes - no))


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_a_norm_leaves_no_cell_longer_than_the_positive_prompts(cfg):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    sides = placed_sides(prompts([{}], 0), prompts([{}], 5), SHAPE)
    entries = {}
    for side, each in sides.items():
        messages, tensors = to_message(side, each, FAMILY.name, SHAPE)
        entries[side] = entries_of_side(messages, side, Inputs(tensors, FAMILY, SAMPLING, SHAPE))
    alone = Axis("alone", [0], None, Ledger())
    both = entries["positive"], entries["negative"]
    plain, normed = (
        Guidance(one_by_one(predict), SAMPLING, alone, *both, cfg, norm=norm).denoised(x, torch.tensor(0.5))
        for norm in (None, 0.9)
    )
    yes = expected(sides["positive"], x, 0.5).norm(dim=1, keepdim=True)
    shares = yes / plain.norm(dim=1, keepdim=True)
    assert (cfg == 1.0) or 0 < (shares < 1).float().mean() < 1
    torch.testing.assert_close(normed, 0.9 * plain * shares.clamp(max=1.0))


def test_areas_and_masks_are_those_of_the_latent():
    dot = {"mask": DOT.repeat_interleave(8, 1).repeat_interleave(8, 2), "set_area_to_bounds": True}
    empty = {"mask": torch.zeros(64, 64), "set_area_to_bounds": True}
    percent = {"area": ("percentage", 0.5, 0.25, 0.1, 0.5)}
    (_, of_dot), (_, of_empty), (_, of_percent) = placed_sides(prompts([dot, empty, percent], 0), [], SHAPE)["positive"]
    assert torch.equal(of_dot["mask"], DOT)
    assert of_dot["area"] == (8, 8, 4, 9)
    assert of_empty["area"] == (8, 8, 0, 0)
    assert of_percent["area"] == (10, 4, 2, 7)


def test_an_area_gets_the_prompt_of_the_smallest_area_around_on_the_other_side():
    area, around, apart = (4, 4, 6, 6), (8, 8, 4, 4), (5, 5, 0, 0)
    positive = prompts([{"area": area, "strength": 0.5, "mask": LEFT, "width": 9}], 0)
    negative = prompts([{"width": 7}, {"area": (20, 14, 0, 0)}, {"area": around}, {"area": apart}], 5)
    sides = placed_sides(positive, negative, SHAPE)
    added = sides["negative"][4:]
    assert [tokens is negative[2][0] for tokens, _ in added] == [True]
    assert added[0][1] == {"area": area, "strength": 0.5, "mask": added[0][1]["mask"]}
    assert torch.equal(added[0][1]["mask"], LEFT)
    # The positive side's only prompt is for less than the other areas of the negative one.
    assert len(sides["positive"]) == 1
    messages, tensors = to_message("negative", sides["negative"], FAMILY.name, SHAPE)
    assert [message.prompt for message in messages] == [None, None, None, None, 2]
    assert set(tensors) == {"negative.4.region", *(f"negative.{index}.tokens" for index in range(4))}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"area": (4, 4, 20, 0)}, ("area of 4 x 4 cells at 0, 20", "14 x 20")),
        ({"area": (1, 4, 4, 0, 0, 0)}, ("6 numbers", "4")),
        ({"mask": torch.ones(2, 3, 8, 8)}, ("[2, 3, 8, 8]",)),
        ({"mask": torch.ones(3, 8, 8)}, ("3 masks", "batch of 4")),
        ({"strength": 101.0}, ("strength of 101", "100")),
    ],
)
def test_what_is_no_place_in_the_picture_is_refused(entry, words):
    shape = torch.Size((4, *SHAPE[1:]))
    with pytest.raises(UserError) as error:
        to_message("positive", placed_sides(prompts([entry], 0), [], shape)["positive"], FAMILY.name, shape)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("change", "tensors", "words"),
    [
        ({"area": (4, 4, 17, 0)}, {}, "area of 4 x 4 cells at 0, 17"),
        ({"prompt": 1}, {}, "prompt of entry 1"),
        ({"references": 1}, {}, "does not look at"),
        ({}, {"positive.0.region": torch.ones(1, 4, 4)}, r"\[1, 4, 4\].*\[2, 20, 14\]"),
        ({}, {"positive.0.region": torch.ones(())}, r"\[\].*\[2, 20, 14\]"),
        ({}, {"positive.0.region": torch.full((1, *SHAPE[2:]), torch.nan)}, "NaN"),
    ],
)
def test_the_ranks_refuse_entries_that_do_not_fit_the_latent(change, tensors, words):
    tensors = {"positive.0.tokens": torch.ones(1, 3, 5), **tensors}
    with pytest.raises(UserError, match=words):
        entries_of_side((Conditioning(**change),), "positive", Inputs(tensors, FAMILY, SAMPLING, SHAPE))


def test_a_control_picture_is_of_the_size_of_what_names_it():
    whole, area = Conditioning(controls=(1,)), Conditioning(controls=(0,), area=(4, 6, 0, 0))
    assert sizes_of_controls((whole, area), 3, SHAPE) == [(4, 6), (20, 14), (20, 14)]
    with pytest.raises(UserError, match=r"names controls \(1,\), of which 1"):
        sizes_of_controls((whole,), 1, SHAPE)
    with pytest.raises(UserError, match="control 1 is for"):
        sizes_of_controls((whole, area.model_copy(update={"controls": (1,)})), 2, SHAPE)


PIPED, LATE = Layout(pipefusion_degree=2), Layout(distrifusion_degree=2)


@pytest.mark.parametrize(
    ("layout", "entry", "words"),
    [
        (PIPED, {"area": (4, 4, 0, 0)}, "area of the picture, but pipefusion_degree=2"),
        (PIPED, {"end": 0.5}, "from 0 to 0.5 of the run, but pipefusion_degree=2"),
        (PIPED, {"references": 2}, "2 reference pictures"),
        (PIPED, {"strength": 0.5}, ""),
        (LATE, {"start": 0.2}, "from 0.2 to 1 of the run, but distrifusion_degree=2"),
        (LATE, {"area": (4, 4, 0, 0), "references": 1}, ""),
        (Layout(ulysses_degree=2), {"area": (4, 4, 0, 0), "end": 0.5, "references": 1}, ""),
    ],
)
def test_what_goes_on_from_the_step_before_takes_only_what_is_there_in_every_step(layout, entry, words):
    reason, _ = misfit_of(layout, RunFacts(entries=(Conditioning(), Conditioning(**entry)))) or ("", "")
    assert words in reason
    assert bool(reason) == bool(words)
