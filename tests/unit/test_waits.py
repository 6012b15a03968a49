"""Between two steps of a run the host waits for its GPU nowhere. `-s` prints how often it did."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from paralleldit.parallel_backend.attention.kernels import KERNELS, Kernel
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine import sample
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.kernel_counts import pretended_ranks
from paralleldit.tests.pretended_device import DEVICE, pretended_device, to_device
from paralleldit.tests.tiny_models import TINY_MODELS, entry_of, tensors_of

STEPS, ONE_RANK = 5, Layout()


@dataclass(frozen=True)
class Case:
    model: str
    layout: Layout = ONE_RANK
    sampler: str = "euler"
    cfg: float = 3.0

    def __str__(self):
        return f"{self.model}, {self.layout}, {self.sampler}, cfg {self.cfg:g}"


CASES = [
    *(Case(model) for model in TINY_MODELS),
    Case("flux dev", sampler="euler_ancestral"),
    Case("flux dev", sampler="dpmpp_2m_sde"),
    Case("flux dev", Layout(ulysses_degree=2)),
    Case("flux dev", Layout(ulysses_degree=2, ring_degree=2)),
    Case("flux dev", Layout(distrifusion_degree=2)),
    Case("flux dev", Layout(cfg_degree=2)),
    Case("flux dev", Layout(data_degree=2)),
    Case("flux dev", Layout(pipefusion_degree=2, num_patches=2), cfg=1.0),
    Case("pixart alpha", Layout(pipefusion_degree=2, num_patches=2)),
]


class Marks:
    """The run as the engine reports it: notes how many waits there were when a step began."""

    def __init__(self, waits):
        self.waits = waits
        self.at = []

    def progress(self, phase, step, total, preview=None):
        self.sent = step, None if preview is None else preview.detach().cpu()

    def log(self, *_):
        pass

    def check_cancelled(self):
        self.at.append(len(self.waits))

    def start_check(self, numbers):
        self.at.append(len(self.waits))
        return lambda: list(numbers)

    def gather(self, value):
        return [value]


def request_of(case):
    draw = torch.Generator().manual_seed(5)
    tiny = TINY_MODELS[case.model]
    random = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    sides = {"positive": tiny.condition(random, 1, 5), "negative": tiny.condition(random, 1, 5)}
    tensors = {"latent": tiny.latent(random, 2, 8, 8)}
    for side, condition in sides.items():
        tensors |= tensors_of(side, condition)
    request = messages.Sample(
        id=1,
        model=messages.ModelRef(path="unused"),
        layout=case.layout,
        **{side: (entry_of(condition),) for side, condition in sides.items()},
        cfg=case.cfg,
        sampler=case.sampler,
        schedule=messages.Schedule(scheduler="simple", steps=STEPS, denoise=0.8),
        seed=42,
        preview=True,
    )
    return request, tensors


def attend_with_lse(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


@contextmanager
def sampling(case):
    """The marks, and what `sample` takes before them, on the pretended device."""
    tiny = TINY_MODELS[case.model]
    with pretended_ranks(case.layout.ranks):
        mesh = Mesh(case.layout, group_of=lambda ranks: dist.new_group(list(ranks)))
        network = tiny.make(2, 1)
        with pretended_device() as waits:
            family = tiny.family(to_device(network), torch.float32, DEVICE)
            yield Marks(waits), *request_of(case), family, mesh


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_host_waits_for_nothing_between_two_steps(monkeypatch, case):
    monkeypatch.setitem(KERNELS, "sdpa", Kernel(KERNELS["sdpa"].attend, attend_with_lse))
    with sampling(case) as (run, *given):
        sample.sample(*given, run)
    waited = Counter(run.waits[run.at[-3] : run.at[-2]])
    print(f"\n| {case} | {waited.total()} |", dict(waited))
    assert not waited
    # What is reported a step late is reported all the same.
    done, preview = run.sent
    assert done == STEPS
    assert torch.isfinite(preview).all()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("positive.0.tokens", "prediction is not finite at step 1 of 5"),
        ("latent", "latent is not finite at step 1 of 5"),
    ],
)
def test_what_is_not_finite_on_a_device_is_found_a_step_late(monkeypatch, tensor, message):
    monkeypatch.setattr(sample, "latents_of", lambda tensors, family: {"image": tensors["latent"]})
    case = CASES[0]
    with sampling(case) as (run, request, tensors, *given):
        tensors[tensor][..., 0] = torch.nan
        with pytest.raises(UserError, match=message):
            sample.sample(request, tensors, *given, run)
    assert len(run.at) == 2
