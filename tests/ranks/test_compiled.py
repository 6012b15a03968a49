"""Runs with compiled blocks give what runs with plain ones do, in every kind of layout, and with LoRAs."""

import pytest
from paralleldit.parallel_backend.adapters.store import AdapterStore
from paralleldit.parallel_backend.layout import Layout
from paralleldit.parallel_backend.mesh import Mesh
from paralleldit.parallel_backend.parts import Part
from paralleldit.parallel_backend.protocol.messages import Adapters, LoraRef
from paralleldit.parallel_backend.transformer import Transformer
from paralleldit.tests.ranks.stale_families import HEADS, relative_error, sampled
from paralleldit.tests.ranks.test_lora import Files
from paralleldit.tests.tiny_models import CPU, TINY_MODELS

MODEL = "pixart alpha"
"""The one that takes the shortest time to compile. One rank: see tests/unit/test_compiled_blocks.py."""
LAYOUTS = [
    Layout(ulysses_degree=2, weights="sharded", compile="blocks"),
    Layout(pipefusion_degree=2, num_patches=2, compile="blocks"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_equals_that_of_plain_blocks(ranks, tmp_path, layout):
    TINY_MODELS[MODEL].make(HEADS).save_pretrained(tmp_path)
    plain = layout.model_copy(update={"compile": "off"})
    (expected, *_) = ranks.run(layout.ranks, sampled, MODEL, plain, tmp_path)
    for answer in ranks.run(layout.ranks, sampled, MODEL, layout, tmp_path):
        assert relative_error(answer, expected) <= 1e-5


class ToldRun:
    """What is told to the client."""

    def __init__(self):
        self.told = []

    def log(self, level, text):
        self.told.append(text)


def blocks_in_turn(world, path, lora):
    """Whether the blocks are compiled ones, and what was told: without a LoRA, with it, without, and of a plain run."""
    mesh, run, store = Mesh(Layout()), ToldRun(), AdapterStore()
    transformer = Transformer(path, CPU, part=Part.of(Layout(), mesh))
    plain, seen = list(transformer.on(mesh).blocks), []
    for files in ((), (lora,), ()):
        family = transformer.on(mesh)
        store.adapt(transformer, Adapters(files=files), run)
        transformer.compile_blocks(run)
        seen.append(list(family.blocks) != plain)
    return [*seen, list(transformer.on(mesh).blocks) != plain], run.told


def test_blocks_with_loras_are_not_compiled_and_that_is_told(ranks, tmp_path):
    files = Files(tmp_path)
    lora = LoraRef(path=str(files.lora(MODEL, "diffusers", "kohya")[0]))
    ((compiled, told),) = ranks.run(1, blocks_in_turn, files.base(MODEL), lora)
    assert compiled == [True, False, True, False]
    assert len(told) == 1
    assert "LoRAs are not compiled" in told[0]
