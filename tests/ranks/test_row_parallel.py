"""A U-Net in bands of rows over the ranks gives what its plain diffusers forward gives in one process."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from paralleldit.parallel_backend.attention.usp import make_attention
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.control_group import ControlGroup
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine.predict import predict
from paralleldit.parallel_backend.engine.run_conditions import RunConditions
from paralleldit.parallel_backend.engine.sample import sample
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout.fitting import check_layout
from paralleldit.parallel_backend.layout.layout import AXES, Layout
from paralleldit.parallel_backend.layout.rules import RunFacts
from paralleldit.parallel_backend.layout.split import split_sizes
from paralleldit.parallel_backend.protocol.messages import ModelRef, Predict, Sample, Schedule
from paralleldit.parallel_backend.run_context import Run
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.strategies.prompt_batches import one_by_one
from paralleldit.parallel_backend.strategies.row_parallel import RowParallel
from paralleldit.parallel_backend.strategies.weighted_prompts import WeightedPrompt
from paralleldit.tests.covering import covering, pairs
from paralleldit.tests.ranks.matrix import EXACT, cell
from paralleldit.tests.tiny_models import entry_of, run_prompt_of, tensors_of
from paralleldit.tests.tiny_unet import BASE, REFINER, SPECS, condition, family, network, told
from torch import Tensor, nn

CPU = torch.device("cpu")
TOLERANCE = 1e-5
BYTES = 4
TABLE = [
    Layout(),
    Layout(ulysses_degree=2),
    Layout(ring_degree=2),
    Layout(ulysses_degree=3),
    Layout(ring_degree=3),
    Layout(ulysses_degree=4),
    Layout(ring_degree=4),
    Layout(ulysses_degree=2, ring_degree=2),
]
LAYOUTS = covering(
    TABLE,
    # How rows are shared depends on the number of ranks, how attention is, on the axes.
    lambda layout: {frozenset((layout.ranks,))} | pairs([axis for axis in AXES if layout.degree(axis) > 1]),
)
SHAPES = {
    "even": (1, 16, 8),
    "uneven shares": (1, 24, 5),
    "two rows left over": (1, 18, 6),
    "odd": (2, 13, 9),
    "one row less than whole multiples": (1, 15, 7),
    "fewer multiples than ranks": (1, 8, 8),
    "one row of the second multiple": (1, 5, 4),
    "less than one multiple": (3, 3, 6),
    "a single cell": (1, 1, 1),
}
"""Batch, rows and columns of the latent; the network's coarsest row is made of 4."""
CASES = [*((BASE, shape) for shape in SHAPES), *((REFINER, shape) for shape in ("odd", "fewer multiples than ranks"))]
GUIDED = [
    Layout(cfg_degree=2),
    Layout(data_degree=2),
    Layout(ulysses_degree=2, cfg_degree=2),
    Layout(ring_degree=2, data_degree=2),
]


def cells():
    """What the tests of this module note."""
    for layout in TABLE:
        yield from (cell(EXACT, layout, spec.name) for spec in SPECS.values())
    yield from (cell(EXACT, layout, SPECS[BASE].name) for layout in GUIDED)


def latent(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(height))


def timestep(batch: int) -> Tensor:
    return torch.tensor([701.0, 33.0, 250.0])[:batch]


def stock(latent: Tensor, timestep: Tensor, seed: int = 5, model: str = BASE) -> Tensor:
    """What diffusers' own forward gives, by a call with arguments of this file's own making."""
    given = condition(len(latent), seed)
    return network(model)(latent, timestep, given["tokens"], added_cond_kwargs=told(given, model)).sample


def plain(world: Axis) -> list[Tensor]:
    return [stock(latent(*SHAPES[shape]), timestep(SHAPES[shape][0]), model=model) for model, shape in CASES]


def in_rows(mesh: Mesh, model: str = BASE) -> RowParallel:
    attention = make_attention("auto", mesh.ulysses, mesh.ring, CPU, torch.float32)
    return RowParallel(family(model), mesh.sequence, attention)


def predictions(world: Axis, layout: Layout) -> list[Tensor]:
    mesh = Mesh(layout)
    strategies = {model: in_rows(mesh, model) for model in SPECS}
    try:
        return [
            strategies[model].predict(latent(*SHAPES[shape]), timestep(SHAPES[shape][0]), condition(SHAPES[shape][0]))
            for model, shape in CASES
        ]
    finally:
        for strategy in strategies.values():
            strategy.family.uninstall()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_plain_forward(ranks, figures, layout):
    (expected,) = ranks.once(1, plain)
    for found in ranks.run(layout.ranks, predictions, layout):
        errors = {}
        for case, mine, truth in zip(CASES, found, expected, strict=True):
            errors[case] = float((mine - truth).norm() / truth.norm())
            figures.note(EXACT, layout, SPECS[case[0]].name, errors[case])
        assert max(errors.values()) <= TOLERANCE, errors


CFG, SIGMA = 3.0, torch.tensor(2.0)


def guided(world: Axis, layout: Layout) -> Tensor:
    mesh = Mesh(layout)
    strategy = in_rows(mesh)
    counts = split_sizes(2, mesh.data.size)
    own = slice(sum(counts[: mesh.data.rank]), sum(counts[: mesh.data.rank + 1]))
    sides = [[WeightedPrompt.plain(condition(2, seed)).part(own, 2)] for seed in (5, 6)]
    guidance = Guidance(one_by_one(strategy.predict), strategy.family.model_sampling(None), mesh.cfg, *sides, CFG)
    try:
        return mesh.data.all_gather(guidance.denoised(latent(2, 13, 9)[own], SIGMA), counts, dim=0)
    finally:
        strategy.family.uninstall()


def guided_alone(world: Axis) -> Tensor:
    view = family()
    sampling = view.model_sampling(None)
    view.uninstall()
    x = latent(2, 13, 9)
    positive, negative = (
        sampling.denoised(stock(sampling.calculate_input(SIGMA, x), sampling.timestep(SIGMA).expand(2), seed), x, SIGMA)
        for seed in (5, 6)
    )
    return negative + (positive - negative) * CFG


@pytest.mark.parametrize("layout", GUIDED, ids=str)
def test_guidance_and_batches_over_rows(ranks, figures, layout):
    (expected,) = ranks.once(1, guided_alone)
    for found in ranks.run(layout.ranks, guided, layout):
        error = float((found - expected).norm() / expected.norm())
        figures.note(EXACT, layout, SPECS[BASE].name, error)
        assert error <= TOLERANCE


def work_of(request: Sample | Predict) -> Run:
    return Run(ControlGroup(), request.id, lambda *_: None)


def under_both_prompts(world: Axis) -> Tensor:
    return torch.cat([stock(latent(2, 13, 9), timestep(2), seed) for seed in (5, 6)])


def by_request(world: Axis, layout: Layout) -> list[Tensor]:
    """What requests give: a run of three steps, and one prediction under two prompts."""
    mesh = Mesh(layout)
    view = family()
    sides = {side: condition(2, seed) for side, seed in (("positive", 5), ("negative", 6))}
    keys = {"a" * 32: "positive", "b" * 32: "negative"}
    tensors = {"latent": latent(2, 13, 9)}
    for side, given in sides.items():
        tensors |= tensors_of(side, given)
    sampled = Sample(
        id=1,
        model=ModelRef(path="given"),
        layout=layout,
        positive=(entry_of(sides["positive"]),),
        negative=(entry_of(sides["negative"]),),
        cfg=CFG,
        sampler="euler",
        schedule=Schedule(scheduler="simple", steps=3),
        seed=42,
    )
    predicted = Predict(
        id=2,
        model=ModelRef(path="given"),
        layout=layout,
        run="c" * 32,
        conditions=tuple(keys),
        run_conditions={key: run_prompt_of(sides[side]) for key, side in keys.items()},
    )
    asked = {"latent": latent(2, 13, 9).repeat(2, 1, 1, 1), "timestep": timestep(2).repeat(2)}
    for key, side in keys.items():
        asked |= {name.replace(side, key): each for name, each in tensors_of(side, sides[side]).items()}
    try:
        return [
            sample(sampled, tensors, view, mesh, work_of(sampled))["latent"],
            predict(predicted, asked, RunConditions(), view, mesh, work_of(predicted), {}, {})["prediction"],
        ]
    finally:
        view.uninstall()


@pytest.mark.parametrize("layout", [Layout(ulysses_degree=2), Layout(ring_degree=2, cfg_degree=2)], ids=str)
def test_requests_give_what_one_rank_gives(ranks, layout):
    (expected,) = ranks.once(1, by_request, Layout())
    (predicted,) = ranks.run(1, under_both_prompts)
    assert float((expected[1] - predicted).norm() / predicted.norm()) <= TOLERANCE
    for found in ranks.run(layout.ranks, by_request, layout):
        for mine, truth in zip(found, expected, strict=True):
            assert float((mine - truth).norm() / truth.norm()) <= TOLERANCE


def test_a_layout_that_needs_blocks_is_refused_with_one_that_does_not():
    with pytest.raises(UserError) as caught:
        check_layout(Layout(distrifusion_degree=2), RunFacts(ranks=2, can=SPECS[BASE].can))
    assert "distrifusion_degree=2" in str(caught.value)
    assert "Nearest that fits: ulysses2" in str(caught.value)


def bytes_sent(world: Axis, layout: Layout) -> Counter[str]:
    mesh = Mesh(layout)
    strategy = in_rows(mesh)
    try:
        strategy.predict(latent(2, 16, 8), timestep(2), condition(2))
    finally:
        strategy.family.uninstall()
    return Counter({name: traffic.bytes for (name, _), traffic in mesh.ledger.sent.items()}) + Counter(
        {operation: traffic.bytes for (name, operation), traffic in mesh.ledger.sent.items() if name == "sequence"}
    )


def bytes_expected(world: Axis, layout: Layout) -> dict[str, float]:
    """Of all ranks together, from the shapes that the layers of the plain network are called with."""
    unet, n, found = network(), layout.ranks, Counter()
    ulysses, ring = layout.ulysses_degree, layout.ring_degree

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if isinstance(module, nn.Conv2d):
            # A row to each neighbour; where rows are halved, to the one below alone.
            found["all_to_all"] += (n - 1) * (2 // module.stride[0]) * x[:, :, 0].numel() * BYTES
        elif isinstance(module, nn.GroupNorm):
            # Ring all-reduce of a sum, a sum of squares and a count in fp64, of every picture and group.
            found["all_reduce"] += 2 * (n - 1) * 3 * len(x) * module.num_groups * 8
        else:
            # USP (arXiv 2405.07719): four all-to-alls, and keys and values of the other chunks.
            found["ulysses"] += 4 * (ulysses - 1) / ulysses * x.numel() * BYTES
            found["ring"] += 2 * (ring - 1) * x.numel() * BYTES

    layers = [
        module
        for name, module in unet.named_modules()
        if (isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3))
        or isinstance(module, nn.GroupNorm)
        or name.endswith(".attn1")
    ]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        output = stock(latent(2, 16, 8), timestep(2))
    finally:
        for hook in hooks:
            hook.remove()
    found["all_gather"] += (n - 1) * output.numel() * BYTES
    return dict(found)


@pytest.mark.parametrize("layout", [Layout(ulysses_degree=2), Layout(ring_degree=4)], ids=str)
def test_bytes_sent_match_theory(ranks, layout):
    (expected,) = ranks.run(1, bytes_expected, layout)
    sent = sum(ranks.run(layout.ranks, bytes_sent, layout), Counter())
    assert {name: sent[name] for name in expected} == pytest.approx(expected, rel=0.001)


def left_behind(world: Axis) -> tuple[bool, bool]:
    """Whether the network is its own again after an evaluation that failed, and after the family is gone."""
    x, when, given = latent(1, 13, 9), timestep(1), condition(1)
    expected = stock(x, when)
    strategy = in_rows(Mesh(Layout(ulysses_degree=2)))
    view = strategy.family
    with pytest.raises(RuntimeError):
        strategy.predict(x[:, :3], when, given)
    alone = torch.equal(view.forward(x, when, given), expected)
    view.uninstall()
    return alone and torch.equal(stock(x, when), expected), all(
        "diffusers" in type(each).__module__ for each in network().attn_processors.values()
    )


def test_the_network_is_left_as_it_was(ranks):
    assert ranks.run(2, left_behind) == [(True, True)] * 2
