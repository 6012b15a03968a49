"""The first pass through compiled blocks: what it tells, when it ends, and which layouts can leave it."""

import pytest
import torch
from paralleldit.parallel_backend.engine import first_pass
from paralleldit.parallel_backend.engine.first_pass import FirstPass, can_leave, key_of, reporting
from paralleldit.parallel_backend.errors import Cancelled
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol import messages

REF = messages.ModelRef(path="/models/one")


class ToldRun:
    def __init__(self, cancel_at=None):
        self.told, self.logged, self.checks, self.cancel_at = [], [], 0, cancel_at

    def progress(self, phase, step, total):
        self.told.append((phase, step, total))

    def log(self, level, text):
        self.logged.append(text)

    def check_cancelled(self):
        self.checks += 1
        if self.checks == self.cancel_at:
            raise Cancelled("Cancelled.")


def passed(blocks, times=1):
    for _ in range(times):
        state = 0
        for block in blocks:
            state = block(state)
    return state


def counting(count=5, own=slice(None)):
    return FirstPass([lambda state: state + 1] * count, own)


def test_each_block_of_the_first_pass_is_told_and_none_of_those_after():
    blocks, run = counting(), ToldRun()
    blocks.watch("one", reporting(run, leaves=True))
    assert passed(blocks.blocks, times=3) == 5
    assert run.told == [("compile", number, 5) for number in range(5)]
    blocks.watch("one", reporting(run, leaves=True))
    passed(blocks.blocks)
    assert len(run.told) == run.checks == 5
    blocks.watch("another size", reporting(run, leaves=False))
    passed(blocks.blocks)
    assert (len(run.told), run.checks) == (10, 5)


def test_a_stage_counts_its_own_blocks():
    blocks, run = counting(own=slice(2, 4)), ToldRun()
    blocks.watch("one", reporting(run, leaves=False))
    passed(blocks.blocks[2:4], times=2)
    assert run.told == [("compile", 0, 2), ("compile", 1, 2)]


def test_a_cancel_leaves_before_the_next_block_and_the_next_run_is_told_from_the_start():
    blocks, run = counting(), ToldRun(cancel_at=3)
    blocks.watch("one", reporting(run, leaves=True))
    with pytest.raises(Cancelled):
        passed(blocks.blocks)
    assert run.told == [("compile", 0, 5), ("compile", 1, 5)]
    again = ToldRun()
    blocks.watch("one", reporting(again, leaves=True))
    assert passed(blocks.blocks) == 5
    assert len(again.told) == 5


def test_a_long_compilation_says_once_what_else_to_do(monkeypatch):
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(first_pass.time, "monotonic", lambda: next(clock))
    blocks, run = counting(), ToldRun()
    blocks.watch("one", reporting(run, leaves=False))
    passed(blocks.blocks)
    (text,) = run.logged
    assert "of 5 blocks" in text
    assert "set compile of Parallel Layout to off" in text


def sample(start=0.0, **degrees):
    prompt = messages.Conditioning(start=start)
    return messages.Sample(
        id=1,
        model=REF,
        layout=Layout(compile="blocks", **degrees),
        positive=(messages.Conditioning(),),
        negative=(prompt,),
        cfg=5.0,
        sampler="euler",
        seed=1,
        schedule=None,
    )


@pytest.mark.parametrize(
    ("request_", "leaves"),
    [
        (sample(), True),
        (sample(ulysses_degree=2, tensor_degree=2), True),
        (sample(cfg_degree=2), True),
        # The ranks of that prompt may have nothing to compute in the first step.
        (sample(cfg_degree=2, start=0.5), False),
        (sample(ulysses_degree=2, start=0.5), True),
        (sample(weights="sharded", ulysses_degree=2), False),
        (sample(pipefusion_degree=2), False),
        (sample(distrifusion_degree=2), False),
    ],
    ids=lambda each: str(each.layout) if isinstance(each, messages.Sample) else None,
)
def test_all_ranks_go_through_equally_many_blocks_where_they_can_leave_between_them(request_, leaves):
    assert can_leave(request_) is leaves


def test_another_size_is_another_first_pass_and_another_schedule_is_not():
    latent = {"latent": torch.zeros(1, 4, 8, 8), "sigmas": torch.zeros(5)}
    same = {"latent": torch.ones(1, 4, 8, 8), "sigmas": torch.zeros(9)}
    other = {"latent": torch.zeros(1, 4, 8, 6), "sigmas": torch.zeros(5)}
    assert key_of(sample(), latent) == key_of(sample(), same) != key_of(sample(), other)
