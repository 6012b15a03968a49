"""A layout that does not fit is refused before anything is loaded; and layouts that ran leave little behind."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from paralleldit.parallel_backend.distributed.control_group import ControlGroup
from paralleldit.parallel_backend.engine import checks, model
from paralleldit.parallel_backend.engine.engine import Engine
from paralleldit.parallel_backend.engine.meshes import MOST
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout.fitting import layouts_that_fit
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.rules import RunFacts
from paralleldit.parallel_backend.protocol.messages import ModelRef, Predict, RunPrompt
from paralleldit.parallel_backend.run_context import Run
from paralleldit.tests.ranks.stale_flux import HEADS, request_of, run_of
from paralleldit.tests.tiny_models import CPU, TINY_MODELS

LAYOUTS = 30


@pytest.fixture
def folder(tmp_path):
    TINY_MODELS["flux dev"].make(HEADS).save_pretrained(tmp_path)
    return tmp_path


def asked(kind, folder, layout, sampler="euler"):
    request, tensors = request_of(layout, 1, (8, 8), sampler)
    request = request.model_copy(update={"model": ModelRef(path=str(folder))})
    if kind == "Sample":
        return request, tensors
    key = "a" * 32
    prompts = {name.replace("positive", key): each for name, each in tensors.items() if name.startswith("positive")}
    request = Predict(
        id=1, model=request.model, layout=layout, run="c" * 32, conditions=(key,), run_conditions={key: RunPrompt()}
    )
    return request, {"latent": tensors["latent"], "timestep": torch.full((2,), 0.7), **prompts}


def refusal(world, kind, folder, layout, sampler):
    """The error of a request, how often a model was loaded, and how many groups of ranks were made."""
    engine = Engine(CPU)
    request, tensors = asked(kind, folder, layout, sampler)
    with mock.patch.object(model, "load_transformer", wraps=model.load_transformer) as loads:
        try:
            engine.handle(request, tensors, run_of(request)[0])
        except UserError as error:
            return str(error), loads.call_count, len(engine._meshes._held)
    return "", loads.call_count, len(engine._meshes._held)


@pytest.mark.parametrize(
    ("kind", "layout", "sampler", "words"),
    [
        ("Predict", Layout(pipefusion_degree=2), "euler", "pipefusion_degree=2 goes on from the step before"),
        ("Predict", Layout(distrifusion_degree=2), "euler", "distrifusion_degree=2 goes on from the step before"),
        ("Predict", Layout(ulysses_degree=3), "euler", "multiply to 3"),
        ("Sample", Layout(ulysses_degree=3), "euler", "multiply to 3"),
        ("Sample", Layout(pipefusion_degree=2, num_patches=5), "euler", "it has 4 rows"),
        ("Sample", Layout(pipefusion_degree=2, stage_blocks=(9, 9)), "euler", "stage_blocks=9,9"),
        ("Sample", Layout(pipefusion_degree=2, attention="yunchang"), "euler", "yunchang keeps no keys"),
        ("Sample", Layout(ulysses_degree=2), "unknown", "Unknown sampler"),
    ],
    ids=str,
)
def test_what_is_refused_loads_nothing(ranks, folder, kind, layout, sampler, words):
    found = ranks.run(2, refusal, kind, folder, layout, sampler)
    assert len(set(found)) == 1
    (message, loads, meshes), *_ = found
    assert words in message
    assert (loads, meshes) == (0, 0)


def asked_once(world, kind, folder):
    """How often one request asks whether its layout fits."""
    request, tensors = asked(kind, folder, Layout(ulysses_degree=2))
    engine = Engine(CPU)
    with mock.patch.object(checks, "check_layout", wraps=checks.check_layout) as asks:
        engine.handle(request, tensors, run_of(request)[0])
    return asks.call_count


@pytest.mark.parametrize("kind", ["Sample", "Predict"])
def test_the_ranks_ask_once_whether_a_layout_fits(ranks, folder, kind):
    assert ranks.run(2, asked_once, kind, folder) == [1, 1]


def run_in_turn(world, folder, layouts):
    """Of each layout: the latent's size, meshes and open files after it. At the end: the layouts with traffic."""
    engine, control, found = Engine(CPU), ControlGroup(), []
    for layout in layouts:
        request, tensors = asked("Sample", folder, layout)
        latent = engine.handle(request, tensors, Run(control, request.id, lambda *_: None))[1]["latent"]
        found.append((float(latent.norm()), len(engine._meshes._held), len(os.listdir("/proc/self/fd"))))
    return found, engine.status()["traffic"]


def test_thirty_layouts_leave_two_meshes(ranks, folder):
    work = RunFacts(ranks=4, batch=2, cfg=3.0, has_negative=True, blocks=3, token_rows=4)
    layouts = [each for each in layouts_that_fit(Layout(), work) if each.is_exact]
    layouts = [*(layouts * LAYOUTS)[: LAYOUTS - 2], Layout(ulysses_degree=4, weights="sharded"), layouts[0]]
    for found, traffic in ranks.run(4, run_in_turn, folder, layouts):
        sizes, meshes, files = zip(*found, strict=True)
        assert max(sizes) / min(sizes) - 1 <= 1e-4
        assert max(meshes) == MOST
        assert max(files[LAYOUTS // 2 :]) <= max(files[: LAYOUTS // 2]) + 8
        assert traffic.keys() == {str(layout.degrees) for layout in layouts}
        assert all(traffic.values())
