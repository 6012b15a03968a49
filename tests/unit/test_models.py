"""Which models stay in memory beside each other, and which go."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paralleldit.parallel_backend.adapters.controlnet import nets
from paralleldit.parallel_backend.engine import model, model_store
from paralleldit.parallel_backend.engine.model_store import KEPT_FREE, ModelStore
from paralleldit.parallel_backend.files.states import FileStates
from paralleldit.parallel_backend.layout.model_part import WHOLE, ModelPart, Share
from paralleldit.parallel_backend.layout.stages import Stage
from paralleldit.parallel_backend.protocol.messages import ControlNetRef, ModelRef
from safetensors.torch import save_file

SIZE, TOTAL = 1000, 10_000


class Run:
    """A run on one rank, which remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def gather(self, value: object) -> list[object]:
        return [value]

    def progress(self, phase: str, step: int, total: int) -> None:
        pass

    def leave_if_cancelled(self) -> None:
        pass

    def holds(self, files: object) -> None:
        pass

    def log(self, level: str, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def store(monkeypatch) -> ModelStore:
    """One whose models take as much as their files, of a device of `TOTAL` bytes of which others use `store.taken`."""

    def make(path: Path, *rest: Any) -> Any:
        return SimpleNamespace(bytes=SIZE, path=path)

    monkeypatch.setattr(model, "Transformer", make)
    monkeypatch.setattr(nets, "open_controlnet", make)
    monkeypatch.setattr(model_store.dist, "get_world_size", lambda: 1)
    store: Any = ModelStore(torch.device("cpu"), FileStates())
    store.taken = 0

    def memory() -> dict[str, int]:
        used = store.taken + sum(each["bytes"] for each in store.summary())
        return {"used": used, "free": TOTAL - used, "total": TOTAL}

    monkeypatch.setattr(store, "memory", memory)
    return store


@pytest.fixture
def refs(tmp_path) -> list[ModelRef]:
    for number in range(3):
        save_file({"weight": torch.zeros(SIZE, dtype=torch.uint8)}, tmp_path / f"{number}.safetensors")
    return [ModelRef(path=str(tmp_path / f"{number}.safetensors")) for number in range(3)]


def held(store: ModelStore) -> list[str]:
    return [Path(str(each["path"])).stem for each in store.summary()]


def test_models_stay_beside_each_other_while_there_is_room(store, refs):
    run = Run()
    first, second, again = (store.transformer(refs[number], run) for number in (0, 1, 0))
    assert first is again
    assert first is not second
    assert held(store) == ["0", "1"]
    assert not run.said


def test_the_one_that_was_used_longest_ago_makes_room(store, refs):
    run = Run()
    store.taken = int(TOTAL * (1 - KEPT_FREE)) - 2 * SIZE
    for number in (0, 1, 0, 2):
        store.transformer(refs[number], run)
    assert held(store) == ["2", "0"]
    assert run.said == ["1.safetensors makes room for 2.safetensors."]


def test_without_room_for_two_only_the_last_stays(store, refs):
    store.taken = TOTAL
    for ref in refs:
        store.transformer(ref, Run())
    assert held(store) == ["2"]


def test_what_works_beside_a_model_makes_room_of_others_alone(store, refs):
    store.taken = TOTAL
    run = Run()
    store.transformer(refs[0], run)
    for _ in range(2):
        store.transformer(refs[1], run)
        for number in (0, 2):
            store.controlnet(ControlNetRef(path=refs[number].path), torch.float32, Stage(), run)
    assert held(store) == ["2", "0", "1"]
    assert run.said == ["0.safetensors makes room for 1.safetensors."]


@pytest.mark.parametrize(
    ("wanted", "stay", "free"),
    [(7000, 3, 7000), (7001, 2, 8000), (9000, 1, 9000), (9500, 1, 9000)],
    ids=["fits", "one goes", "all others go", "too much"],
)
def test_models_make_room_for_the_work_of_one(store, refs, wanted, stay, free):
    run = Run()
    for ref in refs:
        store.transformer(ref, run)
    assert store.free_up(wanted, refs[0], run) == free
    assert len(held(store)) == stay
    assert refs[0].path in [each["path"] for each in store.summary()]
    assert (
        run.said == [f"{number}.safetensors makes room for the work of 0.safetensors." for number in (1, 2)][: 3 - stay]
    )


def test_a_part_of_a_model_needs_its_share_of_the_room(store, refs):
    store.taken = int(TOTAL * (1 - KEPT_FREE)) - SIZE - SIZE // 2
    run = Run()
    for part in (WHOLE, ModelPart(tensor=Share(0, 2))):
        store.transformer(refs[0], run, part)
    assert not run.said


def test_a_file_that_was_replaced_is_read_again(store, refs):
    run = Run()
    first = store.transformer(refs[0], run)
    os.utime(refs[0].path, ns=(1, 1))
    assert store.transformer(refs[0], run) is first, "a run looks once"
    store.states.begin()
    assert store.transformer(refs[0], run) is not first
    assert held(store) == ["0"]


def test_unloading_tells_what_the_device_has_got_back(store, refs):
    store.transformer(refs[0], Run())
    store.transformer(refs[1], Run())
    assert store.unload() == 2 * SIZE
    assert held(store) == []
