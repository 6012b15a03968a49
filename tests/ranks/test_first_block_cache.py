"""The first-block cache decides alike on all ranks, and does what a serial model of its rule does."""

from unittest import mock

import pytest
import torch
from paralleldit.parallel_backend.distributed.control_group import ControlGroup
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine import sample
from paralleldit.parallel_backend.engine.model import Transformer
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.blocks import run_blocks
from paralleldit.parallel_backend.layout.fitting import RunFacts, check_layout
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.model_part import ModelPart
from paralleldit.parallel_backend.protocol.messages import Log, StepCache
from paralleldit.parallel_backend.run_context import Run
from paralleldit.parallel_backend.strategies import sequence
from paralleldit.tests.covering import covering, pairs_of
from paralleldit.tests.ranks.stale_families import HEADS, relative_error, request_of
from paralleldit.tests.tiny_models import CPU, TINY_MODELS

STEPS = 8
MODELS = ["flux dev", "sd3.5 medium", "pixart alpha", "hunyuandit 1.2", "wan 2.1", "z-image"]
LAYOUTS = [
    Layout(),
    Layout(ulysses_degree=2),
    Layout(ring_degree=2),
    Layout(cfg_degree=2),
    Layout(data_degree=2),
    Layout(tensor_degree=2),
    Layout(ulysses_degree=2, cfg_degree=2, weights="sharded"),
    Layout(tensor_degree=2, data_degree=2, weights="offloaded"),
]
CASES = covering([(model, layout) for model in MODELS for layout in LAYOUTS], lambda case: pairs_of(case[1], case[0]))
EVERY_OTHER = StepCache(threshold=10.0, max_skips=1)
BY_CHANGE = StepCache(threshold=0.4)


def cached(world, model, layout, cache, path=None):
    """The latent of a run of `request_of`, and what the cache reports."""
    tiny, mesh, said = TINY_MODELS[model], Mesh(layout), []
    request, tensors = request_of(model, layout)
    schedule = request.schedule.model_copy(update={"steps": STEPS})
    request = request.model_copy(update={"cache": cache, "schedule": schedule})
    run = Run(ControlGroup(), request.id, lambda event, _: said.append(event))
    family = (
        tiny.make_family(HEADS) if path is None else Transformer(path, CPU, part=ModelPart.of(layout, mesh)).on(mesh)
    )
    latent = sample.sample(request, tensors, family, mesh, run)["latent"]
    return latent, [event.text for event in said if isinstance(event, Log)]


def serially(world, model):
    """Every other evaluation of a prompt adds to its first block what the others added in the one before."""
    kept = {}

    def every_other(family, state, blocks, *, policy, residuals):
        first = blocks[0](state)
        prompt = text_of(first)
        if (added := kept.pop(prompt, None)) is not None:
            return first.with_streams(**{name: first[name] + more for name, more in added.items()})
        last = run_blocks(family, first, blocks[1:], policy=sample.COMPUTE_ALL, first=1)
        kept[prompt] = {name: last[name] - first[name] for name in last.streams}
        return last

    turns = [0]

    def text_of(_):
        turns[0] += 1
        return turns[0] % 2  # The positive prompt and the negative one take turns.

    with mock.patch.object(sequence, "run_blocks", every_other):
        return cached(world, model, Layout(), None)[0]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for model in MODELS:
        TINY_MODELS[model].make_family(HEADS).transformer.save_pretrained(folder / model)
    return {model: folder / model for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_a_threshold_of_zero_changes_no_bit(ranks, model):
    ((plain, _),) = ranks.run(1, cached, model, Layout(), None)
    ((latent, said),) = ranks.run(1, cached, model, Layout(), StepCache(threshold=0.0))
    assert torch.equal(latent, plain)
    assert said == [f"Step cache: {2 * STEPS} of {2 * STEPS} evaluations were computed in full."]


@pytest.mark.parametrize(("model", "layout"), CASES, ids=str)
def test_every_layout_skips_what_a_serial_model_of_the_rule_skips(ranks, paths, model, layout):
    (expected,) = ranks.once(1, serially, model)
    ((plain, _),) = ranks.once(1, cached, model, Layout(), None)
    assert relative_error(expected, plain) > 1e-4, "what is skipped must matter"
    for latent, _ in ranks.run(layout.ranks, cached, model, layout, EVERY_OTHER, paths[model]):
        assert relative_error(latent, expected) <= 1e-5


ALIKE = [layout for layout in LAYOUTS[1:] if layout.cfg_degree == 1 or layout.weights == "whole"]
"""Where each prompt decides for itself, as on one rank: otherwise ranks of both prompts gather weights together."""


@pytest.mark.parametrize("layout", [*ALIKE, Layout(ulysses_degree=2, weights="sharded")], ids=str)
def test_ranks_decide_by_the_change_of_all_tokens(ranks, paths, layout):
    model = "sd3.5 medium"
    ((expected, (said,)),) = ranks.once(1, cached, model, Layout(), BY_CHANGE)
    whole = int(said.split()[2])
    assert 2 < whole < 2 * STEPS, "some are skipped, and some are not"
    for latent, _ in ranks.run(layout.ranks, cached, model, layout, BY_CHANGE, paths[model]):
        assert relative_error(latent, expected) <= 1e-5


def test_distrifusion_with_a_cache_is_what_it_is_without_where_nothing_is_skipped(ranks):
    layout = Layout(distrifusion_degree=2)
    plain = ranks.run(2, cached, "flux dev", layout, None)
    for (latent, _), (expected, _) in zip(
        ranks.run(2, cached, "flux dev", layout, StepCache(threshold=0.0)), plain, strict=True
    ):
        assert torch.equal(latent, expected)


def test_pipefusion_is_refused_with_a_cache():
    with pytest.raises(UserError, match=r"A step cache .* pipefusion_degree=2"):
        check_layout(Layout(pipefusion_degree=2), RunFacts(ranks=2, has_cache=True))
