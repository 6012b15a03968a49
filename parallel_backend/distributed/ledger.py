"""Bytes and waits of every collective."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """What this rank sent to other ranks."""

    bytes: int = 0
    messages: int = 0


@dataclass
class Ledger:
    """Bytes and messages sent by this rank, per axis and operation."""

    sent: dict[tuple[str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))

    def record(self, axis: str, operation: str, bytes: int, messages: int) -> None:
        traffic = self.sent[axis, operation]
        traffic.bytes += bytes
        traffic.messages += messages

    def bytes_on(self, axis: str) -> int:
        return sum(traffic.bytes for (name, _), traffic in self.sent.items() if name == axis)

    def messages_on(self, axis: str) -> int:
        return sum(traffic.messages for (name, _), traffic in self.sent.items() if name == axis)

    def reset(self) -> None:
        self.sent.clear()

    def summary(self) -> dict[str, dict[str, int]]:
        """{"axis operation": {"bytes": …, "messages": …}}, ready for JSON."""
        return {f"{axis} {operation}": vars(traffic).copy() for (axis, operation), traffic in self.sent.items()}
