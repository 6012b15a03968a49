"""Stages of PipeFusion never wait for each other in a circle, however each of them has to wait."""

import random
from types import SimpleNamespace

import pytest
from paralleldit.parallel_backend.strategies.pipefusion.schedule import posted_ahead, units_of

QUESTIONS = [SimpleNamespace(step=step) for step in range(5)]


class Link:
    """Messages from one stage to another: how many were sent, and how many have their receive posted."""

    def __init__(self, source, target, stages, per_unit):
        self.source, self.target, self.per_unit = source, target, per_unit
        self.distance = (target - source) % stages
        self.sent = self.posted = 0


def stage_work(stage, stages, units, patches, prompts, links, ahead):
    """A stage that waits, before it computes, for all it has begun to send and receive. Yields while it waits."""
    arriving = [link for link in links if link.target == stage]
    leaving = [link for link in links if link.source == stage]
    back = [link for link in leaving if link.target < stage]
    for link in back:
        link.sent = sum(unit.call == 0 for unit in units)
    for number, unit in enumerate(units):
        for link in arriving:
            further = ahead(stages, patches, link.distance) if len(unit.patches) == 1 else 0
            link.posted = min(number + 1 + further, len(units)) * link.per_unit
        for _ in range(prompts):
            while any(link.sent < link.posted for link in arriving) or any(link.sent > link.posted for link in leaving):
                yield
            for link in leaving:
                link.sent += link not in back
        for link in back:
            link.sent = sum(
                each.call <= unit.call or (each.call == unit.call + 1 and each.patches[-1] <= unit.patches[-1])
                for each in units
            )


def all_finish(stages, patches, *, warmup, prompts, skips, ahead=posted_ahead) -> bool:
    units = units_of(QUESTIONS, patches, warmup)
    hops = [(stage, stage + 1) for stage in range(stages - 1)]
    links = [Link(*ends, stages, prompts) for ends in [*hops, *skips]]
    links.append(Link(stages - 1, 0, stages, 1))
    running = [stage_work(stage, stages, units, patches, prompts, links, ahead) for stage in range(stages)]
    before = None
    while running:
        now = [(link.sent, link.posted) for link in links]
        if now == before:
            return False
        before = now
        running = [stage for stage in running if next(stage, "done") is None]
    return True


def skips_of(stages, draw):
    """The ends of a U-shaped model's skips, its blocks cut anywhere."""
    blocks = 40
    cuts = sorted(draw.sample(range(1, blocks), stages - 1))
    owners = [sum(block >= cut for cut in cuts) for block in range(blocks)]
    pairs = zip(owners[: blocks // 2], reversed(owners[blocks // 2 :]), strict=True)
    return sorted({pair for pair in pairs if pair[0] != pair[1]})


@pytest.mark.parametrize("stages", range(2, 9))
def test_no_stage_waits_for_ever(stages):
    draw = random.Random(stages)
    for patches in range(1, 3 * stages + 1):
        for prompts in (1, 2):
            for warmup in (0, 1, 2):
                for skips in ([], skips_of(stages, draw)):
                    case = {"warmup": warmup, "prompts": prompts, "skips": skips}
                    assert all_finish(stages, patches, **case), (patches, case)


@pytest.mark.parametrize("further", [-1, 1])
def test_one_receive_more_or_fewer_is_a_circle(further):
    """That the model above can tell: with two stages and five patches only the number that is used goes well."""
    assert not all_finish(2, 5, warmup=1, prompts=2, skips=[], ahead=lambda *place: posted_ahead(*place) + further)
