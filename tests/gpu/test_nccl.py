"""A real sidecar of several ranks, each with a GPU of its own (NCCL), gives what CPU ranks give, by every method.

Needs two GPUs; layouts of four ranks need four. On the CPU (PARALLELDIT_GPU_TESTS_ON=cpu) it does the same with gloo.
"""

from __future__ import annotations

import pytest
import torch
from paralleldit.launcher.lifecycle import ensure_sidecar, stop
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.parallel_backend.errors import Cancelled
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.gpu.test_ranks import LAYOUTS, MODELS, TOLERANCE
from paralleldit.tests.ranks.stale_families import HEADS, STEPS, relative_error, request_of
from paralleldit.tests.tiny_models import TINY_MODELS

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def sampled(device, tmp_path_factory):
    """The latent of a request, from ranks of a kind of device; their sidecars end with this module."""
    place = tmp_path_factory.mktemp("nccl")
    for model in MODELS:
        TINY_MODELS[model].make(HEADS).save_pretrained(place / model)
    used: dict[tuple[str, int], SidecarSpec] = {}

    def sample(kind, model, layout, steps=STEPS, **settings):
        spec = SidecarSpec(ranks=layout.ranks, device=kind, directory=place / f"{kind}-{layout.ranks}")
        used[kind, layout.ranks] = spec
        request, tensors = request_of(model, layout, place / model)
        request = request.model_copy(update={"schedule": request.schedule.model_copy(update={"steps": steps})})
        return ensure_sidecar(spec).request(request, tensors, **settings)[1]["latent"]

    yield sample
    for spec in used.values():
        stop(spec.slot)


def kind_for(device: str, ranks: int) -> str:
    kind, found = torch.device(device).type, torch.cuda.device_count()
    if kind == "cuda" and found < ranks:
        pytest.skip(f"needs {ranks} GPUs, there are {found}")
    return kind


@pytest.mark.parametrize("layout", sorted(LAYOUTS, key=lambda layout: layout.ranks), ids=str)
def test_a_run_equals_that_of_cpu_ranks(device, sampled, layout):
    kind = kind_for(device, layout.ranks)
    is_exact = layout.is_exact or layout.warmup_steps >= STEPS
    for model in MODELS:
        expected = sampled("cpu", model, Layout() if is_exact else layout)
        assert relative_error(sampled(kind, model, layout), expected) <= TOLERANCE, model


@pytest.mark.parametrize(
    "layout", [Layout(ulysses_degree=2), Layout(pipefusion_degree=2), Layout(distrifusion_degree=2)], ids=str
)
def test_a_cancelled_run_leaves_the_ranks_ready(device, sampled, layout):
    kind, model = kind_for(device, 2), MODELS[0]
    expected = sampled(kind, model, layout)
    begun = []

    def heard(event, tensors):
        begun.append(isinstance(event, messages.Progress))

    with pytest.raises(Cancelled):
        sampled(kind, model, layout, steps=200, on_event=heard, cancelled=lambda: any(begun))
    assert torch.equal(sampled(kind, model, layout), expected)
