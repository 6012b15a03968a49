"""What every message is, and the two with which a connection begins."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

PROTOCOL_VERSION = 1


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Hello(Message):
    """First frame of every connection, client to sidecar. `token` is needed on TCP."""

    type: Literal["hello"] = "hello"
    version: int
    token: str = ""


class Welcome(Message):
    """The sidecar's reply to a valid `Hello`."""

    type: Literal["welcome"] = "welcome"
    version: int
    ranks: int
    device: str
    pid: int
