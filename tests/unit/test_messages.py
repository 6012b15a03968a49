"""Every number of every message is bounded: what one rank cannot compute with, none is asked to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from paralleldit.parallel_backend.protocol import messages
from paralleldit.parallel_backend.protocol.errors import ProtocolError
from paralleldit.parallel_backend.protocol.frames import parse
from pydantic import TypeAdapter

FREE = {"data"}
"""What a result tells, which only the sidecar writes."""
SCHEMAS = [messages.FROM_CLIENT, messages.FROM_SIDECAR, TypeAdapter(messages.Hello), TypeAdapter(messages.Proof)]


def numbers(schema: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of a number in `schema`, and where it is."""
    if isinstance(schema, list):
        for each in schema:
            yield from numbers(each, place)
    elif isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield place, schema
        for name, each in schema.items():
            if name not in FREE:
                yield from numbers(each, f"{place}.{name}")


BOUNDS = ({"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"})


def test_every_number_has_bounds():
    found = {place: number for schema in SCHEMAS for place, number in numbers(schema.json_schema())}
    assert len(found) > 50
    unbounded = [place for place, number in found.items() if any(not side & number.keys() for side in BOUNDS)]
    assert unbounded == []


SAMPLE: dict[str, Any] = {
    "type": "sample",
    "id": 1,
    "model": {"path": "/m"},
    "layout": {},
    "positive": [{}],
    "sampler": "euler",
    "schedule": {"scheduler": "simple", "steps": 2},
    "seed": 0,
    "controls": [{"net": {"path": "/c"}}],
    "adapters": {
        "files": [{"path": "/l"}],
        "changes": [{"key": "k", "digest": "0" * 32, "strength": 1.0, "rows": [0, 1]}],
    },
    "cfg_norm": 1.0,
    "sampling_shift": 1.0,
    "batch_index": [0],
}
PLACES = [
    ("cfg",),
    ("cfg_norm",),
    ("seed",),
    ("sampling_shift",),
    ("batch_index", 0),
    ("positive", 0, "guidance"),
    ("positive", 0, "strength"),
    ("positive", 0, "start"),
    ("schedule", "denoise"),
    ("schedule", "steps"),
    ("controls", 0, "strength"),
    ("controls", 0, "end"),
    ("controls", 0, "mode"),
    ("adapters", "files", 0, "strength"),
    ("adapters", "changes", 0, "strength"),
    ("adapters", "changes", 0, "rows", 1),
    ("layout", "ulysses_degree"),
    ("layout", "num_patches"),
    ("layout", "warmup_steps"),
    ("start_step",),
    ("end_step",),
    ("id",),
]
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "-1" + "0" * 400, '"1"', "true", "[]"]


def with_number(place, number):
    text = json.loads(json.dumps(SAMPLE))
    inner = text
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = "HERE"
    return json.dumps(text).replace('"HERE"', number).encode()


def test_the_request_is_well_formed_but_for_its_number():
    assert parse(messages.FROM_CLIENT, json.dumps(SAMPLE).encode())


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_no_number_that_is_none_passes(place):
    for number in NUMBERS:
        with pytest.raises(ProtocolError, match="Malformed message"):
            parse(messages.FROM_CLIENT, with_number(place, number))
