"""Sends the weight changes that the ranks lack."""

from __future__ import annotations

from collections.abc import Sequence

from ...launcher.client import Client
from ...parallel_backend.protocol.messages import FindChanges, KeepChanges
from ..handles import SentChange
from . import session

AT_ONCE = 256
"""Changes in one message."""


def deliver(client: Client, changes: Sequence[SentChange]) -> None:
    """Have the ranks keep the tensors of `changes`, of which only those are sent that they do not have."""
    if not changes:
        return
    by_digest = {change.message.digest: change.tensors for change in changes}
    found = session.ask(client, FindChanges(id=0, digests=tuple(by_digest)))
    missing = found.result.data["missing"]
    assert isinstance(missing, list)
    for start in range(0, len(missing), AT_ONCE):
        digests = tuple(missing[start : start + AT_ONCE])
        tensors = {
            f"{index}.{role}": tensor
            for index, digest in enumerate(digests)
            for role, tensor in by_digest[digest].items()
        }
        session.ask(client, KeepChanges(id=0, digests=digests), tensors)
