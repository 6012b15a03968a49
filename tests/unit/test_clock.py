"""A clock that stands still while its process is suspended."""

from __future__ import annotations

import pytest
from paralleldit.parallel_backend.machine import clock


@pytest.mark.parametrize(
    ("questions", "counted"),
    [((0.5, 1.0, 1.5), 1.5), ((1.0, 600.0, 601.0), 1.0 + clock.MOST_S + 1.0), ((9000.0,), clock.MOST_S), ((), 0.0)],
)
def test_time_without_questions_hardly_counts(monkeypatch, questions, counted):
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    own = clock.RunningClock()
    for question in questions:
        now[0] = 100.0 + question
        own.now()
    assert own.now() == pytest.approx(counted)
