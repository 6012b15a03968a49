"""A real sidecar of two CPU ranks: it serves, it fails well, and it leaves nothing behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from paralleldit.launcher import lifecycle
from paralleldit.launcher.client import SidecarError
from paralleldit.launcher.lifecycle import connect, current, ensure_sidecar, inherit
from paralleldit.parallel_backend.errors import Cancelled, UserError
from paralleldit.parallel_backend.protocol import messages, records
from paralleldit.tests.alone.sidecars import ANOTHER, HANG_S, alive, ask, launcher, pids_of, spec_in, wait_for


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    spec = spec_in(tmp_path_factory.mktemp("sidecar"))
    yield spec
    lifecycle.stop(spec.slot)
    assert alive(current(spec.slot)) == []


@pytest.fixture
def client(spec):
    return ensure_sidecar(spec)


# -- a warm sidecar ----------------------------------------------------------------------------------------------


def test_a_request_passes_all_ranks_and_returns_with_its_events(client):
    events = []
    sent = {"tokens": torch.randn(1, 3, 4), "empty": torch.zeros(0)}
    result, tensors = ask(client, "echo", sent, on_event=lambda event, body: events.append((event, body)))
    assert result.data["sum"] == 0 + 1
    assert all(torch.equal(tensors[name], sent[name]) for name in sent)
    ((event, body),) = events
    assert (event.phase, event.step, event.total) == ("encode text", 1, 1)
    assert torch.equal(body["preview"], sent["tokens"])


def test_status_names_every_rank(client):
    result, _ = client.request(messages.Status(id=0))
    assert [rank["pid"] for rank in result.data["ranks"]] == pids_of(client)
    assert result.data["busy"] is None


@pytest.mark.parametrize(
    ("prompt", "more", "error", "text"),
    [
        ("user_error", {}, UserError, "This prompt cannot be encoded. Use another."),
        ("steps", {"cancelled": lambda: True}, Cancelled, "Cancelled"),
    ],
)
def test_an_error_on_which_all_ranks_agree_leaves_them_warm(client, prompt, more, error, text):
    before = pids_of(client)
    with pytest.raises(error, match=text):
        ask(client, prompt, **more)
    assert pids_of(client) == before


def test_cancel_takes_effect_within_one_step(client):
    steps, asked_at = [], []

    def cancelled():
        if len(steps) >= 3 and not asked_at:
            asked_at.append(time.monotonic())
        return bool(asked_at)

    with pytest.raises(Cancelled):
        ask(client, "steps", on_event=lambda event, _: steps.append(event.step), cancelled=cancelled)
    assert time.monotonic() - asked_at[0] < 0.5
    assert len(steps) < 10


def test_a_second_client_asks_for_status_meanwhile_and_a_lost_one_frees_the_ranks(client, spec):
    busy, watching = connect(current(spec.slot)), connect(current(spec.slot))
    busy.life = None
    running = threading.Event()

    def run():
        with pytest.raises(SidecarError):
            ask(busy, "steps", on_event=lambda *_: running.set())

    thread = threading.Thread(target=run)
    thread.start()
    assert running.wait(5)
    result, _ = watching.request(messages.Status(id=0))
    assert result.data["busy"]["type"] == "encode_text"
    assert result.data["busy"]["step"] >= 1
    began = time.monotonic()
    busy.close()
    pids_of(client)
    assert time.monotonic() - began < 2
    thread.join()


def test_a_stranger_on_the_socket_hurts_nobody(client, spec):
    before = pids_of(client)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(current(spec.slot).path / records.SocketFile))
        stranger.sendall(os.urandom(100_000))
    assert pids_of(client) == before


def test_another_process_adopts_the_running_sidecar(client, spec):
    before = pids_of(client)
    code = f"{ANOTHER}print(ensure_sidecar({spec!r}, owned=False).welcome.pid)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(found.stdout) == before[0]


def test_logs_are_bounded_and_a_full_disk_is_told_once(client, spec):
    life = current(spec.slot)
    log = life.path / records.rank_log(1)
    ask(client, "flood 1")
    wait_for(lambda: log.exists() and log.stat().st_size > 900_000, 5)
    log.unlink()
    log.symlink_to("/dev/full")
    told = []
    for heard in (30, 60):
        ask(client, "flood 1")
        until = partial(lambda heard: len(told) > heard, heard)
        with pytest.raises(Cancelled):
            ask(client, "steps", on_event=lambda event, _: told.append(event), cancelled=until)
    lines = [event.text for event in told if isinstance(event, messages.Log)]
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    log.unlink()


# -- the end of ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "error", "text", "seconds"),
    [
        ("die 0", SidecarError, r"Rank 0 \(process \d+\) was killed by SIGKILL", 5),
        ("die 1", SidecarError, r"Rank 1 \(process \d+\) was killed by SIGKILL", 5),
        ("hang 0", SidecarError, "Rank 0 hangs", HANG_S + 5),
        ("hang 1", SidecarError, "Rank 1 hangs", HANG_S + 5),
        ("crash 1", SidecarError, "Rank 1 failed: ValueError: the stand-in was told to crash.*line", HANG_S + 5),
        ("user_error 1", UserError, "This prompt cannot be encoded. Use another.", HANG_S + 5),
    ],
)
def test_a_lost_rank_is_named_in_time_and_the_next_request_works(spec, prompt, error, text, seconds):
    client = ensure_sidecar(spec)
    pids_of(client)
    life = client.life
    began = time.monotonic()
    with pytest.raises(error, match=text):
        ask(client, prompt)
    assert time.monotonic() - began < seconds
    assert ask(ensure_sidecar(spec), "echo")[0].data["sum"] == 1
    assert alive(life) == []


def test_a_sidecar_that_dies_idle_is_replaced(spec):
    client = ensure_sidecar(spec)
    life = client.life
    os.kill(life.agent.pid, signal.SIGKILL)
    wait_for(lambda: not client.alive, 5)
    assert pids_of(ensure_sidecar(spec))
    assert alive(life) == []


def test_the_commands_show_and_stop_a_sidecar(client, spec):
    pids, life = pids_of(client), client.life
    code, out, _ = launcher(spec.directory, "status")
    assert (code, "idle" in out, f"process {pids[1]}" in out) == (0, True, True)
    code, out, _ = launcher(spec.directory, "logs", "--rank", "1")
    assert (code, "rank 1 INFO" in out) == (0, True)
    assert launcher(spec.directory, "stop")[0] == 0
    assert alive(life) == []
    code, _, err = launcher(spec.directory, "status")
    assert (code, "the last one ended: The sidecar was stopped by process" in err) == (3, True)


# -- the end of owners -------------------------------------------------------------------------------------------


def test_after_the_owner_was_killed_another_inherits_or_nothing_is_left(tmp_path):
    spec = spec_in(tmp_path / "run")
    code = f"{ANOTHER}ensure_sidecar({spec!r}); os.kill(os.getpid(), signal.SIGKILL)"
    owner = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert owner.returncode == -signal.SIGKILL
    life = current(spec.slot)
    dead = life.owner
    assert inherit(spec.slot)
    time.sleep(spec.grace + 1)
    assert len(alive(life)) == 3
    assert not inherit(spec.slot)
    life.own(dead)
    wait_for(lambda: not alive(life), spec.grace + 8)
    assert "owned the sidecar has been gone" in life.end.message


def test_a_sidecar_whose_directory_was_removed_ends(tmp_path):
    spec = spec_in(tmp_path / "run")
    client = ensure_sidecar(spec)
    life = client.life
    processes = alive(life)
    shutil.rmtree(spec.directory)
    wait_for(lambda: not any(process.alive for process in processes), 8)
