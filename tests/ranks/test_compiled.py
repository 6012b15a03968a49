"""Runs with compiled blocks give what runs with plain ones do, in every kind of layout, and with LoRAs."""

from functools import partial
from unittest import mock

import pytest
import torch
from paralleldit.parallel_backend.adapters.lora.store import AdapterStore
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine.model import Transformer
from paralleldit.parallel_backend.files.states import FileStates
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.model_part import ModelPart
from paralleldit.parallel_backend.protocol.messages import Adapters, LoraRef
from paralleldit.tests.covering import WHOLE
from paralleldit.tests.ranks.stale_families import HEADS, relative_error, sampled
from paralleldit.tests.ranks.test_exact_layouts import guided_by
from paralleldit.tests.ranks.test_lora import Files, shape_of
from paralleldit.tests.tiny_models import CPU, TINY_MODELS
from torch._dynamo.utils import counters

MODEL = "pixart alpha"
"""The one that takes the shortest time to compile. One rank: see tests/unit/test_compiled_blocks.py."""
CASES = [
    (MODEL, Layout(ring_degree=2, compile="blocks")),
    (MODEL, Layout(ulysses_degree=2, weights="sharded", compile="blocks")),
    (MODEL, Layout(pipefusion_degree=2, num_patches=2, compile="blocks")),
    (MODEL, Layout(distrifusion_degree=2, compile="blocks")),
    # Its norms add up squares over the ranks.
    ("wan 2.1", Layout(tensor_degree=2, compile="blocks")),
]


def sampled_as_traced(world, model, layout, path):
    # To trace takes a tenth of the time of making code of what was traced, which is the same thing in every layout.
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        return sampled(world, model, layout, path)


@pytest.mark.parametrize(("model", "layout"), CASES, ids=str)
def test_a_run_equals_that_of_plain_blocks(ranks, tmp_path, model, layout):
    TINY_MODELS[model].make(HEADS).save_pretrained(tmp_path)
    plain = layout.model_copy(update={"compile": "off"})
    (expected, *_) = ranks.run(layout.ranks, sampled, model, plain, tmp_path)
    for answer in ranks.run(layout.ranks, sampled_as_traced, model, layout, tmp_path):
        assert relative_error(answer, expected) <= 1e-5


class ToldRun:
    """What is told to the client."""

    def __init__(self):
        self.told = []

    def log(self, level, text):
        self.told.append(text)

    def leave_if_cancelled(self):
        """Nobody cancels."""


def compiled_in_turn(world, layout, dtype, backend, path, lora_sets):
    """With each set of LoRAs after the other: what plain blocks predict and what compiled ones do, and how many graphs
    there are by then; at the end, what was told."""
    mesh, run, store, seen = Mesh(layout), ToldRun(), AdapterStore(FileStates()), []
    transformer = Transformer(path, CPU, dtype, part=ModelPart.of(layout, mesh))
    torch._dynamo.reset()
    counters.clear()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        for loras in lora_sets:
            family = transformer.on(mesh)
            store.adapt(transformer, Adapters(files=loras), run)
            plain = guided_by(family, mesh, MODEL, shape_of(MODEL))
            transformer.compile_blocks(run)
            answer = guided_by(family, mesh, MODEL, shape_of(MODEL))
            seen.append((plain, answer, counters["stats"]["unique_graphs"]))
    return seen, run.told


def two_loras(files):
    one, other = (str(files.lora(MODEL, "diffusers", format)[0]) for format in ("kohya", "peft"))
    return (LoraRef(path=one),), (LoraRef(path=other, strength=-0.4),)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (Layout(), "fp8_e4m3fn"),
        (Layout(tensor_degree=2), "auto"),
        (Layout(ulysses_degree=2, weights="sharded"), "auto"),
    ],
    ids=str,
)
def test_plain_loras_are_compiled_once(ranks, tmp_path, layout, dtype):
    files = Files(tmp_path)
    sets = [(), *two_loras(files), ()]
    for seen, told in ranks.run(layout.ranks, compiled_in_turn, layout, dtype, "eager", files.base(MODEL), sets):
        for plain, answer, _ in seen:
            assert relative_error(answer, plain) <= 1e-5
        without, with_one, with_other, restored = (answer for _, answer, _ in seen)
        assert relative_error(with_one, without) > 0.05
        assert relative_error(with_other, with_one) > 0.05
        assert torch.equal(restored, without)
        graphs = [each for *_, each in seen]
        assert graphs[1:] == [graphs[1]] * 3
        assert graphs[1] <= 2 * graphs[0]
        assert not told


def test_code_of_blocks_with_loras_is_made_once(ranks, tmp_path):
    """To make code takes ten times as long as to trace: that of blocks without LoRAs is made in `make matrix`."""
    files = Files(tmp_path)
    sets = [*two_loras(files), *[()] * WHOLE]
    ((seen, told),) = ranks.run(1, compiled_in_turn, Layout(), "auto", "inductor", files.base(MODEL), sets)
    (plain, answer, graphs), *others = seen
    assert relative_error(answer, plain) <= 1e-5
    assert relative_error(others[0][1], answer) > 0.05
    for plain, answer, _ in others:
        assert relative_error(answer, plain) <= 1e-5
    assert others[0][2] == graphs > 0
    assert not told


def test_blocks_under_other_loras_are_not_compiled_and_that_is_told(ranks, tmp_path):
    files = Files(tmp_path)
    lora = LoraRef(path=str(files.lora(MODEL, "diffusers", "lokr")[0]))
    ((seen, told),) = ranks.run(1, compiled_in_turn, Layout(), "auto", "eager", files.base(MODEL), [(lora,)])
    assert [graphs for *_, graphs in seen] == [0]
    assert len(told) == 1
    assert "are not compiled" in told[0]
