"""A request that lacks something, or brings what does not fit, is refused by all ranks alike: none crashes of it."""

from __future__ import annotations

import pytest
import torch
from paralleldit.parallel_backend.engine.engine import Engine
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.ranks.stale_flux import HEADS, request_of, run_of
from paralleldit.tests.tiny_models import CPU, TINY_MODELS

KEY = "a" * 32
FP8 = torch.float8_e4m3fn
VAE = messages.VaeRef(path="/none")


@pytest.fixture
def folder(tmp_path):
    TINY_MODELS["flux dev"].make(HEADS).save_pretrained(tmp_path)
    return tmp_path


def asked(kind, folder):
    """A request that works."""
    request, tensors = request_of(Layout(ulysses_degree=2), 1, (8, 8), "euler")
    request = request.model_copy(update={"model": messages.ModelRef(path=str(folder))})
    if kind == "sample":
        return request, tensors
    prompts = {name.replace("positive", KEY): each for name, each in tensors.items() if name.startswith("positive")}
    request = messages.Predict(
        id=1,
        model=request.model,
        layout=request.layout,
        run="c" * 32,
        conditions=(KEY,),
        run_conditions={KEY: messages.RunPrompt()},
    )
    return request, {"latent": tensors["latent"], "timestep": torch.full((2,), 0.7), **prompts}


def answer(world, kind, folder, changes, given, missing):
    """The error of the changed request, "" without one, and whether the same ranks then serve the unchanged one."""
    engine = Engine(CPU)
    if isinstance(kind, str):
        request, tensors = asked(kind, folder)
    else:
        request, tensors = kind, {}
    message = ""
    kept = {name: tensor for name, tensor in tensors.items() if name not in missing}
    try:
        engine.handle(request.model_copy(update=changes), kept | given, run_of(request)[0])
    except UserError as error:
        message = str(error)
    request, tensors = asked("sample", folder)
    return message, "latent" in engine.handle(request, tensors, run_of(request)[0])[1]


def schedule(denoise):
    return {"schedule": messages.Schedule(scheduler="simple", steps=2, denoise=denoise)}


@pytest.mark.parametrize(
    ("kind", "changes", "given", "missing", "words"),
    [
        (messages.Decode(id=1, vae=VAE), {}, {}, (), "carries no latent"),
        (messages.EncodeImage(id=1, vae=VAE), {}, {}, (), "carries no image"),
        (messages.KeepChanges(id=1, digests=(KEY,)), {}, {"1.up": torch.ones(2, 2)}, (), "no tensor of a change"),
        (messages.KeepChanges(id=1, digests=(KEY,)), {}, {"x": torch.ones(2, 2)}, (), "no tensor of a change"),
        ("sample", {}, {}, ("latent",), "carries no latent"),
        ("sample", {"schedule": None}, {}, (), "carries no sigmas"),
        ("sample", {}, {}, ("positive.0.tokens",), "does not fit together"),
        ("sample", {}, {"latent": torch.zeros(())}, (), "the latent holds 0"),
        ("sample", {}, {"latent": torch.full((1, 4, 8, 8), float("nan"))}, (), "channels"),
        ("sample", {}, {"positive.0.region": torch.ones(1, 8, 8).to(FP8)}, (), ""),
        ("sample", {}, {"positive.0.region": torch.ones(1, 9, 9)}, (), "The mask of a positive prompt has the shape"),
        ("sample", {}, {"noise_mask": torch.ones(())}, (), "noise_mask of the shape []"),
        ("sample", schedule(1e-30), {}, (), "at most 1000000 are made"),
        ("sample", {"layout": Layout(ulysses_degree=2, stage_blocks=(1,))}, {}, (), "pipefusion_degree=1 makes none"),
        ("sample", {"layout": Layout(ulysses_degree=1024)}, {}, (), "multiply to 1024"),
        ("predict", {}, {}, ("latent",), "carries no latent"),
        ("predict", {}, {}, ("timestep",), "carries no timestep"),
        ("predict", {}, {"timestep": torch.full((2,), float("inf"))}, (), "2 rows for 1 conditions"),
        ("predict", {"residuals": {"input": (0,)}}, {}, (), "residual"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_request_that_does_not_fit_is_refused_alike(ranks, folder, kind, changes, given, missing, words):
    found = ranks.run(2, answer, kind, folder, changes, given, missing)
    assert len(set(found)) == 1
    message, works = found[0]
    assert works
    assert words in message
    assert bool(message) == bool(words)
