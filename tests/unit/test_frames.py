"""The bytes of the protocol: what is sent arrives, and nothing that is malformed hurts the receiver."""

import contextlib
import json
import socket
import threading
import time
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paralleldit.parallel_backend.protocol import frames, messages
from paralleldit.parallel_backend.protocol.errors import ProtocolError
from paralleldit.parallel_backend.protocol.frames import MAGIC, PREFIX
from paralleldit.parallel_backend.protocol.tensors import DTYPES, pack, unpack
from paralleldit.parallel_backend.worker.server import MAX_QUEUED
from paralleldit.tests.served_socket import Rank, answers, prompt, receive, send_raw, wait_for


def joined(tensors):
    return bytearray().join(pack(tensors).buffers)


# -- tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPES.values()], ids=str)
def test_tensors_arrive_bit_for_bit_and_are_safetensors(dtype, shape):
    raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    sent = {"x": raw.view(dtype).reshape(shape), "odd": torch.tensor([True])}
    for received in (unpack(joined(sent)), safetensors.torch.load(bytes(joined(sent)))):
        assert {name: (t.dtype, t.shape) for name, t in received.items()} == {
            name: (t.dtype, t.shape) for name, t in sent.items()
        }
        assert all(as_bytes(received[name]) == as_bytes(sent[name]) for name in sent)


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_a_file_of_the_safetensors_library_is_read():
    sent = {"x": torch.randn(3, 4), "y": torch.arange(7, dtype=torch.int8), "z": torch.randn(2, dtype=torch.float64)}
    received = unpack(bytearray(safetensors.torch.save(sent)))
    assert all(torch.equal(received[name], sent[name]) for name in sent)


def test_a_value_that_stands_for_a_row_arrives_as_one():
    assert unpack(joined({"time": torch.tensor(0.5).expand(1)}))["time"].tolist() == [0.5]


def test_a_slice_of_a_larger_tensor_sends_only_itself():
    part = torch.arange(12.0).reshape(3, 4).t()[1:3]
    assert torch.equal(unpack(joined({"x": part}))["x"], part)
    assert pack({"x": part}).size < 200


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "has 4 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "does not lie inside"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "does not lie inside"),
        ({"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}, "does not lie inside"),
        ({"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}, "unknown dtype"),
        ({"dtype": "F32", "shape": [2.5], "data_offsets": [0, 8]}, "malformed header"),
        ({"dtype": "F32", "shape": [2]}, "malformed header"),
        ([], "malformed header"),
        ({"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}, "beyond"),
        ({"dtype": "F32", "shape": [2**31, 2**31, 0], "data_offsets": [0, 0]}, "beyond"),
        ({"dtype": "F32", "shape": [0, 10**400], "data_offsets": [0, 0]}, "beyond"),
        ({"dtype": "F32", "shape": [0] * 17, "data_offsets": [0, 0]}, "malformed header"),
        ({"dtype": "F32", "shape": [10**400], "data_offsets": [0, 8]}, "beyond"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 10**400]}, "does not lie inside"),
        ({"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 8]}, "malformed header"),
    ],
)
def test_a_malformed_tensor_is_refused_by_name(entry, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        unpack(body_of({"x": entry}, bytes(8)))


def body_of(entries, data):
    header = json.dumps(entries).encode()
    return bytearray(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("spans", "overlapping"),
    [
        ([(0, 8), (8, 16)], None),
        ([(8, 16), (0, 8)], None),
        ([(0, 8), (8, 8), (8, 16), (4, 4)], None),
        ([(0, 8), (0, 8)], "overlap"),
        ([(0, 8), (7, 9)], "overlap"),
        ([(0, 16), (4, 8)], "overlap"),
        ([(1, 16)] * 60, "overlap"),
    ],
)
def test_tensors_that_share_bytes_are_refused(spans, overlapping):
    entries = {
        f"t{number}": {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for number, (start, end) in enumerate(spans)
    }
    with pytest.raises(ProtocolError, match=overlapping) if overlapping else contextlib.nullcontext():
        assert len(unpack(body_of(entries, bytes(16)))) == len(spans)


@given(data=st.data())
def test_no_tensor_body_raises_anything_but_a_protocol_error(data):
    body = joined({"x": torch.ones(3, 5), "y": torch.ones(2, dtype=torch.int16)})
    for _ in range(data.draw(st.integers(1, 5))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(0, len(body)))]
    with contextlib.suppress(ProtocolError):
        unpack(body)


# -- a live server, without ranks --------------------------------------------------------------------------------


@pytest.fixture
def rank(tmp_path):
    rank = Rank(tmp_path)
    yield rank
    rank.release.set()
    rank.server.close()


@pytest.mark.parametrize(
    ("header", "body", "complaint"),
    [
        (b'{"type":"unload"}', b"", "id"),
        (b'{"type":"unload","id":3,"extra":1}', b"", "extra"),
        (b'{"type":"nonsense","id":3}', b"", "nonsense"),
        (b'{"type":"unload","id":3}', b"short", "cut short"),
        (b'{"type":"unload","id":3}', bytes(8), "malformed header"),
        (b"[" * 100_000, b"", "Malformed"),
        (b"\xff\xfe", b"", "Malformed"),
        (b"", b"", "Malformed"),
    ],
)
def test_a_malformed_message_is_answered_and_the_connection_goes_on(rank, header, body, complaint):
    stream = rank.connect()
    send_raw(stream, header, body)
    reply = receive(stream)
    assert reply.code == "protocol"
    assert complaint in reply.message
    stream.send(prompt(4))
    assert receive(stream) == messages.Result(id=4)


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not a frame"),
        (PREFIX.pack(MAGIC, frames.MAX_HEADER + 1, 0), "over the limit"),
        (PREFIX.pack(MAGIC, 10, (1 << 20) + 1), "over the limit"),
        (PREFIX.pack(MAGIC, 10, 1 << 63), "over the limit"),
        (PREFIX.pack(MAGIC, 10, 0) + b"half", "stopped in the middle"),
        (MAGIC[:2], "stopped in the middle"),
    ],
)
def test_a_stream_out_of_step_is_told_and_closed(rank, raw, complaint):
    stream = rank.connect()
    stream._sock.sendall(raw)
    assert complaint in receive(stream).message
    assert stream.receive(5) is None
    assert answers(rank)


def test_memory_is_taken_as_a_body_comes_not_as_it_is_claimed():
    ours, theirs = socket.socketpair()
    stream = frames.FrameSocket(theirs, stall_timeout=0.5)
    ours.sendall(PREFIX.pack(MAGIC, 2, frames.MAX_BODY) + b"{}" + bytes(1000))
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="stopped in the middle"):
        stream.receive()
    assert tracemalloc.get_traced_memory()[1] < 4 * frames.CHUNK
    tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 1, frames.CHUNK - 1, frames.CHUNK, frames.CHUNK + 1, 3 * frames.CHUNK + 5])
def test_bodies_of_all_sizes_arrive_whole(size):
    ours, theirs = socket.socketpair()
    sent = bytes(range(256)) * (size // 256 + 1)
    sender = threading.Thread(target=ours.sendall, args=(PREFIX.pack(MAGIC, 2, size) + b"{}" + sent[:size],))
    sender.start()
    assert frames.FrameSocket(theirs).receive() == (b"{}", sent[:size])
    sender.join()


def test_an_oversized_reply_is_refused_by_the_sender(rank):
    stream = rank.connect()
    stream.max_body = 100
    with pytest.raises(ProtocolError, match="over the limit"):
        stream.send(prompt(1), {"x": torch.ones(100)})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
kinds = st.sampled_from(["load", "encode_text", "sample", "decode", "unload", "status", "cancel", "hello", "x"])
some_json = st.builds(
    lambda kind, rest: json.dumps({**rest, "type": kind}).encode(),
    kinds,
    st.dictionaries(st.sampled_from(["id", "ref", "prompt", "model", "layout", "cfg", "seed", "sampler"]), values),
)
framed = st.builds(
    lambda header, body, magic: PREFIX.pack(magic, len(header), len(body)) + header + body,
    some_json | st.binary(max_size=200),
    st.binary(max_size=200),
    st.just(MAGIC) | st.binary(min_size=4, max_size=4),
)
lying = st.builds(
    lambda header, body, rest: PREFIX.pack(MAGIC, header, body) + rest,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=50),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    rank = Rank(tmp_path_factory.mktemp("fuzzed"))
    yield rank
    rank.server.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chunks=st.lists(framed | lying | st.binary(max_size=300), min_size=1, max_size=4), greeted=st.booleans())
def test_no_bytes_hurt_the_server(fuzzed, chunks, greeted):
    stream = fuzzed.connect(greet=greeted)
    try:
        for chunk in chunks:
            stream._sock.sendall(chunk)
        stream._sock.shutdown(socket.SHUT_WR)
        while (frame := stream.receive(5)) is not None:
            frames.parse(messages.FROM_SIDECAR, frame.header)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server hung up first
    finally:
        stream.close()
    assert answers(fuzzed)


# -- the queue ---------------------------------------------------------------------------------------------------


def hold(rank, request=1):
    """A client whose request is under way and stays so."""
    stream = rank.connect()
    stream.send(prompt(request, "hold"))
    wait_for(lambda: rank.server.running is not None)
    return stream


def test_status_is_answered_while_a_request_runs(rank):
    holder, other = hold(rank), rank.connect()
    other.send(messages.Status(id=5))
    assert receive(other) == messages.Result(id=5, data={"busy": 1})
    rank.release.set()
    assert receive(holder) == messages.Result(id=1)


def test_requests_of_several_clients_run_one_at_a_time_in_order(rank):
    first, second = hold(rank), rank.connect()
    second.send(prompt(8))
    first.send(prompt(2))
    wait_for(lambda: len(rank.server._queue) == 2)
    assert len(rank.served) == 1
    rank.release.set()
    assert [receive(first), receive(second), receive(first)] == [messages.Result(id=n) for n in (1, 8, 2)]


def test_cancel_ends_only_the_request_that_it_names(rank):
    first, second = hold(rank), rank.connect()
    for request in (8, 9):
        second.send(prompt(request))
    second.send(messages.Cancel(id=1))
    second.send(messages.Cancel(id=8))
    assert (receive(second).id, rank.server.running.cancelled) == (8, False)
    first.send(messages.Cancel(id=1))
    assert receive(first).code == "cancelled"
    assert receive(second) == messages.Result(id=9)


def test_a_client_that_leaves_takes_its_requests_along(rank):
    leaving, staying = hold(rank), rank.connect()
    leaving.send(prompt(2))
    staying.send(prompt(3))
    wait_for(lambda: len(rank.server._queue) == 2)
    leaving.close()
    assert receive(staying) == messages.Result(id=3)
    assert [work.request.id for work in rank.served] == [1, 3]


def test_an_id_in_use_and_a_full_queue_are_refused(rank):
    stream = hold(rank)
    stream.send(prompt(1))
    assert "already under way" in receive(stream).message
    for request in range(2, MAX_QUEUED + 3):
        stream.send(prompt(request))
    assert receive(stream) == messages.Failure(
        id=MAX_QUEUED + 2, code="protocol", message=f"{MAX_QUEUED} requests are waiting already."
    )


def test_shutdown_ends_work_of_others_only_by_force_and_tells_them_who_it_was(rank):
    holder, other = hold(rank), rank.connect()
    holder.send(prompt(2))
    wait_for(lambda: rank.server._queue)
    other.send(messages.Shutdown(id=3, by="process 7 (cli stop)"))
    refused = receive(other)
    assert (refused.code, refused.message) == ("user", "The sidecar is at work for another client (encode text).")
    other.send(messages.Shutdown(id=4, by="process 7 (cli stop)", force=True))
    stopped = [receive(holder), receive(holder)]
    assert {each.id for each in stopped} == {1, 2}
    assert {(each.code, each.message) for each in stopped} == {
        ("crash", "The sidecar was stopped by process 7 (cli stop).")
    }
    assert receive(other) == messages.Result(id=4)


def test_what_its_own_client_has_cancelled_or_left_keeps_no_sidecar_from_ending(rank):
    holder, other = hold(rank), rank.connect()
    holder.send(messages.Cancel(id=1))
    wait_for(lambda: not rank.server.running or rank.server.running.cancelled)
    other.send(messages.Shutdown(id=3))
    assert receive(holder).code == "cancelled"
    assert receive(other) == messages.Result(id=3)


def test_a_client_that_does_not_read_holds_nobody_up(rank):
    deaf = rank.connect()
    for request in range(1, 9):
        deaf.send(prompt(request), {"x": torch.ones(200_000)})
    began = time.monotonic()
    assert answers(rank)
    assert time.monotonic() - began < 2


def test_a_socket_deeper_than_an_address_can_say_is_reached(tmp_path):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    rank = Rank(deep)
    assert answers(rank)
    rank.server.close()
