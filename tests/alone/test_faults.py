"""Processes that die, stop or are stopped by others at the wrong moment: nothing that had not begun is lost."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from paralleldit.launcher import lifecycle
from paralleldit.launcher.client import SidecarError
from paralleldit.launcher.lifecycle import current, ensure_sidecar
from paralleldit.nodes import host
from paralleldit.parallel_backend.errors import UserError
from paralleldit.tests.alone.sidecars import ANOTHER, HANG_S, alive, ask, launcher, pids_of, spec_in, wait_for
from paralleldit.tools.chaos.faults import Fault, Prompter, inject

KILL, STOP = signal.SIGKILL, signal.SIGSTOP


@pytest.fixture(scope="module")
def prompter(tmp_path_factory):
    prompter = Prompter(tmp_path_factory.mktemp("chaos"))
    host.use(prompter)
    yield prompter
    host.use(None)
    lifecycle.stop(prompter.spec.slot)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("idle", "rank 0", KILL),
        Fault("sent", "rank 1", KILL),
        Fault("start", "torchrun", KILL),
        Fault("first step", "rank 1", KILL),
    ],
    ids=lambda fault: f"{fault.phase}-{fault.target}",
)
def test_no_prompt_is_lost_that_had_not_begun(prompter, fault):
    """`make chaos` injects a thousand."""
    outcome = inject(fault, prompter, random.Random(1))
    assert outcome.hit
    assert (outcome.lost_errors, outcome.orphans) == ((), 0)
    assert outcome.error or fault.phase != "first step"
    assert outcome.names_cause


# -- others who share the sidecar --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    spec = spec_in(tmp_path_factory.mktemp("shared"))
    yield spec
    lifecycle.stop(spec.slot)
    assert alive(current(spec.slot)) == []


class Working:
    """A request under way in a thread of its own; `error`: how it ended."""

    def __init__(self, client):
        self.error = None
        self.began = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(client,))
        self._thread.start()
        assert self.began.wait(10)

    def _run(self, client):
        try:
            ask(client, "steps", on_event=lambda *_: self.began.set())
        except (SidecarError, UserError) as error:
            self.error = error

    def ended(self):
        self._thread.join(20)
        return str(self.error)


def test_a_sidecar_at_work_is_not_ended_by_others_unless_they_force_it(spec):
    client = ensure_sidecar(spec, owned=False)
    working = Working(client)
    code, _, err = launcher(spec.directory, "stop")
    assert code == 1
    assert "at work for another client (encode text, step" in err
    code, _, err = launcher(
        spec.directory, "start", "--ranks", "1", "--device", "cpu", "--worker", "tests.ranks.stand_in"
    )
    assert code == 1
    assert "A sidecar of 2 ranks on cpu is at work for another client; this one asks for 1 ranks on cpu" in err
    assert working.error is None
    assert launcher(spec.directory, "stop", "--force")[0] == 0
    assert "The sidecar was stopped by process " in working.ended()
    assert isinstance(working.error, SidecarError)
    assert len(set(pids_of(ensure_sidecar(spec)))) == 2


# -- suspended ---------------------------------------------------------------------------------------------------


def test_what_was_suspended_as_a_whole_for_longer_than_the_limit_goes_on(tmp_path):
    """As `docker pause` does, or a laptop that sleeps."""
    spec = spec_in(tmp_path / "run", hang_timeout=2 * HANG_S)
    code = f"""{ANOTHER}
client = ensure_sidecar({spec!r})
request = messages.EncodeText(id=0, text=messages.TextRef(path="/none"), prompt="some_steps")
print("began", flush=True)
print(client.request(request)[0].data["sum"])
"""
    user = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert user.stdout.readline() == "began\n"
    time.sleep(1)
    life = current(spec.slot)
    pids = [user.pid, *(process.pid for process in alive(life))]
    for number, seconds in ((signal.SIGSTOP, 2 * HANG_S + 3), (signal.SIGCONT, 0)):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(seconds)
    assert user.communicate(timeout=30)[0] == "1.0\n"
    assert life.end is None
    lifecycle.stop(spec.slot)


@pytest.mark.parametrize("target", ["torchrun", "rank 1"])
def test_a_process_that_is_stopped_while_the_sidecar_starts_is_named_in_seconds(tmp_path, monkeypatch, target):
    from paralleldit.launcher import spawn

    monkeypatch.setattr(spawn, "STOPPED_S", 1.0)
    spec = spec_in(tmp_path / "run")

    def stop_it():
        kind, _, rank = target.partition(" ")
        for _ in range(2000):
            life = current(spec.slot)
            process = life and (life.agent if kind == "torchrun" else life.ranks.get(int(rank)))
            if process:
                os.kill(process.pid, signal.SIGSTOP)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=stop_it)
    thread.start()
    began = time.monotonic()
    with pytest.raises(SidecarError, match=rf"did not start: its {target} \(process \d+\) is stopped"):
        lifecycle.start(spec)
    thread.join()
    assert time.monotonic() - began < 15
    assert alive(current(spec.slot)) == []


def test_ctrl_c_while_the_sidecar_starts_ends_all_of_it_at_once(tmp_path):
    starting = launcher(tmp_path / "run", "start", "--device", "cpu", "--worker", "tests.ranks.stand_in", wait=False)
    slot = spec_in(tmp_path / "run").slot
    wait_for(lambda: current(slot) is not None and alive(current(slot)), 20)
    time.sleep(0.5)
    began = time.monotonic()
    starting.send_signal(signal.SIGINT)
    _, err = starting.communicate(timeout=20)
    assert time.monotonic() - began < 4
    assert (starting.returncode, err.splitlines()[-1]) == (130, "interrupted")
    assert alive(current(slot)) == []
