"""The quality command's way through real ranks, on the demo model at a size that costs seconds."""

from contextlib import contextmanager
from unittest import mock

import pytest
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol.messages import Status, StepCache
from paralleldit.tests.ranks.pool_client import PoolClient
from paralleldit.tools.demo_model.checkpoint import TARGET
from paralleldit.tools.quality import command
from paralleldit.tools.quality.command import LARGEST_ERROR, SERIAL, run
from paralleldit.tools.quality.methods import Method
from paralleldit.tools.quality.metrics import psnr
from paralleldit.tools.quality.sampling import Task, sidecar

ULYSSES = Method(Layout(ulysses_degree=2))
PIPED = Method(Layout(pipefusion_degree=2, num_patches=2, warmup_steps=1))
CACHED = Method(Layout(), StepCache(threshold=10.0))
CAPTIONS = ("a large red circle on a gray background", "two blue squares on a pink background", "a star")
"""Of one batch and a part of the next."""


@pytest.fixture(scope="module")
def outcome(ranks):
    @contextmanager
    def pooled(count):
        yield PoolClient(ranks, count)

    # Ranks of the pool have imported what those of a sidecar would import anew for each number of them.
    with mock.patch.object(command, "sidecar", pooled):
        return run(Task(TARGET, CAPTIONS, size=64, steps=3, batch=2), [SERIAL, PIPED, ULYSSES, CACHED])


def test_the_serial_run_equals_plain_diffusers(outcome):
    _, error = outcome
    assert error < LARGEST_ERROR


def test_exact_layouts_give_the_serial_picture_and_stale_ones_nearly(outcome):
    made = dict(outcome[0])
    assert list(made) == [SERIAL, PIPED, ULYSSES, CACHED]
    serial = made[SERIAL].pictures
    assert serial.shape == (3, 64, 64, 3)
    assert psnr(made[ULYSSES].pictures, serial).min() > 80
    assert 10 < psnr(made[PIPED].pictures, serial).min() < 80
    assert psnr(made[CACHED].pictures, serial).max() < 80
    assert (made[CACHED].whole, made[ULYSSES].whole) == ((4, 12), (0, 0)), "of two batches, both prompts' first steps"


def test_a_sidecar_of_as_many_ranks_lives_as_long_as_its_block(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with sidecar(1) as client:
        assert client.request(Status(id=0))[0].data["busy"] is None
        life = client.life
        processes = [life.agent, *life.ranks.values()]
        assert (len(life.ranks), all(process.alive for process in processes)) == (1, True)
    assert not any(process.alive for process in processes)
