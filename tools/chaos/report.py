"""What many faults have cost, as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

HEAD = ("", "faults", "hit", "errors", "name the cause", "lost prompts", "orphans", "median s", "largest s")


def tables(records: Sequence[dict[str, Any]]) -> list[str]:
    """By phase, by target, and all. `records`: lines of the log."""
    lines: list[str] = []
    for title, key in (("phase", _phase), ("target", _target)):
        groups: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            groups.setdefault(key(record), []).append(record)
        lines += _table(title, [*sorted(groups.items()), ("all", list(records))])
    lost = [(record, text) for record in records for text in record["lost_errors"]]
    lines += [f"lost: number {record['number']}, {_phase(record)}, {_target(record)}: {text}" for record, text in lost]
    return lines


def _table(title: str, groups: Iterable[tuple[str, Sequence[dict[str, Any]]]]) -> list[str]:
    rows = [_row(name, records) for name, records in groups]
    return [f"| {' | '.join((title, *HEAD[1:]))} |", "|---" * len(HEAD) + "|", *rows, ""]


def _row(name: str, records: Sequence[dict[str, Any]]) -> str:
    seconds = [record["seconds"] for record in records if record["seconds"] is not None]
    errors = [record for record in records if record["error"]]
    cells = (
        *(name, len(records), sum(record["hit"] for record in records), len(errors)),
        *(sum(record["names_cause"] for record in errors), sum(record["lost"] for record in records)),
        sum(record["orphans"] for record in records),
        *(f"{measure(seconds):.2f}" if seconds else "" for measure in _MEASURES),
    )
    return f"| {' | '.join(map(str, cells))} |"


_MEASURES: tuple[Callable[[list[float]], float], ...] = (statistics.median, max)


def _phase(record: dict[str, Any]) -> str:
    return record["phase"]


def _target(record: dict[str, Any]) -> str:
    return f"{record['target']}, {record['signal']}"
