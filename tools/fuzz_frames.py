"""Sends a live server of rank 0 what no honest client sends: `python tools/fuzz_frames.py [--frames N] [--seed S]`.

The server has no ranks; in their place each request is read again from what rank 0 would pass on. Of each group of
frames it is checked that every frame is answered, that another client is served in time, that no thread died, and that
the ranks read what rank 0 has read. At the end memory, threads and files are compared with the start.

Every group follows from the seed and its number alone. With `--state FILE` a run that was ended goes on where it was.
Prints a table of what was sent and what was answered. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parallel_backend.protocol import addresses, frames, handshake, messages
from parallel_backend.protocol.errors import ProtocolError
from parallel_backend.protocol.frames import FrameSocket
from parallel_backend.protocol.tensors import unpack
from parallel_backend.worker.server import Server, listen
from tools.malformed_frames import bad_body, bad_framing, bad_greeting, bad_header, framed

TOKEN = "the token"
GROUP = 50
"""Frames of one number."""
PATIENCE_S = 20.0
"""For an answer. The machine may be loaded."""
SAVE_EVERY = 100
ADDRESS = "tcp://127.0.0.1:0"


class Served:
    """A server of rank 0. What it hands out is answered at once, if the ranks would read the same."""

    def __init__(self, directory: Path) -> None:
        listener = listen(ADDRESS, directory / "socket")
        self.address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        welcome = messages.Welcome(version=messages.PROTOCOL_VERSION, ranks=1, device="cpu", pid=os.getpid())
        self.server = Server(listener, welcome, token=TOKEN, stall_timeout=2.0, patience=2.0)
        self.faults: list[str] = []
        threading.excepthook = self._note
        self.server.start()
        threading.Thread(target=self._serve, name="ranks", daemon=True).start()

    def _note(self, what: threading.ExceptHookArgs) -> None:
        name = what.thread.name if what.thread else "a thread"
        self.faults.append(f"{name} died: {what.exc_type.__name__}: {str(what.exc_value)[:200]}")

    def _serve(self) -> None:
        while True:
            work = self.server.next()
            try:
                again = frames.parse(messages.FROM_CLIENT, work.request.model_dump_json().encode())
                if again != work.request or unpack(work.body).keys() != work.tensors.keys():
                    self.faults.append(f"the ranks read another {work.request.type}")
            except ProtocolError as error:
                self.faults.append(f"the ranks refuse what rank 0 took: {error}"[:300])
            self.server.finish(work, messages.Result(id=work.request.id))

    def connect(self, *, greet: bool = True) -> FrameSocket:
        sock = addresses.connect(self.address, Path(), timeout=PATIENCE_S)
        stream = FrameSocket(sock, stall_timeout=PATIENCE_S)
        if greet:
            handshake.greet(stream, TOKEN)
        return stream


@dataclass
class Tally:
    """What has been sent by kind, and what has come of it. `group`: the number of the next one."""

    group: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest_probe: float = 0.0


def on_one_connection(served: Served, kind: str, payloads: list[bytes], tally: Tally) -> None:
    """Well-framed frames: each is answered, and the connection goes on."""
    stream = served.connect()
    answered = 0

    def read() -> None:
        nonlocal answered
        while answered < len(payloads) and (frame := stream.receive(PATIENCE_S)) is not None:
            reply = frames.parse(messages.FROM_SIDECAR, frame.header)
            tally.answers[f"{kind}: {_name(reply)}"] += 1
            answered += 1

    reader = threading.Thread(target=read, name="reader")
    reader.start()
    for payload in payloads:
        stream._sock.sendall(payload)
    reader.join(PATIENCE_S + 5)
    stream.close()
    if answered != len(payloads):
        tally.faults.append(f"group {tally.group}: {answered} of {len(payloads)} answers ({kind})")


def on_connections_of_their_own(served: Served, kind: str, payloads: list[bytes], tally: Tally) -> None:
    """Bytes after which the stream is out of step: the server may answer, and hangs up."""
    for payload in payloads:
        stream = served.connect(greet=kind == "framing")
        try:
            stream._sock.sendall(payload)
            stream._sock.shutdown(socket.SHUT_WR)
            last = "nothing"
            while (frame := stream.receive(PATIENCE_S)) is not None:
                last = _name(frames.parse(messages.FROM_SIDECAR, frame.header))
            tally.answers[f"{kind}: {last}"] += 1
        except (OSError, ProtocolError) as error:
            tally.answers[f"{kind}: {type(error).__name__}"] += 1
        finally:
            stream.close()


def _name(reply: messages.Message) -> str:
    return f"refused ({reply.code})" if isinstance(reply, messages.Failure) else type(reply).__name__.lower()


def headers(served: Served, dice: random.Random, tally: Tally) -> None:
    on_one_connection(served, "header", [framed(bad_header(dice)) for _ in range(GROUP)], tally)


def bodies(served: Served, dice: random.Random, tally: Tally) -> None:
    kinds = (b'{"type":"status","id":5}', b'{"type":"keep_changes","id":5,"digests":[]}')
    on_one_connection(served, "body", [framed(dice.choice(kinds), bad_body(dice)) for _ in range(GROUP)], tally)


def both(served: Served, dice: random.Random, tally: Tally) -> None:
    payloads = [framed(bad_header(dice), bad_body(dice)) for _ in range(GROUP)]
    on_one_connection(served, "header and body", payloads, tally)


def framings(served: Served, dice: random.Random, tally: Tally) -> None:
    on_connections_of_their_own(served, "framing", [bad_framing(dice) for _ in range(GROUP)], tally)


def greetings(served: Served, dice: random.Random, tally: Tally) -> None:
    on_connections_of_their_own(served, "handshake", [bad_greeting(dice) for _ in range(GROUP)], tally)


KINDS: dict[str, tuple[Callable[[Served, random.Random, Tally], None], int]] = {
    "header": (headers, 8),
    "body": (bodies, 8),
    "header and body": (both, 2),
    "framing": (framings, 1),
    "handshake": (greetings, 1),
}
"""What is sent, and in how many of 20 groups."""


def run(served: Served, tally: Tally, seed: int, groups: int, on_group: Callable[[], None] = lambda: None) -> None:
    """Send groups until there have been `groups`, or something is wrong."""
    order = [kind for kind, (_, weight) in KINDS.items() for _ in range(weight)]
    while tally.group < groups and not tally.faults:
        dice = random.Random(f"{seed} {tally.group}")
        kind = order[tally.group % len(order)]
        KINDS[kind][0](served, dice, tally)
        tally.sent[kind] += GROUP
        began = time.monotonic()
        probe(served, tally)
        tally.slowest_probe = max(tally.slowest_probe, time.monotonic() - began)
        tally.faults += [f"group {tally.group}: {fault}" for fault in served.faults]
        tally.group += 1
        on_group()


def probe(served: Served, tally: Tally) -> None:
    """Another client is served meanwhile."""
    stream = served.connect()
    stream.send(messages.Unload(id=7))
    frame = stream.receive(PATIENCE_S)
    stream.close()
    if frame is None or frames.parse(messages.FROM_SIDECAR, frame.header) != messages.Result(id=7):
        tally.faults.append(f"group {tally.group}: another client is not served")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000, help="how many in all (default 1000000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="where the run's state is kept, to go on from")
    args = parser.parse_args()
    tally = _read(args.state, args.seed)
    with tempfile.TemporaryDirectory() as directory:
        served = Served(Path(directory))
        probe(served, tally)
        before, began, first = usage(), time.monotonic(), tally.group

        def on_group() -> None:
            if tally.group % SAVE_EVERY == 0:
                _write(args.state, args.seed, tally)
                rate = (tally.group - first) * GROUP / max(1e-9, time.monotonic() - began)
                print(f"{tally.group * GROUP} frames, {rate:.0f} a second, {usage()}", file=sys.stderr)

        run(served, tally, args.seed, args.frames // GROUP, on_group)
        _write(args.state, args.seed, tally)
        settle()
        print(*table(tally, before, usage()), sep="\n")
    return 1 if tally.faults else 0


def settle() -> None:
    """Let connections that were left end."""
    time.sleep(3.0)


def usage() -> dict[str, int]:
    me = psutil.Process()
    return {"MB": me.memory_info().rss >> 20, "threads": me.num_threads(), "files": me.num_fds()}


def table(tally: Tally, before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Markdown."""
    lines = ["| Frames | sent | answered |", "|---|---|---|"]
    for kind, count in tally.sent.items():
        answers = [
            f"{name.removeprefix(f'{kind}: ')} {n}"
            for name, n in sorted(tally.answers.items())
            if name.startswith(f"{kind}: ")
        ]
        lines.append(f"| {kind} | {count} | {', '.join(answers)} |")
    lines.append(f"| all | {sum(tally.sent.values())} | another client was served within {tally.slowest_probe:.2f} s |")
    changes = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in before)
    return [*lines, "", f"Before and after: {changes}.", *(tally.faults or ["Nothing was wrong."])]


def _read(path: Path | None, seed: int) -> Tally:
    if path is None or not path.exists():
        return Tally()
    kept = json.loads(path.read_text())
    if kept.pop("seed") != seed:
        raise SystemExit(f"{path} is of another seed.")
    return Tally(**kept | {"sent": Counter(kept["sent"]), "answers": Counter(kept["answers"])})


def _write(path: Path | None, seed: int, tally: Tally) -> None:
    if path is not None:
        path.write_text(json.dumps({"seed": seed, **vars(tally)}))


if __name__ == "__main__":
    sys.exit(main())
