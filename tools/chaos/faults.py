"""One fault: a signal to one process of a sidecar, at a moment of a prompt's way; and what became of the prompts."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ...launcher import lifecycle
from ...launcher.client import NotBegun, SidecarError
from ...launcher.instance import SidecarInstance
from ...launcher.runtime_dir import Slot
from ...launcher.spec import SidecarSpec
from ...nodes import host
from ...nodes.layout_choice import LayoutChoice
from ...nodes.session import session
from ...parallel_backend.errors import Cancelled, UserError
from ...parallel_backend.protocol import records
from ...parallel_backend.protocol.errors import ProtocolError
from ...parallel_backend.protocol.messages import EncodeText, TextRef

RANKS = 2
PHASES = ("start", "idle", "sent", "first step", "late step", "cancel", "answered")
TARGETS = ("rank 0", "rank 1", "torchrun")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
HANG_S = 3.0
IDLE_S = (0.0, 0.05, 0.15, 0.3, 2.0)
"""How long after the fault the next prompt comes: within 0.2 s torchrun has not yet seen that a rank is dead."""
LATE_STEP, CANCEL_STEP = 16, 5
ERRORS = (UserError, SidecarError, ProtocolError, OSError)


@dataclass(frozen=True)
class Fault:
    phase: str
    target: str
    signal: signal.Signals


@dataclass
class Outcome:
    """`seconds`: from the fault to the error of the prompt that it hit, where it had one. `lost`: prompts that failed
    though nothing of them had begun, and later ones. `names_cause`: whether the error says which process it was."""

    hit: bool = False
    seconds: float | None = None
    error: str = ""
    names_cause: bool = True
    lost: int = 0
    lost_errors: tuple[str, ...] = ()
    orphans: int = 0

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def fault_number(seed: int, number: int) -> tuple[Fault, random.Random]:
    """The fault of that number, and where its chances come from. Each round has all of them, in another order."""
    faults = list(itertools.starmap(Fault, itertools.product(PHASES, TARGETS, SIGNALS)))
    turn, place = divmod(number, len(faults))
    random.Random(f"{seed}/{turn}").shuffle(faults)
    return faults[place], random.Random(f"{seed}/{turn}/{place}")


class Prompter(host.Host):
    """Asks stand-in ranks for prompts, as a node does. `on_step` is called at every step."""

    def __init__(self, directory: Path) -> None:
        spec = SidecarSpec(
            ranks=RANKS,
            device="cpu",
            worker="tests.ranks.stand_in",
            directory=directory,
            hang_timeout=HANG_S,
            start_timeout=60.0,
        )
        super().__init__(spec=spec, on_progress=self._step, say=lambda text: None)
        self.on_step: Callable[[int], None] = lambda step: None
        self.is_cancelled = False
        self.has_begun = False
        """Whether ranks have said anything of the last prompt, which they do once they have begun with it."""

    def _step(self, phase: str, step: int, total: int, preview: object) -> None:
        self.has_begun = True
        self.on_step(step)

    def cancelled(self) -> bool:
        return self.is_cancelled

    def send(self, what: str) -> None:
        """Raises one of `ERRORS`, or `Cancelled`."""
        self.has_begun = False
        request = EncodeText(id=0, text=TextRef(path="/none"), prompt=what)
        client = session.client_for(LayoutChoice(ranks=RANKS))
        session.with_living(client, lambda client: session.ask(client, request))


class Injector:
    """Sends the fault's signal, once, to its process of the life that runs then."""

    def __init__(self, fault: Fault, slot: Slot) -> None:
        self._fault = fault
        self._slot = slot
        self.at: float | None = None
        self.process: records.Process | None = None

    def target(self) -> records.Process | None:
        life = lifecycle.current(self._slot)
        if life is None or life.end is not None:
            return None
        kind, _, rank = self._fault.target.partition(" ")
        return life.agent if kind == "torchrun" else life.ranks.get(int(rank))

    def fire(self) -> None:
        process = self.target()
        if self.at is None and process is not None and process.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, self._fault.signal)
                self.at, self.process = time.monotonic(), process

    def fire_at_start(self, known: Path | None, delay: float) -> None:
        """`delay` seconds after the process of a life that is not the `known` one is there."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            life = lifecycle.current(self._slot)
            if life is not None and life.path != known and self.target() is not None:
                time.sleep(delay)
                self.fire()
                return
            time.sleep(0.005)

    def undo(self) -> None:
        """A stopped process that outlived its trial goes on."""
        if self.process is not None and self.process.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGCONT)


def inject(fault: Fault, prompter: Prompter, chances: random.Random) -> Outcome:
    """Lets the fault happen and asks once more afterwards, which must work."""
    slot = prompter.spec.slot
    outcome, injector = Outcome(), Injector(fault, slot)
    prompter.on_step, prompter.is_cancelled = (lambda step: None), False
    if fault.phase != "start":
        prompter.send("echo")
    began_with = lifecycle.current(slot)
    with _judged(outcome, fault, prompter, injector):
        _prompt_with_fault(fault, prompter, injector, chances)
    prompter.on_step, prompter.is_cancelled = (lambda step: None), False
    try:
        prompter.send("echo")
    except ERRORS as error:
        outcome.lost += 1
        outcome.lost_errors += (f"the next prompt: {error}",)
    outcome.hit = injector.at is not None
    now = lifecycle.current(slot)
    if began_with is not None and now is not None and began_with.path != now.path:
        outcome.orphans = len(living(began_with))
    injector.undo()
    return outcome


def living(life: SidecarInstance) -> list[records.Process]:
    return [process for process in (life.agent, *life.ranks.values()) if process and process.alive]


@contextlib.contextmanager
def _judged(outcome: Outcome, fault: Fault, prompter: Prompter, injector: Injector) -> Iterator[None]:
    try:
        yield
    except Cancelled:
        return
    except ERRORS as error:
        outcome.error = f"{type(error).__name__}: {error}"
        outcome.seconds = time.monotonic() - injector.at if injector.at else None
        outcome.names_cause = fault.target in outcome.error.lower()
        if isinstance(error, NotBegun) or not prompter.has_begun:
            outcome.lost += 1
            outcome.lost_errors += (outcome.error,)


def _prompt_with_fault(fault: Fault, prompter: Prompter, injector: Injector, chances: random.Random) -> None:
    def at(step: int) -> None:
        prompter.on_step = lambda now: injector.fire() if now >= step else None
        prompter.send("walk")

    match fault.phase:
        case "start":
            lifecycle.stop(prompter.spec.slot)
            known = prompter.spec.slot.life
            with _meanwhile(lambda: injector.fire_at_start(known, chances.uniform(0.0, 2.5))):
                prompter.send("echo")
        case "idle":
            injector.fire()
            time.sleep(chances.choice(IDLE_S))
            prompter.send("echo")
        case "sent":
            delay = chances.uniform(0.0, 0.01)

            def soon() -> None:
                time.sleep(delay)
                injector.fire()

            with _meanwhile(soon):
                prompter.send("echo")
        case "first step":
            at(1)
        case "late step":
            at(LATE_STEP)
        case "cancel":

            def cancel(step: int) -> None:
                if step >= CANCEL_STEP and not prompter.is_cancelled:
                    prompter.is_cancelled = True
                    threading.Timer(chances.uniform(0.0, 0.03), injector.fire).start()

            prompter.on_step = cancel
            prompter.send("walk")
        case "answered":
            prompter.send("echo")
            injector.fire()


@contextlib.contextmanager
def _meanwhile(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()
