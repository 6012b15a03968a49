"""Frames that no honest client of rank 0 sends: each is made from a request, a tensor file or a greeting by dice."""

from __future__ import annotations

import json
import random
from typing import Any

from parallel_backend.protocol import frames, handshake, messages
from parallel_backend.protocol.frames import MAGIC, PREFIX

Header = dict[str, Any]

NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**30), 1.5, 1e308, -1e308, 1e-320)
OTHERS = (None, True, False, "NaN", "", "\x00", "x" * 5000, "é\u202e", [], {}, [[]], {"a": {"b": []}}, [None] * 50)
PATHS = ("../../etc/passwd", "/dev/zero", {"type": "cancel"}, "f" * 32, "\ud800")
INFINITE = (float("nan"), float("inf"), -float("inf"))
NASTY = (*NUMBERS, *OTHERS, *PATHS, *INFINITE)

MODEL, LAYOUT = {"path": "/nope"}, {"ulysses_degree": 2}
REQUESTS: tuple[Header, ...] = (
    {"type": "encode_text", "id": 1, "text": {"path": "/nope"}, "prompt": "x"},
    {"type": "find_changes", "id": 1, "digests": ["0" * 32]},
    {"type": "keep_changes", "id": 1, "digests": []},
    {
        **{"type": "sample", "id": 1, "model": MODEL, "layout": LAYOUT, "sampler": "euler", "seed": 1, "cfg": 1.0},
        **{"positive": [{"guidance": 3.5, "area": [1, 2, 3, 4]}], "negative": [], "batch_index": [0, 1]},
        **{"schedule": {"scheduler": "simple", "steps": 2}, "sampling_shift": 1.0},
        **{"adapters": {"files": [{"path": "/x"}]}, "controls": [{"net": {"path": "/c"}}]},
    },
    {
        **{"type": "predict", "id": 1, "model": MODEL, "layout": LAYOUT, "run": "0" * 32, "conditions": ["1" * 32]},
        **{"run_conditions": {"1" * 32: {"guidance": 1.0}}, "residuals": {"input": [0, None]}},
    },
    {"type": "end_run", "id": 1, "run": "0" * 32},
    {"type": "decode", "id": 1, "vae": {"path": "/nope"}, "tile_size": 0},
    {"type": "encode_image", "id": 1, "vae": {"path": "/nope"}},
    {"type": "unload", "id": 1},
    {"type": "status", "id": 1},
)


def mutated(value: Any, dice: random.Random) -> Any:
    """`value` with one random place changed."""
    if isinstance(value, dict) and value and dice.random() < 0.8:
        key, changed, what = dice.choice(list(value)), dict(value), dice.random()
        if what < 0.15:
            del changed[key]
        elif what < 0.25:
            changed[dice.choice(["zz", "__class__", "", f"{key} "])] = dice.choice(NASTY)
        else:
            changed[key] = mutated(value[key], dice) if what < 0.6 else dice.choice(NASTY)
        return changed
    if isinstance(value, list) and value and dice.random() < 0.7:
        changed = list(value)
        changed[dice.randrange(len(changed))] = mutated(dice.choice(changed), dice)
        return changed
    return dice.choice(NASTY)


def scribbled(data: bytes, dice: random.Random) -> bytes:
    """`data` with some bytes changed."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 6)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


def bad_header(dice: random.Random) -> bytes:
    request, what = dice.choice(REQUESTS), dice.random()
    text = json.dumps(request).encode()
    if what < 0.65:
        return json.dumps(mutated(request, dice)).encode()
    if what < 0.73:
        return text[: dice.randrange(len(text))]
    if what < 0.83:
        return scribbled(text, dice)
    if what < 0.87:
        depth = dice.choice([100, 1000, 20_000, 100_000])
        return b'{"type":"status","id":1,"x":' + b"[" * depth + b"]" * depth + b"}"
    if what < 0.9:
        return b'{"type":"status","type":"unload","id":"y","id":"z"}'
    if what < 0.94:
        return b'{"type":"status","id":' + b"9" * dice.choice([20, 400, 4400, 50_000]) + b"}"
    if what < 0.97:
        return dice.randbytes(dice.randrange(200))
    return b'{"type":"encode_text","id":1,"text":{"path":"' + dice.choice([b"\\ud800", b"\xff", b"\xc0\x80"]) + b'"}}'


OFFSETS = (
    *([-4, 0], [0, 2**63], [8, 0], [0, 9], [2**64, 2**64], [0.5, 1], [0], [0, 0, 0], "00", None, [True, False]),
    *([10**30, 10**30], [0, 10**400], [1, 5], [4, 8]),
)
SHAPES = (
    *([2**63], [2**32, 2**32], [-1], [-1, -4], [0, 2**63], [0, 2**62, 2**62], [1] * 17, [1] * 16, [0] * 16, [[1]]),
    *("3", None, [1.0], [True], [10**50, 0], [0, -1], [2**31, 2**31, 0], [10**400], [0, 1 << 40], []),
)
DTYPES = ("F4", "", "F64", "I4", "__class__", None, 3, "C64", "U16", "BOOL", "F8_E8M0", "F8_E5M2", "x" * 1000)


def file_of(entries: Any, data: bytes, header_size: int | None = None) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(header) if header_size is None else header_size).to_bytes(8, "little") + header + data


def bad_body(dice: random.Random) -> bytes:
    size = dice.choice([0, 1, 7, 8, 64, 256])
    data, what = bytes(size), dice.random()
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size // 4 * 4]}
    if what < 0.1:
        return dice.randbytes(dice.randrange(1, 64))
    if what < 0.2:
        return file_of({"a": entry}, data, dice.choice([0, 1, 2**63, 2**64 - 1, 10**6, 3]))
    if what < 0.35:
        return file_of({"a": entry | {"data_offsets": dice.choice(OFFSETS)}}, data)
    if what < 0.55:
        empty = {"data_offsets": [0, 0]} if dice.random() < 0.5 else {}
        return file_of({"a": entry | {"shape": dice.choice(SHAPES)} | empty}, data)
    if what < 0.65:
        return file_of({"a": entry | {"dtype": dice.choice(DTYPES)}}, data)
    if what < 0.67:
        return file_of({str(number): entry for number in range(dice.choice([4097, 5000]))}, data)
    if what < 0.72:
        starts = [dice.randrange(size + 1) for _ in range(dice.randint(2, 60))]
        views = {
            f"t{number}": {"dtype": "U8", "shape": [size - start], "data_offsets": [start, size]}
            for number, start in enumerate(starts)
        }
        return file_of(views, data)
    if what < 0.8:
        return file_of(b"[" * 5000, data)
    if what < 0.85:
        return file_of({"__metadata__": {"a": "b"}, "a": entry}, data)
    if what < 0.9:
        return file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8"}}', data)
    return scribbled(file_of({"a": entry, "b": entry}, data), dice)


def framed(header: bytes, body: bytes = b"") -> bytes:
    return PREFIX.pack(MAGIC, len(header), len(body)) + header + body


def bad_framing(dice: random.Random) -> bytes:
    status = b'{"type":"status","id":1}'
    return dice.choice(
        [
            dice.randbytes(dice.randrange(1, 40)),
            PREFIX.pack(MAGIC, 2**32 - 1, 0),
            PREFIX.pack(MAGIC, 2, 2**64 - 1) + b"{}",
            PREFIX.pack(MAGIC, 100, 0) + b"{",
            PREFIX.pack(b"pDiT", 2, 0) + b"{}",
            PREFIX.pack(MAGIC, 2, 2**32 - 1)[: dice.randrange(1, PREFIX.size)],
            framed(status, bytes(100))[: -dice.randrange(1, 90)],
            PREFIX.pack(MAGIC, len(status), frames.MAX_BODY + 1) + status,
            scribbled(framed(status), dice),
        ]
    )


def bad_greeting(dice: random.Random) -> bytes:
    hello: Header = {"type": "hello", "version": messages.PROTOCOL_VERSION, "nonce": dice.randbytes(32).hex()}
    proof = json.dumps({"type": "proof", "proof": dice.choice(["0" * 64, hello["nonce"], "", None])}).encode()
    return dice.choice(
        [
            framed(json.dumps(mutated(hello, dice)).encode()),
            framed(json.dumps(hello).encode()) + framed(proof),
            framed(json.dumps(hello).encode()) + framed(bad_header(dice)[:4000]),
            framed(json.dumps(hello).encode(), b"body"),
            PREFIX.pack(MAGIC, handshake.MAX_HELLO + 1, 0),
            framed(bad_header(dice)),
            framed(b"[" * 4000),
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            dice.randbytes(dice.randrange(1, 64)),
        ]
    )
