"""PipeFusion: exact where nothing is old, else equal to a serial model of stale keys and values (stale_flux.py)."""

from math import prod
from unittest import mock

import pytest
import torch
from diffusers import FluxTransformer2DModel
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine import sample
from paralleldit.parallel_backend.engine.engine import Engine
from paralleldit.parallel_backend.engine.model import Transformer
from paralleldit.parallel_backend.errors import Cancelled, UserError
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.model_part import ModelPart
from paralleldit.parallel_backend.layout.stages import Stage
from paralleldit.parallel_backend.protocol import messages
from paralleldit.parallel_backend.strategies import select
from paralleldit.tests.ranks.matrix import EXACT as EXACTLY
from paralleldit.tests.ranks.matrix import LATE, cell
from paralleldit.tests.ranks.stale_flux import StaleModel, make_family, relative_error, request_of, run_of, sampled
from paralleldit.tests.tiny_models import CPU

EXACT = [
    # pipefusion, ulysses, ring, cfg, data; patches, warm-up, steps; latent height and width; sampler
    ((2, 1, 1, 1, 1), (0, 3, 3), (8, 8), "euler"),
    ((3, 1, 1, 1, 1), (5, 4, 3), (11, 9), "dpmpp_2m"),
    ((4, 1, 1, 1, 1), (1, 1, 4), (11, 9), "euler_ancestral"),
    ((2, 2, 1, 1, 1), (3, 3, 3), (11, 9), "euler"),
    ((2, 1, 2, 1, 1), (1, 1, 3), (8, 8), "heun"),
    ((2, 1, 1, 2, 1), (3, 3, 3), (8, 8), "dpmpp_2m"),
    ((2, 1, 1, 1, 2), (1, 1, 3), (8, 8), "euler_ancestral"),
    ((2, 1, 1, 2, 1), (3, 3, 3), (8, 8), "res_multistep_ancestral_cfg_pp"),
    ((2, 1, 1, 1, 1), (4, 3, 3), (8, 8), "seeds_3"),
    ((2, 2, 2, 1, 1), (3, 4, 3), (11, 9), "euler"),
]
STALE = [
    ((2, 1, 1, 1, 1), (2, 1, 4), (8, 8), "euler"),
    ((2, 1, 1, 1, 1), (0, 1, 4), (11, 9), "dpmpp_2m"),
    ((3, 1, 1, 1, 1), (3, 2, 5), (11, 9), "euler_ancestral"),
    ((4, 1, 1, 1, 1), (6, 1, 4), (12, 6), "dpmpp_2m_sde"),
    ((2, 1, 1, 1, 1), (3, 1, 3), (8, 8), "heun"),
    ((2, 1, 1, 1, 1), (3, 1, 4), (8, 8), "dpmpp_2m_cfg_pp"),
    ((2, 2, 1, 1, 1), (2, 1, 4), (11, 9), "euler"),
    ((2, 3, 1, 1, 1), (4, 1, 4), (11, 9), "euler"),
    ((2, 1, 2, 1, 1), (3, 1, 4), (11, 9), "euler"),
    ((2, 2, 2, 1, 1), (3, 1, 4), (11, 3), "dpmpp_2m"),
    ((2, 1, 1, 2, 1), (3, 1, 4), (11, 9), "euler_ancestral"),
    ((2, 1, 1, 1, 2), (2, 1, 4), (8, 8), "euler_ancestral"),
    ((2, 1, 1, 2, 2), (4, 2, 4), (8, 8), "ddim"),
    ((2, 1, 1, 1, 1), (4, 0, 4), (11, 9), "euler"),
    ((2, 2, 1, 1, 1), (3, 0, 3), (11, 9), "heun"),
    ((2, 1, 2, 1, 1), (3, 0, 3), (11, 9), "euler"),
    ((2, 2, 2, 1, 1), (3, 0, 3), (11, 3), "dpmpp_2m"),
]
CHOSEN_STAGES = [
    # stages, of so many blocks; patches, warm-up, steps
    (2, (1, 3), (3, 1, 4)),
    (3, (1, 2, 1), (4, 0, 3)),
    (3, "even", (3, 1, 3)),
]
LONG = 6
"""Steps of a run that is left before its end."""


def by_ranks(cases):
    """Runs of as many ranks follow each other, which then need not meet anew."""
    return sorted(cases, key=lambda case: prod(case[0]))


def layout_of(degrees, patches=0, warmup=1) -> Layout:
    pipefusion, ulysses, ring, cfg, data = degrees
    return Layout(
        pipefusion_degree=pipefusion,
        ulysses_degree=ulysses,
        ring_degree=ring,
        cfg_degree=cfg,
        data_degree=data,
        num_patches=patches,
        warmup_steps=warmup,
    )


def sampled_with_stale_model(world, patches, warmup, steps, size, sampler):
    class Model(StaleModel):
        pass

    Model.patches, Model.warmup_evaluations = patches, warmup * (2 if sampler == "heun" else 1)
    with mock.patch.object(select, "SequenceParallel", Model):
        return sampled(world, Layout(), steps, size, sampler)


@pytest.mark.parametrize(("degrees", "plan", "size", "sampler"), by_ranks(EXACT), ids=str)
def test_run_without_old_keys_equals_one_rank(ranks, figures, degrees, plan, size, sampler):
    patches, warmup, steps = plan
    layout = layout_of(degrees, patches, warmup)
    (alone,) = ranks.once(1, sampled, Layout(), steps, size, sampler)
    for answer in ranks.run(layout.ranks, sampled, layout, steps, size, sampler):
        error = relative_error(answer, alone)
        figures.note(EXACTLY, layout, "flux", error)
        assert error <= 1e-5


@pytest.mark.parametrize(("degrees", "plan", "size", "sampler"), by_ranks(STALE), ids=str)
def test_run_equals_serial_model_of_old_keys(ranks, figures, degrees, plan, size, sampler):
    patches, warmup, steps = plan
    layout = layout_of(degrees, patches, warmup)
    patches = patches or 2 * layout.pipefusion_degree
    (alone,) = ranks.once(1, sampled, Layout(), steps, size, sampler)
    (expected,) = ranks.once(1, sampled_with_stale_model, patches, warmup, steps, size, sampler)
    assert relative_error(expected, alone) > 1e-4, "the case must be able to tell old keys from fresh ones"
    for answer in ranks.run(layout.ranks, sampled, layout, steps, size, sampler):
        error = relative_error(answer, expected)
        figures.note(LATE, layout, "flux", error)
        assert error <= 1e-5


PARTS = [
    # layout, steps
    (Layout(tensor_degree=2, pipefusion_degree=2, num_patches=3, warmup_steps=3), 3),
    (Layout(tensor_degree=3, pipefusion_degree=2, num_patches=1), 3),
    (Layout(tensor_degree=2, ulysses_degree=2, pipefusion_degree=2, num_patches=3), 4),
    (Layout(tensor_degree=2, pipefusion_degree=2, cfg_degree=2, num_patches=4), 4),
    (Layout(ulysses_degree=2, pipefusion_degree=3, num_patches=1, weights="sharded"), 3),
    (Layout(ulysses_degree=2, pipefusion_degree=2, num_patches=3, weights="sharded"), 4),
    (Layout(pipefusion_degree=2, num_patches=2, weights="offloaded"), 4),
]


def has_nothing_old(layout, steps) -> bool:
    return layout.num_patches == 1 or layout.warmup_steps >= steps


def cells():
    """What the tests of this module note."""
    for table, cases in ((EXACTLY, EXACT), (LATE, STALE)):
        for degrees, *_ in cases:
            yield cell(table, layout_of(degrees), "flux")
    for layout, steps in PARTS:
        yield cell(EXACTLY if has_nothing_old(layout, steps) else LATE, layout, "flux")


def sampled_by_part(world, layout, path, steps):
    request, tensors = request_of(layout, steps, (11, 9), "euler")
    mesh = Mesh(layout)
    family = Transformer(path, CPU, part=ModelPart.of(layout, mesh)).on(mesh)
    return sample.sample(request, tensors, family, mesh, run_of(request)[0])["latent"]


@pytest.mark.parametrize(("layout", "steps"), PARTS, ids=str)
def test_stages_of_parts_equal_whole_stages(ranks, figures, tmp_path, layout, steps):
    make_family().transformer.save_pretrained(tmp_path)
    is_exact = has_nothing_old(layout, steps)
    reference = (sampled, Layout()) if is_exact else (sampled_with_stale_model, layout.num_patches, layout.warmup_steps)
    (expected,) = ranks.once(1, *reference, steps, (11, 9), "euler")
    for answer in ranks.run(layout.ranks, sampled_by_part, layout, tmp_path, steps):
        error = relative_error(answer, expected)
        figures.note(EXACTLY if is_exact else LATE, layout, "flux", error)
        assert error <= 1e-5


@pytest.mark.parametrize(("stages", "blocks", "plan"), CHOSEN_STAGES, ids=str)
def test_stages_of_chosen_sizes_give_what_those_of_the_default_give(ranks, stages, blocks, plan):
    patches, warmup, steps = plan
    usual = layout_of((stages, 1, 1, 1, 1), patches, warmup)
    expected = ranks.run(usual.ranks, sampled, usual, steps, (11, 9), "euler")[0]
    chosen = usual.model_copy(update={"stage_blocks": blocks})
    for answer in ranks.run(usual.ranks, sampled, chosen, steps, (11, 9), "euler"):
        assert relative_error(answer, expected) <= 1e-6


PIPELINES = [
    layout_of((2, 1, 1, 1, 1), 3, 1),
    layout_of((3, 1, 1, 1, 1), 3, 1),
    layout_of((2, 2, 1, 1, 2), 4, 1),
    layout_of((2, 1, 1, 2, 1), 1, 1),
]


def told(world, layout, steps):
    """The progress that the client of rank 0 hears of, with the shapes of the previews, and the latent."""
    request, tensors = request_of(layout, steps, (8, 8), "heun", preview=True)
    run, events = run_of(request)
    latent = sample.sample(request, tensors, make_family(), Mesh(layout), run)["latent"]
    steps = [(event, tensors["preview"]) for event, tensors in events if isinstance(event, messages.Progress)]
    return [(event.step, event.total, preview) for event, preview in steps], latent


@pytest.mark.parametrize("layout", PIPELINES, ids=str)
def test_every_step_is_told_with_its_preview(ranks, layout):
    exact = layout.model_copy(update={"warmup_steps": 4})
    ((alone, _),) = ranks.once(1, told, Layout(), 4)
    (piped, latent), *others = ranks.run(layout.ranks, told, exact, 4)
    assert [event[:2] for event in piped] == [event[:2] for event in alone]
    for (*_, preview), (*_, expected) in zip(piped[:-1], alone, strict=False):
        assert relative_error(preview, expected) <= 1e-5
    assert torch.equal(piped[-1][2], latent[:1])
    assert not any(events for events, _ in others)


def left_and_again(world, layout, cancel_at, spoilt):
    """How a run was left, after which step, and what the next one on the same mesh gives."""
    family, mesh = make_family(), Mesh(layout)
    request, tensors = request_of(layout, LONG, (8, 8), "euler")
    kept = tensors["negative.0.tokens"].clone()
    if spoilt:
        tensors["negative.0.tokens"][1] = torch.nan
    run, events = run_of(request, cancel_at=cancel_at)
    reason = None
    try:
        sample.sample(request, tensors, family, mesh, run)
    except (Cancelled, UserError) as error:
        reason = str(error)
    last = max((event.step for event, _ in events), default=0)
    tensors["negative.0.tokens"] = kept
    return reason, last, sample.sample(request, tensors, family, mesh, run_of(request)[0])["latent"]


@pytest.mark.parametrize(
    ("cancel_at", "spoilt", "reason"),
    [(3, False, "Cancelled."), (None, True, f"not finite at step 1 of {LONG}")],
    ids=str,
)
@pytest.mark.parametrize("layout", PIPELINES, ids=str)
def test_run_is_left_by_all_ranks_and_the_next_one_is_right(ranks, layout, cancel_at, spoilt, reason):
    expected = ranks.once(layout.ranks, sampled, layout, LONG, (8, 8), "euler")[0]
    answers = ranks.run(layout.ranks, left_and_again, layout, cancel_at, spoilt)
    assert len({left for left, _, _ in answers}) == 1
    assert reason in answers[0][0]
    assert answers[0][1] <= (cancel_at or 0) + 2
    for *_, latent in answers:
        assert torch.equal(latent, expected)


def failed_and_again(world, layout, failing_rank):
    """As `left_and_again`, where a block of one rank fails after the first step."""
    family, mesh = make_family(), Mesh(layout)
    request, tensors = request_of(layout, LONG, (8, 8), "euler")
    run, events = run_of(request)
    parts = layout.num_patches * (2 if layout.cfg_degree == 1 else 1)
    calls, blocks = iter(range(1000)), family.blocks

    def failing(state):
        if next(calls) == parts:
            raise ValueError("a block fails")
        return blocks[-1](state)

    own = Stage(mesh.pipefusion.rank, mesh.pipefusion.size).blocks(family.block_parameters)
    if world.rank == failing_rank:
        family.blocks = [*blocks[: own.stop - 1], failing, *blocks[own.stop :]]
    reason = None
    try:
        sample.sample(request, tensors, family, mesh, run)
    except UserError as error:
        reason = str(error)
    finally:
        family.blocks = blocks
    last = max((event.step for event, _ in events), default=0)
    return reason, last, sample.sample(request, tensors, family, mesh, run_of(request)[0])["latent"]


@pytest.mark.parametrize(
    ("layout", "failing_rank"),
    [
        (layout_of((2, 1, 1, 1, 1), 3, 1), 0),
        (layout_of((3, 1, 1, 1, 1), 3, 1), 1),
        (layout_of((2, 1, 1, 2, 1), 2, 1), 3),
        (layout_of((2, 1, 1, 1, 2), 2, 1), 2),
    ],
    ids=str,
)
def test_stage_that_fails_alone_is_named_by_all_ranks_and_the_next_run_is_right(ranks, layout, failing_rank):
    expected = ranks.once(layout.ranks, sampled, layout, LONG, (8, 8), "euler")[0]
    answers = ranks.run(layout.ranks, failed_and_again, layout, failing_rank)
    (reason,) = {reason for reason, _, _ in answers}
    assert f"Rank {failing_rank} failed: ValueError: a block fails Raised in test_pipefusion.py" in reason
    assert answers[0][1] <= 4
    for *_, latent in answers:
        assert torch.equal(latent, expected)


def engine_sampled(world, layout, folder, engine=None, weight_dtype="auto"):
    """What an engine samples with the weights of a folder, and how many parameters it holds for that."""
    engine = engine or Engine(CPU)
    request, tensors = request_of(layout, 3, (8, 8), "dpmpp_2m")
    request = request.model_copy(update={"model": messages.ModelRef(path=folder, weight_dtype=weight_dtype)})
    generator = torch.Generator().manual_seed(6)
    for name in list(tensors):
        width = {"tokens": 48, "pooled": 32}.get(name.rpartition(".")[2])
        if width:
            tensors[name] = torch.randn(*tensors[name].shape[:-1], width, generator=generator)
    _, answer = engine.handle(request, tensors, run_of(request)[0])
    newest, *_ = engine.models.summary()
    return answer["latent"], newest["bytes"]


def test_ranks_load_the_weights_of_their_stage(ranks, tmp_path):
    from paralleldit.tests.tiny_flux import write_pipeline  # the ranks load this module too, and need no transformers

    write_pipeline(tmp_path)
    ((alone, whole),) = ranks.run(1, engine_sampled, Layout(), str(tmp_path))
    answers = ranks.run(2, engine_sampled, layout_of((2, 1, 1, 1, 1), 1, 1), str(tmp_path))
    for latent, held in answers:
        assert relative_error(latent, alone) <= 1e-5
        assert held < whole
    blocks = block_bytes(tmp_path)
    everywhere = whole - sum(blocks)
    # A double block holds more than two single ones.
    assert [held - everywhere for _, held in answers] == [blocks[0], sum(blocks[1:])]


FOUR_RANKS = [
    Layout(ulysses_degree=2, cfg_degree=2, weights="sharded"),
    Layout(ulysses_degree=2, pipefusion_degree=2, num_patches=1, weights="sharded"),
    # Some ranks have the same part of the model here as there, others not.
    Layout(cfg_degree=2, pipefusion_degree=2, num_patches=1, weights="sharded"),
    Layout(tensor_degree=2, ulysses_degree=2),
    Layout(tensor_degree=2, cfg_degree=2),
    Layout(tensor_degree=2, data_degree=2, weights="offloaded"),
]


def engine_sampled_in_turn(world, layouts, folder):
    """As `engine_sampled`, by one engine that has another model too."""
    engine = Engine(CPU)
    engine_sampled(world, layouts[0], folder, engine, "bf16")
    return [engine_sampled(world, layout, folder, engine) for layout in layouts]


def test_an_engine_goes_from_one_part_of_a_model_to_another(ranks, tmp_path):
    from paralleldit.tests.tiny_flux import write_pipeline

    write_pipeline(tmp_path)
    ((alone, whole),) = ranks.run(1, engine_sampled, Layout(), str(tmp_path))
    for answers in ranks.run(4, engine_sampled_in_turn, FOUR_RANKS, str(tmp_path)):
        for latent, _ in answers:
            assert relative_error(latent, alone) <= 1e-5
        assert all(
            held < whole for (_, held), layout in zip(answers, FOUR_RANKS, strict=True) if layout.tensor_degree > 1
        )


def block_bytes(folder) -> list[int]:
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    return [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]


def warned(world, layout, steps):
    request, tensors = request_of(layout, steps, (8, 8), "euler")
    run, events = run_of(request)
    sample.sample(request, tensors, make_family(), Mesh(layout), run)
    return [event.text for event, _ in events if isinstance(event, messages.Log)]


@pytest.mark.parametrize(("warmup", "steps", "warnings"), [(3, 3, 1), (2, 3, 0)])
@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ({"pipefusion_degree": 2, "num_patches": 2}, "2 stages work one after the other"),
        ({"distrifusion_degree": 2}, "2 ranks wait for each other"),
    ],
    ids=["pipefusion", "distrifusion"],
)
def test_run_of_warmup_alone_says_so(ranks, method, loss, warmup, steps, warnings):
    texts = ranks.run(2, warned, Layout(**method, warmup_steps=warmup), steps)[0]
    assert len(texts) == warnings
    assert all("warmup_steps=3" in text and "3 steps" in text and loss in text for text in texts)
