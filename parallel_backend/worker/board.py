"""Where ranks tell each other, outside of collectives, that they live and how they failed; it works while collectives
are stuck.

On one host that is files of the sidecar's own directory, which no other user can enter. Between hosts it is torchrun's
TCP store, where everybody may write who reaches its port. What is read is checked in both.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeVar

from pydantic import Field, ValidationError

from ..protocol import records
from ..protocol.messages import Message

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

log = logging.getLogger(__name__)

SLOT_BYTES = 8
MAX_NOTE = 1 << 16
"""Bytes of a note between hosts; a longer one is nobody's of ours."""

Rank = Annotated[int, Field(ge=0, lt=1 << 31)]


class Failed(Message):
    """How `rank` left a request, or that it cannot: "stalled"."""

    rank: Rank
    kind: Literal["user", "crash", "lost", "stalled"]
    message: str
    hint: str


class LostLog(Message):
    """The log of `rank` cannot be written, for the reason of that number."""

    rank: Rank
    errno: Annotated[int, Field(ge=0, lt=1 << 16)]

    def __str__(self) -> str:
        return f"Log lines are lost: {records.rank_log(self.rank)}: {os.strerror(self.errno)}."


class Board(Protocol):
    """Of all ranks. Calls do not wait for other ranks."""

    def beat(self, rank: int, count: int) -> None: ...

    def beat_of(self, rank: int) -> int:
        """The last count; 0 before the first one."""
        ...

    def tell_failure(self, sequence: int, failed: Failed) -> None:
        """That request number `sequence` failed; the first to say it is heard."""
        ...

    def failure(self, sequence: int) -> Failed | None: ...

    def forget_failure(self, sequence: int) -> None: ...

    def tell_cancel(self, sequence: int) -> None:
        """That the client has cancelled request number `sequence`."""
        ...

    def cancelled(self) -> int:
        """The last request that was cancelled; 0 before the first one."""
        ...

    def tell_lost_log(self, lost: LostLog) -> None: ...

    def lost_log(self) -> LostLog | None: ...


class FileBoard:
    """Of one host. A file of numbers, which `create` has made, holds the beats; so a full disk loses none, and it stays
    readable when the directory is removed."""

    def __init__(self, life: Path, ranks: int) -> None:
        self._life = life
        self._lost_log_at, self._cancelled_at = ranks, ranks + 1
        self._file = os.open(life / records.BoardFile, os.O_RDWR | os.O_CLOEXEC)

    @classmethod
    def create(cls, life: Path, ranks: int) -> FileBoard:
        with open(os.open(life / records.BoardFile, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(bytes(SLOT_BYTES * (ranks + 2)))
        return cls(life, ranks)

    def beat(self, rank: int, count: int) -> None:
        self._write(rank, count)

    def beat_of(self, rank: int) -> int:
        return self._read(rank)

    def tell_failure(self, sequence: int, failed: Failed) -> None:
        records.write_first(self._life / records.failed_file(sequence), failed)

    def failure(self, sequence: int) -> Failed | None:
        return records.read(self._life / records.failed_file(sequence), Failed)

    def forget_failure(self, sequence: int) -> None:
        (self._life / records.failed_file(sequence)).unlink(missing_ok=True)

    def tell_cancel(self, sequence: int) -> None:
        self._write(self._cancelled_at, sequence)

    def cancelled(self) -> int:
        return self._read(self._cancelled_at)

    def tell_lost_log(self, lost: LostLog) -> None:
        self._write(self._lost_log_at, (lost.rank << 16 | lost.errno) + 1)

    def lost_log(self) -> LostLog | None:
        number = self._read(self._lost_log_at) - 1
        return None if number < 0 else LostLog(rank=number >> 16, errno=number & 0xFFFF)

    def _write(self, slot: int, number: int) -> None:
        os.pwrite(self._file, number.to_bytes(SLOT_BYTES, "little"), SLOT_BYTES * slot)

    def _read(self, slot: int) -> int:
        return int.from_bytes(os.pread(self._file, SLOT_BYTES, SLOT_BYTES * slot), "little")


AnyNote = TypeVar("AnyNote", bound=Message)


class StoreBoard:
    """Between hosts. Raises `RuntimeError` when the store is gone."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._refused: set[str] = set()

    def beat(self, rank: int, count: int) -> None:
        self._store.set(f"beat/{rank}", str(count))

    def beat_of(self, rank: int) -> int:
        return self._count(f"beat/{rank}")

    def tell_failure(self, sequence: int, failed: Failed) -> None:
        self._store.compare_set(f"failed/{sequence}", "", failed.model_dump_json())

    def failure(self, sequence: int) -> Failed | None:
        return self._note(f"failed/{sequence}", Failed)

    def forget_failure(self, sequence: int) -> None:
        self._store.delete_key(f"failed/{sequence}")

    def tell_cancel(self, sequence: int) -> None:
        self._store.set("cancelled", str(sequence))

    def cancelled(self) -> int:
        return self._count("cancelled")

    def tell_lost_log(self, lost: LostLog) -> None:
        self._store.set("lost log", lost.model_dump_json())

    def lost_log(self) -> LostLog | None:
        return self._note("lost log", LostLog)

    def _note(self, key: str, kind: type[AnyNote]) -> AnyNote | None:
        """A note, None where there is none or it is nobody's of ours."""
        value = self._value(key)
        if not value:
            return None
        try:
            return kind.model_validate_json(value)
        except ValidationError:
            if key not in self._refused:
                self._refused.add(key)
                log.warning("the store holds %d bytes under %r that no rank has written", len(value), key)
            return None

    def _count(self, key: str) -> int:
        found = self._value(key)
        return int(found) if found.isdigit() and len(found) < 20 else 0

    def _value(self, key: str) -> bytes:
        value = self._store.get(key) if self._store.check([key]) else b""
        return value if len(value) <= MAX_NOTE else b"?"
