"""A rank that fails in the middle of its work: the others leave it within seconds, and the next request is right."""

import time
from pathlib import Path

import pytest
import torch
from paralleldit.launcher import lifecycle
from paralleldit.launcher.client import SidecarError
from paralleldit.launcher.lifecycle import ensure_sidecar
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.tiny_flux import CLIP_WIDTH, T5_WIDTH, write_pipeline

LEAVES_S = 10.0
"""Four ranks on a few cores, which notice one after the other. One that waits in vain ends the sidecar after 30 s."""
WORKS, RAISES, DIES, LACKS_MEMORY = range(4)
RANK = 10
STAYS = "All ranks left the run, and stay ready."


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Of a sidecar in which a rank does what the seed says."""
    directory = tmp_path_factory.mktemp("sidecar")
    spec = SidecarSpec(directory=directory, ranks=4, device="cpu", worker="tests.ranks.faulty_stage")
    yield spec
    lifecycle.stop(spec.slot)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model"))


def run(spec, folder, layout, seed, on_event=None):
    """The latent of a guided run of two pictures, and the processes of the ranks that made it."""
    generator = torch.Generator().manual_seed(5)
    request = messages.Sample(
        id=0,
        model=messages.ModelRef(path=str(folder)),
        layout=layout,
        positive=(messages.Conditioning(),),
        negative=(messages.Conditioning(),),
        cfg=2.0,
        sampler="euler",
        schedule=messages.Schedule(scheduler="simple", steps=4),
        seed=seed,
    )
    tensors = {"latent": torch.zeros(2, 16, 8, 8)}
    for side in ("positive", "negative"):
        tensors[f"{side}.0.tokens"] = torch.randn(1, 5, T5_WIDTH, generator=generator)
        tensors[f"{side}.0.pooled"] = torch.randn(1, CLIP_WIDTH, generator=generator)
    client = ensure_sidecar(spec)
    _, answer = client.request(request, tensors, on_event)
    status, _ = client.request(messages.Status(id=0))
    return answer["latent"], [rank["pid"] for rank in status.data["ranks"]]


PIPED = Layout(cfg_degree=2, pipefusion_degree=2, num_patches=2)


@pytest.mark.parametrize(
    ("layout", "what", "rank"),
    [
        (PIPED, RAISES, 1),
        (Layout(tensor_degree=2, pipefusion_degree=2, num_patches=2), RAISES, 1),
        (Layout(tensor_degree=2, cfg_degree=2, weights="sharded"), LACKS_MEMORY, 3),
        (Layout(distrifusion_degree=2, data_degree=2), RAISES, 0),
        (Layout(ulysses_degree=2, ring_degree=2), RAISES, 1),
    ],
    ids=str,
)
def test_a_rank_that_fails_is_named_in_time_and_all_stay_warm(spec, folder, layout, what, rank):
    cause = "ran out of memory" if what == LACKS_MEMORY else "failed: ValueError: this rank was told to fail"
    expected, before = run(spec, folder, layout, WORKS)
    heard = []
    with pytest.raises(UserError, match=f"^Rank {rank} {cause}.* {STAYS}$"):
        run(spec, folder, layout, RANK * rank + what, lambda *_: heard.append(time.monotonic()))
    assert time.monotonic() - heard[-1] < LEAVES_S
    latent, after = run(spec, folder, layout, WORKS)
    assert torch.equal(latent, expected)
    assert after == before


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
        UserError, match=r"Rank 1 ran out of memory: decode 32 x 48 pixels in bands of rows over 4 ranks"
    ):
        decode(spec, folder, RAISES)
    assert time.monotonic() - began < LEAVES_S
    picture, after = decode(spec, folder, WORKS)
    assert torch.equal(picture, expected)
    assert after == before


def test_a_rank_that_dies_is_named_in_time(spec, folder):
    # Last, since it ends their sidecar. That the next request starts another is shown in test_sidecar.py.
    run(spec, folder, PIPED, WORKS)
    heard = []
    with pytest.raises(SidecarError, match=r"Rank 1 \(process \d+\) was killed by SIGKILL"):
        run(spec, folder, PIPED, RANK + DIES, lambda *_: heard.append(time.monotonic()))
    assert time.monotonic() - heard[-1] < LEAVES_S
