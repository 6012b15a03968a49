"""A real sidecar of one rank on a CUDA device (NCCL, a world of one): it samples, it cancels, it gives memory back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from paralleldit.launcher.lifecycle import ensure_sidecar, stop
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.parallel_backend.errors import Cancelled
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.ranks import stale_flux
from paralleldit.tests.tiny_flux import CLIP_WIDTH, T5_WIDTH, write_pipeline
from PIL import Image

pytestmark = pytest.mark.gpu

PACK = Path(__file__).resolve().parents[2]
WORKFLOW = PACK / "workflows" / "api" / "demo_txt2img.api.json"
NAME = "diffusers/tiny"
SET = (f"2.model={NAME}", f"Positive.text_encoders={NAME}", f"Negative.text_encoders={NAME}", f"7.vae={NAME}")
SMALL = ("1.ranks=1", "2.weight_dtype=fp32", "6.steps=3", "6.seed=42", "5.width=64", "5.height=48")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("sidecar")
    write_pipeline(place / "models" / "diffusers" / "tiny")
    return place


def start_demo(place: Path, kind: str) -> subprocess.Popen[str]:
    """The demo workflow with a tiny model, from the command line, on a sidecar of one rank of that kind."""
    values = [option for value in (*SET, *SMALL) for option in ("--set", value)]
    options = (f"--device={kind}", "--models=models", f"--output={kind}")
    return subprocess.Popen(
        [sys.executable, PACK / "cli", "run", WORKFLOW, *options, *values],
        cwd=place,
        env=os.environ | {"PARALLELDIT_RUNTIME_DIR": str(place / f"runtime-{kind}"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(place: Path, kind: str, *arguments: str) -> str:
    env = os.environ | {"PARALLELDIT_RUNTIME_DIR": str(place / f"runtime-{kind}")}
    return subprocess.run(
        [sys.executable, PACK / "cli", *arguments], env=env, capture_output=True, text=True, timeout=60, check=True
    ).stdout


@pytest.fixture(scope="module")
def kind(device, place):
    """The sidecars' kind of device. They end with this module."""
    kind = torch.device(device).type
    yield kind
    for each in {kind, "cpu"}:
        stop(SidecarSpec(directory=place / f"runtime-{each}").slot)


@pytest.fixture
def client(kind, place):
    spec = SidecarSpec(ranks=1, device=kind, directory=place / f"runtime-{kind}")
    return ensure_sidecar(spec, owned=False)


def test_the_demo_workflow_makes_the_picture_that_a_cpu_rank_makes(place, kind):
    running = {each: start_demo(place, each) for each in dict.fromkeys((kind, "cpu"))}
    for each, process in running.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert f"1 on {each}" in out
    pictures = []
    for each in (kind, "cpu"):
        with Image.open(place / each / "paralleldit_demo_00001_.png") as image:
            pictures.append(np.array(image).astype(int))
    assert pictures[0].std() > 1
    # On a GPU the text encoders and the VAE compute in bf16.
    assert np.abs(pictures[0] - pictures[1]).mean() <= 2


def test_a_run_is_cancelled_and_the_next_one_works(client, place):
    model = messages.ModelRef(path=str(place / "models" / NAME))
    request, tensors = request_of(model, steps=200)
    begun = threading.Event()
    steps: list[int] = []

    def heard(event, body):
        if isinstance(event, messages.Progress) and event.phase == "sample":
            steps.append(event.step)
            begun.set()

    with pytest.raises(Cancelled):
        client.request(request, tensors, on_event=heard, cancelled=begun.is_set)
    assert len(steps) < 200
    request, tensors = request_of(model, steps=3)
    result, answer = client.request(request, tensors)
    assert result.data["layout"] == "one rank"
    assert torch.isfinite(answer["latent"]).all()


def request_of(model, steps):
    request, tensors = stale_flux.request_of(Layout(), steps, (8, 8), "euler")
    tensors = {name: tensor for name, tensor in tensors.items() if "." not in name}
    generator = torch.Generator().manual_seed(3)
    for side in ("positive", "negative"):
        tensors[f"{side}.0.tokens"] = torch.randn(1, 5, T5_WIDTH, generator=generator)
        tensors[f"{side}.0.pooled"] = torch.randn(1, CLIP_WIDTH, generator=generator)
    return request.model_copy(update={"model": model}), tensors


def test_status_tells_of_the_device_and_unload_gives_its_memory_back(client, place, kind):
    request, tensors = request_of(messages.ModelRef(path=str(place / "models" / NAME)), steps=2)
    client.request(request, tensors)
    (rank,) = json.loads(command(place, kind, "status", "--json"))["ranks"]
    assert torch.device(rank["device"]).type == kind
    assert rank["models"]
    assert 0 < rank["memory"]["used"] < rank["memory"]["total"]
    result, _ = client.request(messages.Unload(id=0))
    (freed,) = result.data["freed_bytes"]
    assert freed > 0 or kind == "cpu"
    (rank,) = json.loads(command(place, kind, "status", "--json"))["ranks"]
    assert rank["models"] == []
    assert "1 ranks on " + kind in command(place, kind, "status")
