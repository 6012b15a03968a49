"""Paths that are no files, or files that never answer: refused in no time, by name."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.files.checkpoint import open_checkpoint
from paralleldit.parallel_backend.files.regular import in_time, open_regular
from paralleldit.parallel_backend.files.states import FileStates
from paralleldit.parallel_backend.text.encoders import load_text_encoders
from paralleldit.parallel_backend.vae.load import load_vae
from paralleldit.parallel_backend.weights.load import load_transformer
from paralleldit.parallel_backend.worker.stall import Stall


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.safetensors")
    return str(folder / "pipe.safetensors")


def pipe_in_a_folder(folder: Path) -> str:
    for name in ("transformer", "vae"):
        (folder / name).mkdir()
        os.mkfifo(folder / name / "diffusion_pytorch_model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    os.mkfifo(folder / "model_index.json")
    return str(folder)


def socket_of_a_program(folder: Path) -> str:
    path = str(folder / "socket.safetensors")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    return path


def loop(folder: Path) -> str:
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    return str(folder / "loop.safetensors")


def many_tensors(folder: Path) -> str:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{number}": entry for number in range(30_001)}).encode()
    path = folder / "many.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return str(path)


PATHS = {
    "pipe": (pipe, "is not a regular file"),
    "pipe in a folder": (pipe_in_a_folder, "is not a regular file"),
    "socket": (socket_of_a_program, "(Cannot read|cannot be read|not a regular file|does not exist|no subfolder)"),
    "device": (lambda folder: "/dev/zero", "is not a regular file"),
    "random": (lambda folder: "/dev/random", "is not a regular file"),
    "terminal": (lambda folder: "/dev/tty", "."),
    "loop of links": (loop, "."),
    "long name": (lambda folder: "/x" * 3000, "."),
    "zero byte": (lambda folder: "a\0b", "."),
    "missing": (lambda folder: str(folder / "none.safetensors"), "none.safetensors"),
    "30,001 tensors": (many_tensors, "holds 30001 tensors"),
}
KINDS = {
    "model": lambda path: load_transformer(path, device="cpu"),
    "vae": lambda path: load_vae(path, device="cpu", dtype=torch.float32),
    "lora": open_checkpoint,
    "text encoders": lambda path: load_text_encoders(path, device="cpu", dtype=torch.float32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_no_file_of_a_model_is_refused_at_once(tmp_path, name, kind):
    make, text = PATHS[name]
    path = make(tmp_path)
    began = time.monotonic()
    with pytest.raises(UserError, match="." if kind == "text encoders" else text):
        KINDS[kind](path)
    assert FileStates().under(path) == () or name in ("pipe in a folder", "30,001 tensors")
    assert time.monotonic() - began < 10


def test_a_folder_that_is_none_of_a_model_is_not_searched_for_ever(tmp_path):
    for number in range(10_001):
        (tmp_path / str(number)).touch()
    with pytest.raises(UserError, match="more than 10000 files"):
        FileStates().under(str(tmp_path))


def test_a_file_system_that_does_not_answer_is_named(tmp_path):
    waits = threading.Event()
    with pytest.raises(UserError, match=r"drive/model\.safetensors: the file system has not answered for 0\.1 s"):
        in_time("drive/model.safetensors", waits.wait, limit=0.1)
    waits.set()


def test_a_regular_file_is_opened_as_ever(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"


def test_a_rank_that_waits_for_a_file_is_told_from_one_that_waits_for_others(tmp_path):
    """The main thread waits, another one looks."""
    pipe_path, stall, told = Path(pipe(tmp_path)), Stall(limit=0.4), []

    def look(release) -> None:
        for _ in range(12):
            told.append(stall.look())
            time.sleep(0.1)
        release()

    def write() -> None:
        pipe_path.write_bytes(b"")

    watching = threading.Thread(target=look, args=(write,))
    watching.start()
    pipe_path.read_bytes()
    watching.join()
    assert told[0] == ""
    assert "for a file, in pathlib.py, line" in told[-1]
    told.clear()
    others = threading.Event()
    watching = threading.Thread(target=look, args=(others.set,))
    watching.start()
    others.wait()
    watching.join()
    assert set(told) == {""}


@pytest.mark.parametrize(
    ("error", "remedy"),
    [("No such device (19)", "does not map files: copy it to another disk"), ("Cannot allocate memory", "ulimit -v")],
)
def test_a_file_that_cannot_be_mapped_says_what_to_do(tmp_path, monkeypatch, error, remedy):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))

    def from_file(*args, **kwargs):
        raise RuntimeError(f"unable to mmap 4 bytes from file: {error}")

    monkeypatch.setattr(torch, "from_file", from_file)
    with pytest.raises(UserError, match=r"Cannot map .*a\.safetensors") as refused:
        open_checkpoint(tmp_path / "a.safetensors").tensor("a")
    assert remedy in refused.value.hint
