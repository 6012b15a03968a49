"""A hostile neighbour on the host of a sidecar: what it can reach, and what comes of it."""

import contextlib
import random
import socket
import threading
import time

import psutil
import pytest
import torch
from paralleldit.launcher import lifecycle
from paralleldit.launcher.lifecycle import ensure_sidecar
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.parallel_backend.errors import Cancelled
from paralleldit.parallel_backend.protocol import messages
from torch.distributed import TCPStore

HANG_S = 3.0
STEP_S = 0.05
"""Of the stand-in."""


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    directory = tmp_path_factory.mktemp("attacks")
    spec = SidecarSpec(ranks=2, device="cpu", worker="tests.ranks.stand_in", directory=directory, hang_timeout=HANG_S)
    yield spec
    lifecycle.stop(spec.slot)


def ask(client, prompt, **more):
    request = messages.EncodeText(id=0, text=messages.TextRef(path="/none"), prompt=prompt)
    return client.request(request, {"tokens": torch.ones(3)}, **more)


def listening(life):
    """Addresses at which the sidecar's processes take connections."""
    processes = [life.agent, *life.ranks.values()]
    found = [each for process in processes for each in psutil.Process(process.pid).net_connections(kind="inet")]
    return [each.laddr for each in found if each.status == psutil.CONN_LISTEN]


def test_no_other_machine_reaches_a_sidecar_of_one_host(spec):
    life = ensure_sidecar(spec).life
    assert all(address.ip in ("127.0.0.1", "::1") for address in listening(life))


def test_the_agent_takes_no_connection_at_all(spec):
    agent = ensure_sidecar(spec).life.agent
    found = psutil.Process(agent.pid).net_connections(kind="all")
    assert [each.laddr for each in found if each.status == psutil.CONN_LISTEN] == []


def nothing(port):
    socket.create_connection(("127.0.0.1", port), 2).close()


def noise(port):
    with socket.create_connection(("127.0.0.1", port), 2) as sock:
        sock.sendall(random.Random(port).randbytes(100_000))


def web_page(port):
    with socket.create_connection(("127.0.0.1", port), 2) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")


WORDS = b'{"rank": 0, "kind": "user", "message": "pay", "hint": ""}'
VALIDATE, SET = b"\x00" + (0x3C85F7CE).to_bytes(4, "little"), b"\x01"
"""How a connection to a store of torch begins, and a write."""


def words_in_a_store(port):
    """As if the port were that of a store of torch, which anybody may write to."""
    keys = [b"/log trouble", b"/lost log", *(f"/failed/{number}".encode() for number in range(1, 50))]
    fields = (len(each).to_bytes(8, "little") + each for key in keys for each in (key, WORDS))
    writes = b"".join(SET + key + value for key, value in zip(fields, fields, strict=True))
    with socket.create_connection(("127.0.0.1", port), 2) as sock:
        sock.sendall(VALIDATE + writes)
        time.sleep(0.5)


def test_such_words_do_reach_a_store_that_is_open():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words_in_a_store(store.port)
    assert store.check(["failed/49"])
    assert store.get("failed/49") == WORDS


def strike(attack, port):
    with contextlib.suppress(OSError):
        attack(port)


@pytest.mark.parametrize("attack", [nothing, noise, web_page, words_in_a_store])
def test_what_a_neighbour_writes_to_open_ports_reaches_no_run(spec, attack):
    client = ensure_sidecar(spec)
    before, steps, heard = ask(client, "echo")[0].data["pids"], [], []
    ports = {address.port for address in listening(client.life)}
    attacks = [threading.Thread(target=strike, args=(attack, port)) for port in ports]

    def on_event(event, tensors):
        if isinstance(event, messages.Log):
            heard.append(event.text)
        elif event.step == 3:
            for each in attacks:
                each.start()
        steps.append(event)

    # Longer than the hang limit: foreign words of a failure would have ended the run by then.
    with pytest.raises(Cancelled):
        ask(client, "steps", on_event=on_event, cancelled=lambda: len(steps) > 1.5 * HANG_S / STEP_S)
    for each in attacks:
        each.join(10)
    assert heard == []
    assert ask(client, "echo")[0].data["pids"] == before
    assert not client.life.end
