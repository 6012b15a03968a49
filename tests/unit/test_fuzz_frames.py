"""A short run of tools/fuzz_frames.py; `make fuzz` makes a long one."""

from __future__ import annotations

import json
import threading

import pytest
from paralleldit.tools import fuzz_frames
from paralleldit.tools.fuzz_frames import GROUP, Served, Tally


@pytest.fixture
def served(tmp_path):
    hook = threading.excepthook
    served = Served(tmp_path)
    yield served
    served.server.close()
    threading.excepthook = hook


def test_no_frame_hurts_the_server(served):
    tally = Tally()
    fuzz_frames.run(served, tally, seed=7, groups=60)
    assert tally.faults == []
    assert tally.sent.keys() == fuzz_frames.KINDS.keys()
    assert sum(tally.sent.values()) == sum(tally.answers.values()) == 60 * GROUP


def test_a_run_that_was_ended_goes_on_as_if_it_had_not_been(served, tmp_path):
    whole, first = Tally(), Tally()
    fuzz_frames.run(served, whole, seed=3, groups=22)
    fuzz_frames.run(served, first, seed=3, groups=17)
    fuzz_frames._write(tmp_path / "state", 3, first)
    second = fuzz_frames._read(tmp_path / "state", 3)
    fuzz_frames.run(served, second, seed=3, groups=22)
    assert (second.group, second.sent) == (22, whole.sent)
    assert sum(second.answers.values()) == sum(whole.answers.values())
    assert json.loads((tmp_path / "state").read_text())["group"] == 17
    with pytest.raises(SystemExit, match="another seed"):
        fuzz_frames._read(tmp_path / "state", 4)


def test_a_thread_that_dies_and_a_silent_server_are_found(served, monkeypatch):
    tally = Tally()
    threading.Thread(target=lambda: 1 / 0, name="reader").start()
    fuzz_frames.run(served, tally, seed=0, groups=5)
    assert tally.group == 1
    assert "reader died: ZeroDivisionError" in tally.faults[0]
    served.faults.clear()
    monkeypatch.setattr(fuzz_frames, "PATIENCE_S", 0.2)
    monkeypatch.setattr(served.server, "finish", lambda *_: None)
    tally = Tally(group=8)
    with pytest.raises((TimeoutError, OSError)):
        fuzz_frames.run(served, tally, seed=0, groups=10)
