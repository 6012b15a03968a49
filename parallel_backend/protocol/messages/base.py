"""What every message is, and those with which a connection begins (protocol/handshake.py)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL_VERSION = 2

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""A whole number. None in a message is larger: beyond, torch and others raise errors of their own."""
Index = Annotated[int, Field(ge=0, lt=1 << 31)]
Hex = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Hello(Message):
    """First frame of every connection, client to sidecar."""

    type: Literal["hello"] = "hello"
    version: Index
    nonce: Hex


class Challenge(Message):
    """The sidecar's reply to a valid `Hello`."""

    type: Literal["challenge"] = "challenge"
    nonce: Hex


class Proof(Message):
    """The client knows the token."""

    type: Literal["proof"] = "proof"
    proof: Hex


class Welcome(Message):
    """The sidecar's reply to a client that knows the token. `proof`: so does the sidecar."""

    type: Literal["welcome"] = "welcome"
    version: Index
    ranks: Index
    device: str
    pid: Index
    proof: Hex | Literal[""] = ""
