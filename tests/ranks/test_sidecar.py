"""A real sidecar of two CPU ranks: it serves, it fails well, and it leaves nothing behind."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from paralleldit.launcher import lifecycle
from paralleldit.launcher.client import SidecarError
from paralleldit.launcher.lifecycle import connect, current, ensure_sidecar, inherit
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.parallel_backend.errors import Cancelled, UserError
from paralleldit.parallel_backend.protocol import messages, records

pytestmark = pytest.mark.alone

PACK = Path(__file__).resolve().parents[2]
HANG_S = 3.0


def spec_in(directory, **more):
    usual = {"ranks": 2, "device": "cpu", "worker": "tests.ranks.stand_in", "hang_timeout": HANG_S, "grace": 1.0}
    return SidecarSpec(directory=directory, **(usual | more))


def ask(client, prompt, tensors=None, **more):
    request = messages.EncodeText(id=0, text=messages.TextRef(path="/none"), prompt=prompt)
    return client.request(request, tensors, **more)


def pids_of(client):
    result, _ = ask(client, "echo")
    return result.data["pids"]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(life):
    return [process for process in (life.agent, *life.ranks.values()) if process and process.alive]


def launcher(directory, *arguments, wait=True):
    process = subprocess.Popen(
        [sys.executable, PACK / "cli", *arguments],
        env={**os.environ, "PARALLELDIT_RUNTIME_DIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


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
    code = f"""
import sys; sys.path.insert(0, {str(PACK / "tests")!r})
import conftest
from paralleldit.launcher.lifecycle import *
from pathlib import Path, PosixPath
print(ensure_sidecar({spec!r}, owned=False).welcome.pid)
"""
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
    code = f"""
import sys; sys.path.insert(0, {str(PACK / "tests")!r})
import conftest
from paralleldit.launcher.lifecycle import *
from pathlib import Path, PosixPath
import os, signal
ensure_sidecar({spec!r})
os.kill(os.getpid(), signal.SIGKILL)
"""
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


# -- starts that fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"worker": "tests.ranks.no_such_module"}, "no module tests.ranks.no_such_module"),
        ({"python": "bare"}, "no module"),
        ({"python": "/nonexistent/python"}, "cannot be run: No such file"),
        ({"address": "tcp://127.0.0.1:{taken}"}, "port .* is taken"),
        ({"nnodes": 2, "rdzv_endpoint": "127.0.0.1:{taken}"}, "port .* is taken"),
        ({"start_timeout": 0.5}, r"did not start within 0.5 s: 0 of the 2 ranks"),
    ],
)
def test_a_start_that_fails_says_why(tmp_path, more, text):
    if more.get("python") == "bare":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
        more = {"python": str(tmp_path / "venv" / "bin" / "python")}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        more = {name: _fill(value, taken) for name, value in more.items()}
        spec = spec_in(tmp_path / "run", **more)
        began = time.monotonic()
        with pytest.raises((SidecarError, UserError), match=text):
            ensure_sidecar(spec)
        assert time.monotonic() - began < 20
    life = current(spec.slot)
    assert life is None or alive(life) == []


def _fill(value, taken):
    return value.format(taken=taken.getsockname()[1]) if isinstance(value, str) else value


# -- several hosts, over TCP ----------------------------------------------------------------------------


def free_port():
    """A free port below those of Linux' outgoing connections (from 32768 on), which might take it before a rank."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    pytest.fail("no port is free")


def test_two_hosts_serve_tcp_clients_that_know_the_token(tmp_path):
    (tmp_path / "token").write_text("a secret\n")
    (tmp_path / "guess").write_text("a guess\n")
    run = tmp_path / "run"
    address, meeting = f"tcp://127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    shape = ["--ranks", "2", "--nnodes", "2", "--rdzv-endpoint", meeting, "--device", "cpu", "--idle-timeout", "4"]
    shape += ["--address", address, "--token-file", str(tmp_path / "token"), "--worker", "tests.ranks.stand_in"]
    assert launcher(run, "status")[0] == 3
    starting = [launcher(run, "start", *shape, "--node-rank", str(node), wait=False) for node in (0, 1)]
    ends = [(*process.communicate(timeout=60), process.returncode) for process in starting]
    assert [code for *_, code in ends] == [0, 0], ends
    lives = [current(replace(spec_in(run), nnodes=2, node_rank=node).slot) for node in (0, 1)]

    remote = SidecarSpec(remote=True, address=address, token_file=tmp_path / "token")
    assert len(set(pids_of(ensure_sidecar(remote)))) == 2
    with pytest.raises(UserError, match="Wrong token"):
        ensure_sidecar(replace(remote, token_file=tmp_path / "guess"))
    elsewhere = ["--remote", address, "--token-file", str(tmp_path / "token")]
    for arguments in ([], elsewhere, [*elsewhere, "--json"]):
        code, out, _ = launcher(run, "status", *arguments)
        assert (code, '"rank": 1' in out if "--json" in arguments else "rank 1 on" in out) == (0, True)

    wait_for(lambda: not any(alive(life) for life in lives), 12)
    assert lives[0].end.message == "No request for 4 s."
    with pytest.raises(SidecarError, match="connection to the sidecar is lost"):
        ask(lifecycle._clients[remote], "echo")
