"""How a client and a sidecar meet. Each proves to the other that it knows the token, which itself is never sent:

    client    Hello(version, nonce)     ->
              <-  Challenge(nonce)          sidecar
              Proof(proof)              ->
              <-  Welcome(..., proof)

A proof is the HMAC-SHA256, keyed with the token, of whose proof it is and of both nonces: what is overheard is of no
use in another connection. Nothing is encrypted, though; between hosts that share their network, use a tunnel.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import TypeVar

from pydantic import TypeAdapter

from . import messages
from .errors import ProtocolError
from .frames import MAX_HEADER, FrameSocket, loose, parse

MAX_HELLO = 4096
"""Bytes of a header in the handshake."""
PATIENCE_S = 10.0
"""For the whole handshake."""

AnyReply = TypeVar("AnyReply", bound=messages.Message)

_HELLO, _PROOF = TypeAdapter(messages.Hello), TypeAdapter(messages.Proof)


def greet(stream: FrameSocket, token: str, patience: float = PATIENCE_S) -> messages.Welcome:
    """The client's half. Raises `ProtocolError` with the sidecar's reason when it is refused."""
    mine = secrets.token_hex(32)
    with stream.within(patience):
        stream.send(messages.Hello(version=messages.PROTOCOL_VERSION, nonce=mine))
        challenge = _reply(stream, messages.Challenge)
        nonces = mine, challenge.nonce
        stream.send(messages.Proof(proof=_proof(token, "client", *nonces)))
        welcome = _reply(stream, messages.Welcome)
    if not hmac.compare_digest(welcome.proof, _proof(token, "sidecar", *nonces)):
        raise ProtocolError("What answers there does not know the token.")
    return welcome


def admit(
    stream: FrameSocket,
    token: str,
    welcome: messages.Welcome,
    patience: float = PATIENCE_S,
    is_full: Callable[[], bool] = lambda: False,
) -> None:
    """The sidecar's half. Raises `ProtocolError` for a refused client, after sending it the reason."""
    full_limits = stream.max_header, stream.max_body
    stream.max_header, stream.max_body = MAX_HELLO, 0
    try:
        with stream.within(patience):
            mine = secrets.token_hex(32)
            nonces = _check_hello(_header(stream)).nonce, mine
            stream.send(messages.Challenge(nonce=mine))
            proof = parse(_PROOF, _header(stream)).proof
        if not hmac.compare_digest(proof, _proof(token, "client", *nonces)):
            raise ProtocolError("Wrong token.")
        if is_full():
            raise ProtocolError("No more clients can connect to the sidecar.")
    except ProtocolError as error:
        stream.max_header = MAX_HEADER
        stream.send(messages.Failure(id=0, code="protocol", message=str(error)))
        stream.hang_up()
        raise
    stream.max_header, stream.max_body = full_limits
    stream.send(welcome.model_copy(update={"proof": _proof(token, "sidecar", *nonces)}))


def _proof(token: str, whose: str, of_client: str, of_sidecar: str) -> str:
    text = f"ParallelDiT {whose} {of_client} {of_sidecar}"
    return hmac.new(token.encode(errors="surrogateescape"), text.encode(), hashlib.sha256).hexdigest()


def _header(stream: FrameSocket) -> bytes:
    frame = stream.receive()
    if frame is None:
        raise ProtocolError("The other side closed the connection during the handshake.")
    return frame.header


def _reply(stream: FrameSocket, kind: type[AnyReply]) -> AnyReply:
    reply = parse(messages.FROM_SIDECAR, _header(stream))
    if isinstance(reply, messages.Failure):
        raise ProtocolError(reply.message)
    if not isinstance(reply, kind):
        raise ProtocolError(f"The sidecar answered the handshake with {reply.type!r}.")
    return reply


def _check_hello(header: bytes) -> messages.Hello:
    """The version comes first: a Hello of another version may have another shape."""
    version = loose(header).get("version")
    if type(version) is int and version != messages.PROTOCOL_VERSION:
        raise ProtocolError(
            f"The client speaks protocol version {version}, the sidecar version {messages.PROTOCOL_VERSION}.",
        )
    return parse(_HELLO, header)
