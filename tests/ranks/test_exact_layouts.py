"""Every exact layout gives what the plain diffusers transformer gives in one process."""

from dataclasses import replace
from itertools import groupby, product
from unittest import mock

import pytest
import torch
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine import sample as sample_request
from paralleldit.parallel_backend.engine.model import Transformer
from paralleldit.parallel_backend.engine.sample import run_sampler, sample
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout.layout import AXES, Layout
from paralleldit.parallel_backend.layout.model_part import ModelPart
from paralleldit.parallel_backend.layout.split import split_sizes
from paralleldit.parallel_backend.protocol.messages import ModelRef, Sample, Schedule
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.strategies.prompt_batches import PromptBatches
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.parallel_backend.strategies.weighted_prompts import WeightedPrompt
from paralleldit.tests.covering import covering, pairs, pairs_of
from paralleldit.tests.ranks.matrix import BF16, EXACT, cell
from paralleldit.tests.tiny_models import CPU, ONE_OF_EACH, TINY_MODELS, entry_of, on_device, tensors_of

CFG = 3.0
DEPTH = 1
"""Of the models: what is exact for one block of each kind is so for more."""

LAYOUTS = [
    # ulysses, ring, cfg, data
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 1, 2, 1),
    (1, 1, 1, 2),
    (3, 1, 1, 1),
    (1, 3, 1, 1),
    (4, 1, 1, 1),
    (1, 4, 1, 1),
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (1, 2, 2, 1),
    (2, 1, 1, 2),
    (1, 2, 1, 2),
    (1, 1, 2, 2),
    (5, 1, 1, 1),
    (3, 2, 1, 1),
    (3, 1, 2, 1),
    (7, 1, 1, 1),
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (4, 2, 1, 1),
    (2, 4, 1, 1),
    (4, 1, 2, 1),
    (1, 4, 2, 1),
    (2, 2, 2, 1),
    (2, 2, 1, 2),
    (2, 1, 2, 2),
    (1, 2, 2, 2),
    (4, 1, 1, 2),
    (1, 1, 2, 4),
]
SPREAD = [
    # Layouts in which no rank holds the whole model
    Layout(tensor_degree=2),
    Layout(tensor_degree=3),
    Layout(tensor_degree=4),
    Layout(tensor_degree=8),
    Layout(tensor_degree=2, ulysses_degree=2),
    Layout(tensor_degree=2, ring_degree=2),
    Layout(tensor_degree=2, cfg_degree=2),
    Layout(tensor_degree=3, data_degree=2),
    Layout(tensor_degree=2, ulysses_degree=2, ring_degree=2),
    Layout(tensor_degree=2, ulysses_degree=2, cfg_degree=2),
    Layout(weights="offloaded"),
    Layout(ulysses_degree=2, weights="sharded"),
    Layout(ring_degree=3, weights="sharded"),
    Layout(ulysses_degree=2, ring_degree=2, weights="offloaded"),
    Layout(cfg_degree=2, data_degree=2, weights="sharded"),
    Layout(ulysses_degree=4, cfg_degree=2, weights="sharded"),
    Layout(tensor_degree=2, ulysses_degree=2, weights="sharded"),
    Layout(tensor_degree=3, cfg_degree=2, weights="sharded"),
    Layout(tensor_degree=2, ring_degree=2, data_degree=2, weights="offloaded"),
]
IN_BF16 = [(2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 2, 1)]
SPREAD_IN_BF16 = [SPREAD[0], SPREAD[9], SPREAD[-3]]
SHAPES = [
    # heads, latent height and width, text tokens, batch
    (4, 8, 8, 16, 4),
    (3, 7, 9, 5, 4),
    (2, 2, 2, 3, 4),
]
WHOLE_RUNS = [*ONE_OF_EACH]
VARIANTS = [model for model in TINY_MODELS if model not in WHOLE_RUNS]


def cases_of(layout: Layout) -> list[tuple[str, tuple[int, ...]]]:
    """Models and shapes: one model of each family in every shape, up to two ranks the others in the first shape. More
    ranks than the first shape has heads see those that leave some of them without heads or tokens."""
    if layout.ranks > SHAPES[0][0]:
        return [*product(WHOLE_RUNS, SHAPES[1:])]
    others = VARIANTS if layout.ranks <= 2 else ["pixart sigma"]
    return [*product(WHOLE_RUNS, SHAPES), *((model, SHAPES[0]) for model in others)]


def make_inputs(model, height, width, text, batch):
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tiny = TINY_MODELS[model]
    latent = tiny.latent(draw, batch, height, width)
    # The negative prompt has another length, and a text for every picture.
    conditions = tiny.condition(draw, 1, text), tiny.condition(draw, batch, text + 3)
    # As a request has it: a picture of which no size is told is told of its own, in pixels.
    return latent, *(replace(each, size=each.size or (8 * height, 8 * width)) for each in conditions)


def guided(world, layout, cases, dtype):
    """One guided prediction of each model and shape."""
    mesh = Mesh(layout)
    return {case: guided_by(TINY_MODELS[case[0]].make_family(case[1][0], dtype, DEPTH), mesh, *case) for case in cases}


def guided_by_part(world, layout, cases, paths, dtype, device=CPU):
    """As `guided`, by ranks that read their parts of the files. Where these move, the second finds what the first left
    behind."""
    mesh = Mesh(layout)
    answers = {}
    for case, path in zip(cases, paths, strict=True):
        transformer = Transformer(path, torch.device(device), dtype, ModelPart.of(layout, mesh))
        if layout.weights != "whole":
            guided_by(transformer.on(mesh), mesh, *case)
        answers[case] = guided_by(transformer.on(mesh), mesh, *case)
    return answers


def guided_by(family, mesh, model, shape):
    """A guided prediction of the family, this rank's part of the batch gathered to the whole."""
    _, height, width, text, batch = shape
    latent, *conditions = make_inputs(model, height, width, text, batch)
    latent, conditions = latent.to(family.device), [on_device(each, family.device) for each in conditions]
    counts = split_sizes(batch, mesh.data.size)
    own = slice(sum(counts[: mesh.data.rank]), sum(counts[: mesh.data.rank + 1]))
    attention = AttentionCore(mesh.ulysses, mesh.ring, KERNELS["sdpa"])
    batches = PromptBatches(SequenceParallel(family, mesh.sequence, attention), outputs=10**9, batch=counts[0])
    positive, negative = (condition.part(own, batch) for condition in conditions)
    guide = Guidance(
        batches.predict_all,
        family.model_sampling(None),
        mesh.cfg,
        [WeightedPrompt.plain(positive)],
        [WeightedPrompt.plain(negative)],
        CFG,
    )
    denoised = guide.denoised(latent[own], torch.tensor(TINY_MODELS[model].sigma))
    return mesh.data.all_gather(denoised, counts, dim=0).cpu()


def layout_of(degrees) -> Layout:
    ulysses, ring, cfg, data = degrees
    return Layout(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg, data_degree=data)


def covering_by_layout(rows):
    """(layout, its models and shapes), of the rows (layout, model, shape) that cover the whole table."""
    part = covering(rows, lambda row: pairs_of(*row), lambda row: row[0].ranks)
    return [(layout, [tuple(case) for _, *case in of_it]) for layout, of_it in groupby(part, key=lambda row: row[0])]


def layout_alone(parameter):
    return str(parameter) if isinstance(parameter, Layout) else "tiny"


def relative_error(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def expected():
    """Plain diffusers predictions, computed once per model and shape."""
    answers = {}

    def of(model, shape):
        if (model, shape) not in answers:
            heads, height, width, text, batch = shape
            tiny = TINY_MODELS[model]
            latent, positive, negative = make_inputs(model, height, width, text, batch)
            with torch.inference_mode():
                transformer = tiny.make(heads, DEPTH)
                yes, no = (tiny.denoise(transformer, latent, condition) for condition in (positive, negative))
            answers[model, shape] = no + CFG * (yes - no)
        return answers[model, shape]

    return of


@pytest.mark.parametrize(
    ("layout", "cases"),
    covering_by_layout((layout, *case) for layout in map(layout_of, LAYOUTS) for case in cases_of(layout)),
    ids=layout_alone,
)
def test_layout_equals_plain_diffusers(ranks, figures, expected, layout, cases):
    for answers in ranks.run(layout.ranks, guided, layout, cases, torch.float32):
        for (model, shape), answer in answers.items():
            error = relative_error(answer, expected(model, shape))
            figures.note(EXACT, layout, TINY_MODELS[model].spec.name, error)
            assert error <= 1e-5, (model, shape)


@pytest.mark.parametrize("degrees", IN_BF16, ids=str)
def test_layout_in_bf16_stays_within_its_rounding(ranks, figures, degrees):
    cases = [(model, SHAPES[0]) for model in WHOLE_RUNS]
    (alone,) = ranks.once(1, guided, Layout(), cases, torch.bfloat16)
    (exact,) = ranks.once(1, guided, Layout(), cases, torch.float32)
    answers = ranks.run(layout_of(degrees).ranks, guided, layout_of(degrees), cases, torch.bfloat16)[0]
    for case, answer in answers.items():
        error = relative_error(answer, exact[case])
        figures.note(BF16, layout_of(degrees), TINY_MODELS[case[0]].spec.name, error)
        assert error <= 2 * relative_error(alone[case], exact[case]), case


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """The files of a model with as many heads, which ranks read their parts from."""

    def of(model, heads):
        folder = tmp_path_factory.getbasetemp() / f"{model}-{heads}-heads"
        if not folder.exists():
            TINY_MODELS[model].make(heads, DEPTH).save_pretrained(folder)
        return folder

    return of


# What divides evenly is the simplest: the LoRAs, the ControlNets and runs in bf16 are tested with that.
SPREAD_CASES = [*product(WHOLE_RUNS[:2], SHAPES[1:]), *product(WHOLE_RUNS[2:], SHAPES[1:2])]


def cells():
    """What the tests of this module note."""
    cases = [(EXACT, layout, cases_of(layout)) for layout in map(layout_of, LAYOUTS)]
    cases += [(EXACT, layout, SPREAD_CASES) for layout in SPREAD]
    cases += [(BF16, layout, product(WHOLE_RUNS)) for layout in (*map(layout_of, IN_BF16), *SPREAD_IN_BF16)]
    for table, layout, models in cases:
        for model, *_ in models:
            yield cell(table, layout, TINY_MODELS[model].spec.name)


@pytest.mark.parametrize(
    ("layout", "cases"),
    covering_by_layout(
        (layout, *case) for layout in sorted(SPREAD, key=lambda layout: layout.ranks) for case in SPREAD_CASES
    ),
    ids=layout_alone,
)
def test_parts_of_a_model_equal_plain_diffusers(ranks, figures, expected, model_path, layout, cases):
    paths = [model_path(model, shape[0]) for model, shape in cases]
    for answers in ranks.run(layout.ranks, guided_by_part, layout, cases, paths, "auto"):
        for (model, shape), answer in answers.items():
            error = relative_error(answer, expected(model, shape))
            figures.note(EXACT, layout, TINY_MODELS[model].spec.name, error)
            assert error <= 1e-5, (model, shape)


@pytest.mark.parametrize("layout", SPREAD_IN_BF16, ids=str)
def test_parts_of_a_model_in_bf16_stay_within_its_rounding(ranks, figures, model_path, layout):
    cases = [(model, SHAPES[0]) for model in WHOLE_RUNS]
    paths = [model_path(model, shape[0]) for model, shape in cases]
    (alone,) = ranks.once(1, guided, Layout(), cases, torch.bfloat16)
    (exact,) = ranks.once(1, guided, Layout(), cases, torch.float32)
    answers = ranks.run(layout.ranks, guided_by_part, layout, cases, paths, "bf16")[0]
    for case, answer in answers.items():
        error = relative_error(answer, exact[case])
        figures.note(BF16, layout, TINY_MODELS[case[0]].spec.name, error)
        assert error <= 2 * relative_error(alone[case], exact[case]), case


class QuietRun:
    """A run that nobody watches."""

    def progress(self, *args):
        pass

    def log(self, *args):
        pass

    def check_cancelled(self):
        pass

    def leave_if_cancelled(self):
        pass


def sampled(world, degrees, model, sampler, batch_index, masked, spoilt=""):
    heads, height, width, text, batch = SHAPES[0]
    family = TINY_MODELS[model].make_family(heads, depth=DEPTH)
    latent, positive, negative = make_inputs(model, height, width, text, batch)
    request = Sample(
        id=1,
        model=ModelRef(path="unused"),
        layout=layout_of(degrees),
        positive=(entry_of(positive),),
        negative=(entry_of(negative),),
        cfg=CFG,
        sampler=sampler,
        schedule=Schedule(scheduler="simple", steps=4, denoise=0.8),
        seed=42,
        batch_index=batch_index,
    )
    tensors = {"latent": latent, **tensors_of("positive", positive), **tensors_of("negative", negative)}
    if spoilt == "text":
        tensors["negative.0.tokens"][0] = torch.nan
    if spoilt == "latent":
        tensors["latent"][-1] = torch.finfo(torch.float32).max
    if masked:
        frames = [1] * (latent.ndim - 4)
        tensors["noise_mask"] = torch.linspace(0, 1, batch * 16 * 16).view(batch, 1, *frames, 16, 16).round()
    return sample(request, tensors, family, Mesh(request.layout), QuietRun())["latent"]


RUNS = [
    ((2, 1, 1, 1), "euler", None, False),
    ((1, 2, 2, 1), "dpmpp_2m", None, True),
    ((1, 1, 1, 2), "euler_ancestral", None, True),
    ((1, 1, 2, 2), "dpmpp_2m_sde", (3, 1, 1, 0), False),
    ((2, 1, 2, 2), "ddim", None, True),
]


def meetings_of_run(model, degrees, sampler, batch_index, masked):
    """Each family meets every axis, a mask and numbers of pictures; each two axes meet, and each with every sampler."""
    axes = [axis for axis in AXES if layout_of(degrees).degree(axis) > 1]
    beside = [*axes, *["masked"] * masked, *["numbered"] * (batch_index is not None)]
    return pairs([*axes, sampler]) | {frozenset((model, each)) for each in beside}


@pytest.mark.parametrize(
    ("model", "degrees", "sampler", "batch_index", "masked"),
    covering(
        [(model, *run) for run in RUNS for model in WHOLE_RUNS],
        lambda case: meetings_of_run(*case),
        lambda case: layout_of(case[1]).ranks,
    ),
    ids=str,
)
def test_whole_run_equals_one_rank(ranks, model, degrees, sampler, batch_index, masked):
    (alone,) = ranks.once(1, sampled, (1, 1, 1, 1), model, sampler, batch_index, masked)
    for answer in ranks.run(layout_of(degrees).ranks, sampled, degrees, model, sampler, batch_index, masked):
        assert relative_error(answer, alone) <= 1e-5


def failure_of_run(world, degrees, spoilt):
    def broken_down(*arguments):
        return run_sampler(*arguments) * (torch.nan if world.rank else 1.0)

    try:
        with mock.patch.object(sample_request, "run_sampler", broken_down if spoilt == "result" else run_sampler):
            sampled(world, degrees, "sd3.5 medium", "euler", None, False, spoilt)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        ("text", "prediction is not finite at step 1 of 4"),
        ("latent", "latent is not finite at step 1 of 4"),
        ("result", "latent is not finite after step 4 of 4"),
    ],
)
def test_what_breaks_on_one_replica_stops_all_alike(ranks, spoilt, reason):
    (failure,) = set(ranks.run(2, failure_of_run, (1, 1, 1, 2), spoilt))
    assert reason in failure
