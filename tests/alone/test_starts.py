"""Starts of a sidecar: those that fail say why, and those on several hosts meet."""

import contextlib
import random
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from paralleldit.launcher import lifecycle
from paralleldit.launcher.client import SidecarError
from paralleldit.launcher.lifecycle import current, ensure_sidecar
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.parallel_backend.errors import UserError
from paralleldit.tests.alone.sidecars import alive, ask, launcher, pids_of, spec_in, wait_for

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
