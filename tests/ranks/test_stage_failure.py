"""A rank that fails in the middle of its work: the others leave it within seconds, and the next request is right."""

import time
from pathlib import Path

import pytest
import torch
from paralleldit.launcher import sidecar
from paralleldit.launcher.client import SidecarError
from paralleldit.launcher.sidecar import SidecarSpec, ensure_sidecar
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout import Layout
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.tiny_flux import CLIP_WIDTH, T5_WIDTH, write_pipeline

LEAVES_S = 5.0
WORKS, RAISES, DIES = range(3)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Of a sidecar in which rank 1's stage does what the seed says."""
    directory = tmp_path_factory.mktemp("sidecar")
    spec = SidecarSpec(directory=directory, ranks=2, device="cpu", worker="tests.ranks.faulty_stage")
    yield spec
    sidecar.stop(spec.slot)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model"))


def run(spec, folder, seed):
    """The latent of a pipelined run, and the processes of the ranks that made it."""
    generator = torch.Generator().manual_seed(5)
    request = messages.Sample(
        id=0,
        model=messages.ModelRef(path=str(folder)),
        layout=Layout(pipefusion_degree=2, num_patches=2),
        positive=(messages.Conditioning(),),
        sampler="euler",
        schedule=messages.Schedule(scheduler="simple", steps=8),
        seed=seed,
    )
    tensors = {
        "latent": torch.zeros(1, 16, 8, 8),
        "positive.0.tokens": torch.randn(1, 5, T5_WIDTH, generator=generator),
        "positive.0.pooled": torch.randn(1, CLIP_WIDTH, generator=generator),
    }
    client = ensure_sidecar(spec)
    _, answer = client.request(request, tensors)
    status, _ = client.request(messages.Status(id=0))
    return answer["latent"], [rank["pid"] for rank in status.data["ranks"]]


@pytest.mark.parametrize(
    ("seed", "error", "text", "stays"),
    [
        (RAISES, UserError, "Rank 1 failed: ValueError: this stage was told to fail", True),
        (DIES, SidecarError, r"Rank 1 \(process \d+\) was killed by SIGKILL", False),
    ],
    ids=["raises", "dies"],
)
def test_a_stage_that_fails_is_named_in_time_and_the_next_run_is_right(spec, folder, seed, error, text, stays):
    expected, before = run(spec, folder, WORKS)
    began = time.monotonic()
    with pytest.raises(error, match=text):
        run(spec, folder, seed)
    assert time.monotonic() - began < LEAVES_S
    latent, after = run(spec, folder, WORKS)
    assert torch.equal(latent, expected)
    assert (after == before) == stays


def decode(spec, folder, overlap):
    """The picture, and the processes of the ranks that made it."""
    request = messages.Decode(id=0, vae=messages.VaeRef(path=str(folder)), overlap=overlap)
    client = ensure_sidecar(spec)
    _, answer = client.request(request, {"latent": torch.ones(1, 16, 6, 4)})
    status, _ = client.request(messages.Status(id=0))
    return answer["image"], [rank["pid"] for rank in status.data["ranks"]]


def test_a_rank_that_runs_out_of_memory_is_named_and_all_stay_warm(spec, folder):
    expected, before = decode(spec, folder, WORKS)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"Rank 1 ran out of memory: decode 32 x 48 pixels in bands of rows over 2 ranks"
    ):
        decode(spec, folder, RAISES)
    assert time.monotonic() - began < LEAVES_S
    picture, after = decode(spec, folder, WORKS)
    assert torch.equal(picture, expected)
    assert after == before
