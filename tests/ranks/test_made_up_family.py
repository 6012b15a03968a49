"""The contract of a family, proved by one that has all of it: see tests/made_up."""

from unittest import mock

import pytest
import torch
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine import sample
from paralleldit.parallel_backend.engine.model import Transformer
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.model_part import ModelPart
from paralleldit.parallel_backend.protocol import messages
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.tests.made_up import cases
from paralleldit.tests.made_up.view import MADE_UP
from paralleldit.tests.ranks.stale_flux import run_of
from safetensors.torch import save_file

STEPS = 4


def predicted(world, layout):
    """With a time for each frame."""
    mesh, family, latents = Mesh(layout), cases.family(), cases.latents()
    packing = family.packing(latents)
    attention = AttentionCore(mesh.ulysses, mesh.ring, KERNELS["sdpa"])
    strategy = SequenceParallel(family, mesh.sequence, attention, packing)
    time, following = times()
    return packing.unpack(strategy.predict(packing.pack(latents), time, cases.condition(), following))


def times():
    generator = torch.Generator().manual_seed(8)
    return torch.rand(2, cases.SIZES["video"][0], generator=generator), torch.rand(2, generator=generator)


def loaded(path, layout, mesh):
    """The family around this rank's part of the file."""
    with mock.patch.dict(FAMILIES, {MADE_UP.name: MADE_UP}):
        transformer = Transformer(path, cases.CPU, part=ModelPart.of(layout, mesh))
    return transformer.on(mesh)


def sampled(world, layout, dtype=torch.float32, path=None):
    """A guided run of both latents, with a negative prompt of another length; of the model in the file at `path`."""
    conditions = {"positive": cases.condition(6), "negative": cases.condition(7, batch=2, text=8)}
    tensors = {f"latent.{name}": latent for name, latent in cases.latents().items()}
    tensors |= {f"{side}.0.{name}": x for side, each in conditions.items() for name, x in each.tensors.items()}
    request = messages.Sample(
        id=1,
        model=messages.ModelRef(path="unused"),
        layout=layout,
        positive=(messages.Conditioning(),),
        negative=(messages.Conditioning(),),
        cfg=3.0,
        sampler="euler",
        schedule=messages.Schedule(scheduler="simple", steps=STEPS),
        seed=42,
    )
    mesh = Mesh(layout)
    family = cases.family(dtype) if path is None else loaded(path, layout, mesh)
    return sample.sample(request, tensors, family, mesh, run_of(request)[0])


def relative_error(actual, expected):
    return max(float((actual[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(ulysses_degree=2),
        Layout(ulysses_degree=3),
        Layout(ulysses_degree=4),
        Layout(ring_degree=2),
        Layout(ring_degree=4),
        Layout(ulysses_degree=2, ring_degree=2),
    ],
    ids=str,
)
def test_prediction_equals_the_plain_forward(ranks, layout):
    time, following = times()
    expected = cases.plain(cases.condition(), time, following)
    for answer in ranks.run(layout.ranks, predicted, layout):
        assert answer.keys() == expected.keys()
        assert relative_error(answer, expected) <= 1e-5


@pytest.mark.parametrize(
    "layout",
    [
        Layout(cfg_degree=2),
        Layout(data_degree=2, ulysses_degree=2),
        Layout(pipefusion_degree=2, num_patches=3, warmup_steps=STEPS),
        Layout(pipefusion_degree=4, num_patches=1),
        Layout(pipefusion_degree=2, ring_degree=2, num_patches=5, warmup_steps=STEPS),
        Layout(distrifusion_degree=2, warmup_steps=STEPS),
        Layout(distrifusion_degree=3, warmup_steps=STEPS),
        Layout(distrifusion_degree=2, ulysses_degree=2, warmup_steps=STEPS),
    ],
    ids=str,
)
def test_run_without_old_keys_equals_one_rank(ranks, layout):
    (expected,) = ranks.once(1, sampled, Layout())
    for answer in ranks.run(layout.ranks, sampled, layout):
        assert relative_error(answer, expected) <= 1e-5


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor_degree=2),
        Layout(tensor_degree=3),
        Layout(tensor_degree=4),
        Layout(tensor_degree=2, ulysses_degree=2),
        Layout(ulysses_degree=2, weights="sharded"),
        Layout(ring_degree=3, weights="offloaded"),
        Layout(tensor_degree=2, ring_degree=2, weights="sharded"),
        Layout(pipefusion_degree=3, num_patches=3, warmup_steps=STEPS),
        Layout(pipefusion_degree=2, tensor_degree=2, num_patches=3, warmup_steps=STEPS),
        Layout(pipefusion_degree=2, ulysses_degree=2, num_patches=1, weights="sharded"),
    ],
    ids=str,
)
def test_parts_of_a_model_equal_the_whole(ranks, tmp_path, layout):
    save_file(cases.network().state_dict(), path := tmp_path / "made-up.safetensors")
    (expected,) = ranks.once(1, sampled, Layout())
    for answer in ranks.run(layout.ranks, sampled, layout, torch.float32, path):
        assert relative_error(answer, expected) <= 1e-5


def test_streams_are_carried_from_stage_to_stage_in_their_own_dtype(ranks):
    """Its layers compute in bf16, what is added up over the blocks stays fp32."""
    layout = Layout(pipefusion_degree=3, num_patches=2, warmup_steps=STEPS)
    (expected,) = ranks.once(1, sampled, Layout(), torch.bfloat16)
    (rounded,) = ranks.once(1, sampled, Layout())
    assert relative_error(expected, rounded) > 1e-3
    for answer in ranks.run(layout.ranks, sampled, layout, torch.bfloat16):
        assert relative_error(answer, expected) <= 1e-5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            Layout(pipefusion_degree=2, num_patches=3, warmup_steps=1),
            Layout(pipefusion_degree=2, ulysses_degree=2, num_patches=3, warmup_steps=1),
        ),
        (
            Layout(pipefusion_degree=3, num_patches=3, warmup_steps=0),
            Layout(pipefusion_degree=2, ring_degree=2, num_patches=3, warmup_steps=0),
        ),
        (
            Layout(distrifusion_degree=2, warmup_steps=1),
            Layout(distrifusion_degree=2, cfg_degree=2, warmup_steps=1),
        ),
    ],
    ids=str,
)
def test_late_keys_are_the_same_however_ranks_share_the_rest(ranks, one, other):
    (exact,) = ranks.once(1, sampled, Layout())
    expected, *_ = ranks.run(one.ranks, sampled, one)
    assert relative_error(expected, exact) > 1e-4
    for answer in ranks.run(other.ranks, sampled, other):
        assert relative_error(answer, expected) <= 1e-5
