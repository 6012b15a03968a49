"""Who may connect: those who know the token, which never travels; and nobody keeps others out."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time

import pytest
from paralleldit.parallel_backend.protocol import handshake, messages
from paralleldit.parallel_backend.protocol.errors import ProtocolError
from paralleldit.parallel_backend.protocol.frames import MAGIC, PREFIX, FrameSocket
from paralleldit.parallel_backend.worker import pending, server
from paralleldit.tests.served_socket import TOKEN, WELCOME, Rank, answers, receive, send_raw, wait_for

NONCE = "5" * 64


@pytest.fixture
def rank(tmp_path):
    rank = Rank(tmp_path)
    yield rank
    rank.server.close()


@pytest.mark.parametrize(
    ("hello", "complaint"),
    [
        ({"type": "hello", "version": 99, "nonce": NONCE, "new": 1}, "version 99, the sidecar version 2"),
        ({"type": "hello", "version": 1, "token": TOKEN}, "version 1, the sidecar version 2"),
        ({"type": "hello", "version": 2}, "nonce"),
        ({"type": "hello", "version": 2, "nonce": "5" * 63}, "nonce"),
        ({"type": "hello", "version": 2, "nonce": "G" * 64}, "nonce"),
        ({"type": "hello", "version": 2, "nonce": NONCE, "token": TOKEN}, "token"),
        ({"type": "hello", "version": "2", "nonce": NONCE}, "version"),
        ({"type": "hello", "version": True, "nonce": NONCE}, "version"),
        ({"type": "proof", "proof": NONCE}, "Malformed"),
        ({"type": "unload", "id": 1}, "Malformed"),
        ({"type": "hello", "version": 2, "nonce": "5" * 5000}, "over the limit of 4096 bytes"),
        ("\ud800", "Malformed"),
    ],
)
def test_a_bad_handshake_is_told_why_and_closed(rank, hello, complaint):
    stream = rank.connect(greet=False)
    send_raw(stream, json.dumps(hello).encode())
    reply = receive(stream)
    assert reply.code == "protocol"
    assert complaint in reply.message
    assert stream.receive(5) is None
    assert answers(rank)


def challenged(rank):
    """A connection that waits for the proof, and the nonces."""
    stream, mine = rank.connect(greet=False), secrets.token_hex(32)
    stream.send(messages.Hello(version=messages.PROTOCOL_VERSION, nonce=mine))
    return stream, mine, receive(stream).nonce


def of_another_connection(rank, mine, its):
    stream, other_mine, other_its = challenged(rank)
    proof = handshake._proof(TOKEN, "client", other_mine, other_its)
    stream.close()
    return proof


@pytest.mark.parametrize(
    "forged",
    [
        lambda rank, mine, its: "0" * 64,
        lambda rank, mine, its: mine,
        lambda rank, mine, its: handshake._proof("", "client", mine, its),
        lambda rank, mine, its: handshake._proof(TOKEN + " ", "client", mine, its),
        lambda rank, mine, its: handshake._proof(TOKEN, "sidecar", mine, its),
        lambda rank, mine, its: handshake._proof(TOKEN, "client", its, mine),
        of_another_connection,
    ],
    ids=["zeros", "nonce", "no token", "longer token", "the sidecar's", "nonces exchanged", "replayed"],
)
def test_only_the_proof_of_this_connection_counts(rank, forged):
    stream, mine, its = challenged(rank)
    stream.send(messages.Proof(proof=forged(rank, mine, its)))
    assert receive(stream).message == "Wrong token."
    assert stream.receive(5) is None
    assert answers(rank)


def test_greet_raises_the_sidecars_reason(rank):
    with pytest.raises(ProtocolError, match="Wrong token"):
        handshake.greet(rank.connect(greet=False), "a guess")


def test_the_token_does_not_travel_and_no_two_handshakes_are_alike(rank):
    seen = []
    for _ in range(2):
        ours, theirs = socket.socketpair()
        server_side = rank.connect(greet=False)._sock
        heard = bytearray()

        def pass_on(source, target, heard=heard):
            with contextlib.suppress(OSError):
                while data := source.recv(4096):
                    heard.extend(data)
                    target.sendall(data)

        for pair in ((theirs, server_side), (server_side, theirs)):
            threading.Thread(target=pass_on, args=pair, daemon=True).start()
        handshake.greet(FrameSocket(ours), TOKEN)
        seen.append(bytes(heard))
        assert TOKEN.encode() not in heard
        ours.close()
    proofs = [{text for text in each.decode(errors="replace").split('"') if len(text) == 64} for each in seen]
    assert [len(each) for each in proofs] == [4, 4]
    assert not proofs[0] & proofs[1]


@pytest.mark.parametrize("proof", ["", "0" * 64, NONCE])
def test_a_sidecar_that_does_not_know_the_token_is_refused(proof):
    ours, theirs = socket.socketpair()

    def impostor():
        stream = FrameSocket(theirs)
        stream.receive(5)
        stream.send(messages.Challenge(nonce=NONCE))
        stream.receive(5)
        stream.send(WELCOME.model_copy(update={"proof": proof}))

    threading.Thread(target=impostor, daemon=True).start()
    with pytest.raises(ProtocolError, match="does not know the token"):
        handshake.greet(FrameSocket(ours), TOKEN)


@pytest.mark.parametrize(
    "reply", [messages.Result(id=0), messages.Heartbeat(oldest_beat_s=0.0, quietest_rank=0), WELCOME]
)
def test_a_sidecar_that_asks_for_no_proof_is_refused(reply):
    ours, theirs = socket.socketpair()
    FrameSocket(theirs).send(reply)
    with pytest.raises(ProtocolError, match="answered the handshake with"):
        handshake.greet(FrameSocket(ours), TOKEN)


# -- those who keep a place and say nothing ------------------------------------------------------------------------

HELLO = json.dumps({"type": "hello", "version": 2, "nonce": NONCE}).encode()
FRAME = PREFIX.pack(MAGIC, len(HELLO), 0) + HELLO


def trickle(sock, rest, seconds, stop):
    """A byte now and then, each within the time that a silence may last."""
    with contextlib.suppress(OSError):
        for byte in rest:
            sock.sendall(bytes([byte]))
            if stop.wait(seconds):
                return


@pytest.mark.parametrize("begun", [b"", FRAME[:5], FRAME[:-20], FRAME])
def test_one_deadline_is_for_the_whole_handshake(tmp_path, begun):
    rank = Rank(tmp_path, patience=0.5, stall_timeout=30.0)
    stream, stop, began = rank.connect(greet=False), threading.Event(), time.monotonic()
    stream._sock.sendall(begun)
    threading.Thread(target=trickle, args=(stream._sock, FRAME[len(begun) :], 0.1, stop)).start()
    if begun == FRAME:
        assert isinstance(receive(stream), messages.Challenge)
    assert "handshake takes too long" in receive(stream).message
    assert 0.3 < time.monotonic() - began < 3
    stop.set()
    rank.server.close()


def test_greet_waits_no_longer_than_its_patience():
    ours, theirs = socket.socketpair()
    began = time.monotonic()
    with pytest.raises(ProtocolError, match="takes too long"):
        handshake.greet(FrameSocket(ours), TOKEN, patience=0.3)
    assert time.monotonic() - began < 3
    theirs.close()


@pytest.mark.parametrize("address", ["unix", "tcp://127.0.0.1:0"])
def test_silent_connections_keep_nobody_out(tmp_path, address):
    rank = Rank(tmp_path, address)
    silent = [rank.connect(greet=False) for _ in range(2 * pending.MAX_PENDING)]
    for stream in silent:
        with contextlib.suppress(OSError):
            stream._sock.sendall(FRAME[:3])
    began = time.monotonic()
    assert answers(rank)
    assert time.monotonic() - began < 3
    limit = pending.MAX_PENDING if address == "unix" else pending.MAX_PER_ADDRESS
    wait_for(lambda: len(rank.server._pending._addresses) <= limit)
    for stream in silent:
        stream.close()
    rank.server.close()


def test_an_address_that_holds_all_its_places_takes_none_of_another():
    crowd = pending.PendingConnections(total=6, per_address=3)
    pairs = [socket.socketpair() for _ in range(6)]
    for number, (sock, _) in enumerate(pairs):
        crowd.enter(sock, "10.0.0.1" if number else "10.0.0.2")
    still = [pairs.index(pair) for pair in pairs if pair[0] in crowd._addresses]
    assert still == [0, 3, 4, 5]
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_clients_beyond_the_limit_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    rank = Rank(tmp_path)
    known = [rank.connect() for _ in range(2)]
    wait_for(lambda: rank.server.clients == 2)
    with pytest.raises(ProtocolError, match="No more clients"):
        rank.connect()
    known[0].close()
    wait_for(lambda: rank.server.clients == 1)
    assert answers(rank)
    rank.server.close()


def test_a_socket_that_cannot_be_taken_ends_no_server(rank, monkeypatch):
    """As where file descriptors run out."""
    listener = rank.server._listener
    failures = iter([OSError(24, "Too many open files")] * 3)

    class Failing:
        def accept(self):
            for failure in failures:
                raise failure
            return listener.accept()

        def shutdown(self, how):
            listener.shutdown(how)

        def close(self):
            listener.close()

    monkeypatch.setattr(rank.server, "_listener", Failing())
    assert all(answers(rank) for _ in range(3))
