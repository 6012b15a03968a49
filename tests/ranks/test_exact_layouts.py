"""Every exact layout gives what the plain diffusers transformer gives in one process."""

from itertools import product

import pytest
import torch
from paralleldit.parallel_backend.attention.core import AttentionCore
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.comm import split_sizes
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout import Layout
from paralleldit.parallel_backend.mesh import Mesh
from paralleldit.parallel_backend.parts import Part
from paralleldit.parallel_backend.protocol.messages import ModelRef, Sample, Schedule
from paralleldit.parallel_backend.sample_request import sample
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.parallel_backend.transformer import Transformer
from paralleldit.tests.tiny_models import TINY_MODELS, entry_of, tensors_of

CFG = 3.0

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
SHAPES = [
    # heads, latent height and width, text tokens, batch
    (4, 8, 8, 16, 4),
    (3, 7, 9, 5, 4),
    (2, 2, 2, 3, 4),
]
WHOLE_RUNS = ["flux dev", "sd3.5 medium"]
"""One model of each family."""
CUT_MODELS = ["flux dev", "sd3.5 medium"]
"""One model of each family that tensor-parallel ranks can cut."""
CPU = torch.device("cpu")


def make_inputs(model, height, width, text, batch):
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tiny = TINY_MODELS[model]
    latent = draw(batch, tiny.family.latent_channels, height, width)
    # The negative prompt has another length, and a text for every picture.
    return latent, tiny.condition(draw, 1, text), tiny.condition(draw, batch, text + 3)


def guided(world, degrees, models, shapes, dtype):
    """One guided prediction of each model and shape, this rank's part of the batch gathered to the whole."""
    mesh = Mesh(layout_of(degrees))
    return {
        (model, shape): guided_by(TINY_MODELS[model].make_family(shape[0], dtype), mesh, model, shape)
        for model, shape in product(models, shapes)
    }


def guided_by_part(world, layout, paths, dtype):
    """Two guided predictions of each model and shape, of which the second finds what the first left behind."""
    mesh, answers = Mesh(layout), {}
    for (model, shape), path in paths.items():
        transformer = Transformer(path, CPU, dtype, Part.of(layout, mesh))
        guided_by(transformer.on(mesh), mesh, model, shape)
        answers[model, shape] = guided_by(transformer.on(mesh), mesh, model, shape)
    return answers


def guided_by(family, mesh, model, shape):
    _, height, width, text, batch = shape
    latent, *conditions = make_inputs(model, height, width, text, batch)
    counts = split_sizes(batch, mesh.data.size)
    own = slice(sum(counts[: mesh.data.rank]), sum(counts[: mesh.data.rank + 1]))
    attention = AttentionCore(mesh.ulysses, mesh.ring, KERNELS["sdpa"])
    predict = SequenceParallel(family, mesh.sequence, attention).predict
    positive, negative = (condition.part(own, batch) for condition in conditions)
    guide = Guidance(predict, family.model_sampling(None), mesh.cfg, positive, negative, CFG)
    denoised = guide.denoised(latent[own], torch.tensor(TINY_MODELS[model].sigma))
    return mesh.data.all_gather(denoised, counts, dim=0)


def layout_of(degrees) -> Layout:
    ulysses, ring, cfg, data = degrees
    return Layout(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg, data_degree=data)


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
                transformer = tiny.make(heads)
                yes, no = (tiny.denoise(transformer, latent, condition) for condition in (positive, negative))
            answers[model, shape] = no + CFG * (yes - no)
        return answers[model, shape]

    return of


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda degrees: "ulysses{}-ring{}-cfg{}-data{}".format(*degrees))
def test_layout_equals_plain_diffusers(ranks, figures, expected, degrees):
    layout = layout_of(degrees)
    for answers in ranks.run(layout.ranks, guided, degrees, list(TINY_MODELS), SHAPES, torch.float32):
        for (model, shape), answer in answers.items():
            error = relative_error(answer, expected(model, shape))
            figures.note(f"{layout.ranks} | {layout}", TINY_MODELS[model].family.name, error)
            assert error <= 1e-5, (model, shape)


@pytest.mark.parametrize("degrees", [(2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 2, 1)], ids=str)
def test_layout_in_bf16_stays_within_its_rounding(ranks, degrees):
    cases = list(TINY_MODELS), SHAPES[:1]
    (alone,) = ranks.run(1, guided, (1, 1, 1, 1), *cases, torch.bfloat16)
    (exact,) = ranks.run(1, guided, (1, 1, 1, 1), *cases, torch.float32)
    answers = ranks.run(layout_of(degrees).ranks, guided, degrees, *cases, torch.bfloat16)[0]
    for case, answer in answers.items():
        assert relative_error(answer, exact[case]) <= 2 * relative_error(alone[case], exact[case]), case


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Where each model that can be cut is saved, with the heads of each shape: ranks read their parts from there."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for model, shape in product(CUT_MODELS, SHAPES):
        found[model, shape] = folder / f"{model} {shape[0]}"
        TINY_MODELS[model].make(shape[0]).save_pretrained(found[model, shape])
    return found


@pytest.mark.parametrize("layout", SPREAD, ids=str)
def test_parts_of_a_model_equal_plain_diffusers(ranks, figures, expected, paths, layout):
    for answers in ranks.run(layout.ranks, guided_by_part, layout, paths, "auto"):
        for (model, shape), answer in answers.items():
            error = relative_error(answer, expected(model, shape))
            figures.note(f"{layout.ranks} | {layout}", TINY_MODELS[model].family.name, error)
            assert error <= 1e-5, (model, shape)


@pytest.mark.parametrize("layout", [SPREAD[0], SPREAD[9], SPREAD[-3]], ids=str)
def test_parts_of_a_model_in_bf16_stay_within_its_rounding(ranks, paths, layout):
    cases = CUT_MODELS, SHAPES[:1]
    (alone,) = ranks.run(1, guided, (1, 1, 1, 1), *cases, torch.bfloat16)
    (exact,) = ranks.run(1, guided, (1, 1, 1, 1), *cases, torch.float32)
    paths = {case: path for case, path in paths.items() if case in alone}
    for case, answer in ranks.run(layout.ranks, guided_by_part, layout, paths, "bf16")[0].items():
        assert relative_error(answer, exact[case]) <= 2 * relative_error(alone[case], exact[case]), case


class QuietRun:
    """A run that nobody watches."""

    def progress(self, *args):
        pass

    def log(self, *args):
        pass

    def check_cancelled(self):
        pass


def sampled(world, degrees, model, sampler, batch_index, masked, spoilt=False):
    heads, height, width, text, batch = SHAPES[0]
    family = TINY_MODELS[model].make_family(heads)
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
    if spoilt:
        tensors["negative.0.tokens"][0] = torch.nan
    if masked:
        tensors["noise_mask"] = torch.linspace(0, 1, batch * 16 * 16).view(batch, 1, 16, 16).round()
    return sample(request, tensors, family, Mesh(request.layout), QuietRun())


@pytest.mark.parametrize("model", WHOLE_RUNS)
@pytest.mark.parametrize(
    ("degrees", "sampler", "batch_index", "masked"),
    [
        ((2, 1, 1, 1), "euler", None, False),
        ((1, 2, 2, 1), "dpmpp_2m", None, True),
        ((1, 1, 1, 2), "euler_ancestral", None, True),
        ((1, 1, 2, 2), "dpmpp_2m_sde", (3, 1, 1, 0), False),
        ((2, 1, 2, 2), "ddim", None, True),
    ],
    ids=str,
)
def test_whole_run_equals_one_rank(ranks, model, degrees, sampler, batch_index, masked):
    (alone,) = ranks.run(1, sampled, (1, 1, 1, 1), model, sampler, batch_index, masked)
    for answer in ranks.run(layout_of(degrees).ranks, sampled, degrees, model, sampler, batch_index, masked):
        assert relative_error(answer, alone) <= 1e-5


def failure_of_run(world, degrees):
    try:
        sampled(world, degrees, "flux dev", "euler", None, False, spoilt=True)
    except UserError as error:
        return str(error)


def test_prediction_that_breaks_on_one_replica_stops_all_alike(ranks):
    failures = ranks.run(2, failure_of_run, (1, 1, 1, 2))
    assert len(set(failures)) == 1
    assert "step 1 of 4" in failures[0]
