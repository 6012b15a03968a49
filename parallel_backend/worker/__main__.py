"""One rank: `torchrun -m parallel_backend.worker LIFE`. The same loop on every rank; rank 0 also holds the socket."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..protocol import messages, records
from . import log_pipes

if TYPE_CHECKING:
    import torch

    from ..distributed.control_group import Gathering
    from ..failures import Outcome
    from ..files.states import FileState
    from ..run_context import Run
    from .server import Job, Server
    from .watchdog import Watch

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
ALONE_S = 2.0
"""How long a rank that leaves a request with a user's error waits for others to arrive at it too."""
POLL_S = 0.01
LAST_WORDS_S = 5.0
"""How long a rank that lost its peers waits for torchrun to end it, so that its exit hides no other rank's death."""


class Engine(Protocol):
    """What does the work. Every call happens on every rank."""

    def handle(
        self, request: messages.AnyRequest, tensors: dict[str, torch.Tensor], run: Run
    ) -> tuple[dict[str, object], dict[str, torch.Tensor]]: ...

    def status(self) -> dict[str, object]: ...

    def abandon(self) -> None:
        """This rank alone: give up all groups and what is under way in them, so that no rank waits there for it."""
        ...

    def rejoin(self, run: Run) -> None:
        """Form groups anew, after every rank has left the former ones, and hold the same models on all again."""
        ...


def main(engine_factory: Callable[[torch.device], Engine]) -> None:
    life, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    _die_with(records.read(life / records.AgentFile, records.Process))
    records.write(life / records.rank_file(rank), records.this_process())
    log_pipes.attach(life / records.rank_log(rank))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s")
    try:
        Rank(life, rank, engine_factory).serve()
    except Exception as error:
        log.exception("rank %d ends", rank)
        if (life / records.ReadyFile).exists():
            time.sleep(LAST_WORDS_S)
        text = f"Rank {rank} failed: {type(error).__name__}: {error}"
        records.write_first(life / records.EndFile, records.End(clean=False, message=text, rank=rank))
        raise


class Rank:
    def __init__(self, life: Path, rank: int, engine_factory: Callable[[torch.device], Engine]) -> None:
        import torch

        from ..distributed.control_group import ControlGroup
        from .heartbeat import Pulse
        from .rendezvous import connect_board, connect_store

        started = time.monotonic()
        settings = records.read(life / records.SettingsFile, records.Settings)
        if settings is None:
            raise FileNotFoundError(f"{life / records.SettingsFile} is missing or of another version")
        self.rank = rank
        self.settings = settings
        self.life = life
        cuda = settings.device == "cuda"
        self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[settings.device]
        self.can_regroup = not cuda
        self.store = connect_store(settings, life)
        self._form_groups("first")
        self.control, self.within = ControlGroup(), ControlGroup()
        """Between requests, and within one: this group a rank can leave before the others do."""
        self.board = connect_board(settings, life)
        limits = settings.hang_timeout, settings.hang_timeout + LAST_WORDS_S
        self.pulse = Pulse(connect_board(settings, life), rank, *limits)
        self.pulse.start()
        self.engine = engine_factory(self.device)
        self.sequence = 0
        self.born = time.monotonic()
        self.ready = records.Ready(device=str(self.device), seconds=time.monotonic() - started)
        self.server: Server | None = None
        self.watch: Watch | None = None
        self.last_status: dict[str, object] = {"ranks": [], "models": [], "traffic": {}}

    def serve(self) -> None:
        import torch.distributed as dist

        if self.rank == 0:
            self._open()
        if self.rank == self.settings.local_ranks[0]:
            records.write(self.life / records.ReadyFile, self.ready)
        log.info("ready on %s after %.1f s", self.device, self.ready.seconds)
        while self._serve_one():
            pass
        dist.destroy_process_group()
        sys.stderr.flush()
        os._exit(0)  # all is closed: taking torch's modules apart would cost a second

    def _serve_one(self) -> bool:
        """One request through all ranks; False when it was the last one."""
        from .verdict import judge

        work = self._next()
        self.sequence += 1
        self.pulse.sequence = self.sequence
        if self.watch:
            self.watch.sequence = self.sequence
        data, tensors, outcome = self._attempt(work, self._run_of(work))
        outcomes = self._agree(outcome)
        verdict = judge(work.request.id, outcomes, can_regroup=self.can_regroup)
        is_last = isinstance(work.request, messages.Shutdown)
        if self.server:
            if isinstance(work.request, messages.Shutdown):
                # Before the reply: whoever reads that looks for this record next.
                by = f" by {work.request.by}" if work.request.by else ""
                end = records.End(clean=True, message=f"The sidecar was stopped{by}.")
                records.write_first(self.life / records.EndFile, end)
            if verdict.failure:
                self.server.finish(work, verdict.failure)
            else:
                self.server.finish(work, messages.Result(id=work.request.id, data=data), tensors)
        if not verdict.is_warm:
            self._end(outcomes[verdict.rank], verdict.rank)
        if not verdict.in_step:
            self._regroup(work, has_left=outcomes[self.rank].gave_up)
        self.pulse.sequence = None
        if self.watch:
            self.watch.sequence = None
            self.board.forget_failure(self.sequence)
        if is_last and self.server:
            self.server.close()
        return not is_last

    def _next(self) -> Job:
        """Rank 0's next request, on every rank."""
        from ..protocol.frames import parse
        from ..protocol.tensors import unpack
        from .server import Job

        work = self.server.next() if self.server else None
        header = bytearray(work.request.model_dump_json().encode()) if work else bytearray()
        header, body = self.control.share(header, work.body if work else bytearray())
        if work:
            return work
        request = parse(messages.FROM_CLIENT, bytes(header))
        assert not isinstance(request, messages.Cancel)
        return Job(request, body, unpack(body))

    def _run_of(self, work: Job) -> Run:
        from ..run_context import Run

        return Run(
            self.within,
            work.request.id,
            work.send,
            lambda: work.cancelled or self.pulse.is_cancelled,
            self._note_mapped,
        )

    def _note_mapped(self, files: Sequence[FileState]) -> None:
        """For torchrun, which explains a SIGBUS by them."""
        mapped = [
            records.MappedFile(path=str(file.path), size=file.size, modified_ns=file.modified_ns, inode=file.inode)
            for file in files
        ]
        try:
            records.write(self.life / records.mapped_file(self.rank), records.MappedFiles(files=tuple(mapped)))
        except OSError as error:
            log.warning("it is not noted which files are mapped: %s", error)

    def _attempt(self, work: Job, run: Run) -> tuple[dict[str, object], dict[str, torch.Tensor], Outcome]:
        from ..failures import Outcome, describe
        from .board import Failed

        try:
            data, tensors = self._handle(work, run)
            return data, tensors, Outcome("ok")
        except Exception as error:
            outcome = describe(error, self.rank, self.device)
            if outcome.is_broken:
                log.exception("request %s failed", work.request.type)
            if outcome.kind in ("user", "crash", "lost"):
                failed = Failed(rank=self.rank, kind=outcome.kind, message=outcome.message, hint=outcome.hint)
                self.board.tell_failure(self.sequence, failed)
            return {}, {}, outcome

    def _handle(self, work: Job, run: Run) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        if isinstance(work.request, messages.Shutdown):
            return {}, {}
        if isinstance(work.request, messages.Status):
            return self._status(run), {}
        return self.engine.handle(work.request, work.tensors, run)

    def _status(self, run: Run) -> dict[str, object]:
        mine = {"rank": self.rank, "pid": os.getpid(), "host": socket.gethostname(), **self.engine.status()}
        ranks = [each for each in run.gather(mine) if isinstance(each, dict)]
        self.last_status = {
            "ranks": ranks,
            "models": ranks[0].get("models", []),
            "traffic": ranks[0].get("traffic", {}),
        }
        return {**self.last_status, "busy": None, "uptime_s": time.monotonic() - self.born}

    def _busy_status(self, running: Job) -> dict[str, object]:
        """What rank 0 knows while a request is under way: the ranks' state is that of the last idle status."""
        progress = running.progress
        busy = {"type": running.request.type} | (progress.model_dump(exclude={"type", "id"}) if progress else {})
        return {**self.last_status, "busy": busy, "uptime_s": time.monotonic() - self.born}

    def _agree(self, outcome: Outcome) -> dict[int, Outcome]:
        """Every rank's outcome. Ranks that wait within the request for this one, which left it, are made to leave."""
        meeting = self.control.start_gather(outcome.to_json())
        if self.can_regroup and outcome.kind != "ok" and not self._others_come(meeting, outcome):
            self._leave()
            outcome = replace(outcome, gave_up=True)
        outcomes = _outcomes(meeting.wait())
        if all(each.kind == "ok" for each in outcomes.values()):
            return outcomes
        # Ranks may have given up since.
        return _outcomes(self.control.gather(outcome.to_json()))

    def _others_come(self, meeting: Gathering, outcome: Outcome) -> bool:
        """Whether no other rank stays behind, judged from this rank's outcome and within a moment."""
        if outcome.is_broken:
            return False
        deadline = time.monotonic() + ALONE_S
        while not meeting.is_completed() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return meeting.is_completed()

    def _leave(self) -> None:
        gc.collect()
        self.engine.abandon()
        self.within.abandon()

    def _regroup(self, work: Job, *, has_left: bool) -> None:
        """Form all groups anew. All ranks do, once they have left the request."""
        import torch.distributed as dist

        from ..distributed.control_group import ControlGroup

        if not has_left:
            self._leave()
        # A rank closes the old groups only when nobody reads from them any more.
        keys = [f"left/{self.sequence}/{rank}" for rank in range(self.settings.ranks)]
        self.store.set(keys[self.rank], "")
        self.store.wait(keys)
        dist.destroy_process_group()
        self._form_groups(f"after/{self.sequence}")
        self.control, self.within = ControlGroup(), ControlGroup()
        self.engine.rejoin(self._run_of(work))
        log.info("the ranks have formed their groups anew")

    def _form_groups(self, name: str) -> None:
        import torch.distributed as dist

        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore(name, self.store),  # pyright: ignore[reportPrivateImportUsage]
            rank=self.rank,
            world_size=self.settings.ranks,
            timeout=timedelta(seconds=self.settings.compute_timeout),
        )

    def _open(self) -> None:
        from .rendezvous import connect_board
        from .server import Server, listen
        from .watchdog import Watch

        listener = listen(self.settings.address, self.life / records.SocketFile)
        token = (self.life / records.TokenFile).read_text().strip() if self.settings.address != "unix" else ""
        welcome = messages.Welcome(
            version=messages.PROTOCOL_VERSION, ranks=self.settings.ranks, device=self.settings.device, pid=os.getpid()
        )
        self.server = Server(listener, welcome, token=token, max_body=self.settings.max_body, status=self._busy_status)
        self.watch = Watch(self.server, self.settings, self.life, connect_board(self.settings, self.life))
        self.server.start()
        self.watch.start()

    def _end(self, outcome: Outcome, rank: int) -> None:
        """The ranks are out of step: rank 0 ends its process, torchrun then ends the others."""
        if self.watch:
            self.watch.crash(outcome, rank)
        time.sleep(LAST_WORDS_S)
        raise SystemExit(1)


def _outcomes(gathered: list[object]) -> dict[int, Outcome]:
    from ..failures import Outcome

    return {rank: Outcome(**each) for rank, each in enumerate(gathered) if isinstance(each, dict)}


def _die_with(parent: records.Process | None) -> None:
    """Let the kernel kill this process when torchrun's agent dies, even while this process is stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is None or os.getppid() != parent.pid:
        raise SystemExit("The torchrun agent that started this rank is gone.")


def _engine(device: torch.device) -> Engine:
    from ..engine.engine import Engine

    return Engine(device)


if __name__ == "__main__":
    main(_engine)
