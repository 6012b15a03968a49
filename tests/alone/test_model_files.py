"""Files of models that are odd, slow, or change while the ranks have them."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paralleldit.launcher import lifecycle
from paralleldit.launcher.client import SidecarError
from paralleldit.launcher.lifecycle import ensure_sidecar
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.parallel_backend.errors import Cancelled, UserError
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.tiny_flux import CLIP_WIDTH, T5_WIDTH, write_pipeline

HANG_S = 4.0


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sidecar")
    spec = SidecarSpec(
        directory=directory, ranks=2, device="cpu", worker="tests.ranks.slow_loading", hang_timeout=HANG_S
    )
    yield spec
    lifecycle.stop(spec.slot)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path, original) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def weights(folder: Path) -> Path:
    return next((folder / "transformer").glob("*.safetensors"))


def sample(spec, folder, on_event=None, *, steps=4, adapters=(), **more):
    generator = torch.Generator().manual_seed(5)
    request = messages.Sample(
        id=0,
        model=messages.ModelRef(path=str(folder)),
        layout=Layout(ulysses_degree=2),
        positive=(messages.Conditioning(),),
        sampler="euler",
        schedule=messages.Schedule(scheduler="simple", steps=steps),
        seed=1,
        adapters=messages.Adapters(files=tuple(messages.LoraRef(path=path, strength=1.0) for path in adapters)),
    )
    tensors = {
        "latent": torch.zeros(1, 16, 8, 8),
        "positive.0.tokens": torch.randn(1, 5, T5_WIDTH, generator=generator),
        "positive.0.pooled": torch.randn(1, CLIP_WIDTH, generator=generator),
    }
    return ensure_sidecar(spec).request(request, tensors, on_event, **more)[1]["latent"]


def pids(spec):
    status, _ = ensure_sidecar(spec).request(messages.Status(id=0))
    return [rank["pid"] for rank in status.data["ranks"]]


# -- odd paths ---------------------------------------------------------------------------------------------------


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.safetensors")
    return str(folder / "pipe.safetensors")


def loop(folder: Path) -> str:
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    return str(folder / "loop.safetensors")


PATHS = {
    "pipe": pipe,
    "device": lambda folder: "/dev/zero",
    "loop": loop,
    "missing": lambda folder: str(folder / "none.safetensors"),
    "long": lambda folder: "/x" * 3000,
    "zero byte": lambda folder: "a\0b",
    "folder of a system": lambda folder: "/usr/lib",
}


READS = {
    "model": lambda spec, original, path: sample(spec, path),
    "lora": lambda spec, original, path: sample(spec, original, adapters=[path]),
    "vae": lambda spec, original, path: decode(spec, path),
    "text": lambda spec, original, path: encode(spec, path),
}


def decode(spec, path):
    request = messages.Decode(id=0, vae=messages.VaeRef(path=path))
    return ensure_sidecar(spec).request(request, {"latent": torch.zeros(1, 16, 8, 8)})


def encode(spec, path):
    return ensure_sidecar(spec).request(messages.EncodeText(id=0, text=messages.TextRef(path=path), prompt=""))


@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("name", PATHS)
def test_an_odd_path_is_refused_at_once_while_another_model_is_held(spec, original, tmp_path, name, kind):
    sample(spec, original)
    before, path = pids(spec), PATHS[name](tmp_path)
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        READS[kind](spec, original, path)
    assert time.monotonic() - began < 5
    assert "Rank" not in refused.value.message
    assert pids(spec) == before


# -- files that change -------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(4096)


def overwrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(os.urandom(file.stat().st_size // 2))


def replace_by_another(file: Path) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(file.read_bytes())
    new.replace(file)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (cut, SidecarError, r"was killed by SIGBUS: .*safetensors was changed while the ranks had it in memory"),
        (overwrite, UserError, r"safetensors was changed while the ranks had it in memory"),
        (replace_by_another, None, ""),
        (Path.unlink, None, ""),
    ],
    ids=["cut", "overwritten", "replaced", "removed"],
)
def test_a_file_that_changes_in_a_run_is_named_and_read_anew(spec, original, folder, change, error, text):
    expected, file = sample(spec, original), weights(folder)
    assert torch.equal(sample(spec, folder), expected)
    changed = []

    def on_event(event, tensors):
        if isinstance(event, messages.Progress) and event.phase == "sample" and not changed:
            changed.append(event.step)
            change(file)

    if error is None:
        sample(spec, folder, on_event, steps=60)
    else:
        with pytest.raises(error, match=text):
            sample(spec, folder, on_event, steps=400)
    assert changed
    shutil.copy(weights(original), file)
    assert torch.equal(sample(spec, folder), expected)


# -- slow files --------------------------------------------------------------------------------------------------


def test_a_cancel_leaves_while_a_model_is_loading_and_the_ranks_stay(spec, original, tmp_path):
    expected, before = sample(spec, original), pids(spec)
    slow = shutil.copytree(original, tmp_path / "slow")
    loading = []
    asked_at = []

    def cancelled():
        if loading and not asked_at:
            asked_at.append(time.monotonic())
        return bool(asked_at)

    with pytest.raises(Cancelled):
        sample(spec, slow, lambda event, _: loading.append(event), cancelled=cancelled)
    assert time.monotonic() - asked_at[0] < 3.5
    assert pids(spec) == before
    assert torch.equal(sample(spec, original), expected)


def test_a_rank_that_waits_for_a_file_for_ever_is_named(spec, original, tmp_path):
    expected = sample(spec, original)
    stuck = shutil.copytree(original, tmp_path / "stuck")
    os.mkfifo(weights(stuck).with_suffix(".pipe"))
    began = time.monotonic()
    with pytest.raises(SidecarError, match=r"Rank 1 hangs: it has waited \d+ s for a file, in pathlib.py"):
        sample(spec, stuck)
    assert time.monotonic() - began < HANG_S + 6
    assert torch.equal(sample(replace(spec), original), expected)
