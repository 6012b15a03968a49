"""The torchrun of one host, for one life of the sidecar: `python -m parallel_backend.worker.torchrun LIFE ARGUMENTS`.

It is torchrun with three additions: it keeps the ranks' logs, it writes down which rank died of what, and for one host
it opens no port.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from functools import partial
from pathlib import Path

from ..files.states import FileState
from ..protocol import records
from .board import FileBoard, LostLog
from .log_pipes import BoundedLog, LogPump, pipe_path


def main(life: Path, arguments: list[str]) -> int:
    settings = records.read(life / records.SettingsFile, records.Settings)
    if settings is None:
        print(f"{life} has no readable {records.SettingsFile}", file=sys.stderr)
        return 2
    if settings.nnodes == 1:
        FileBoard.create(life, settings.ranks)
    pump = LogPump(_logs(life, settings))
    pump.start()

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from . import rendezvous

    rendezvous.register()
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        deaths = {rank: (failure.exitcode, failure.pid) for rank, failure in error.failures.items()}
        records.write_first(life / records.EndFile, with_changed_file(cause_of_death(deaths), life))
        return 1
    except SignalException as error:
        records.write_first(life / records.EndFile, records.End(clean=True, message=f"Ended by {error.sigval.name}."))
        return 1
    except Exception as error:
        records.write_first(
            life / records.EndFile,
            records.End(clean=False, message=f"torchrun failed: {type(error).__name__}: {error}"),
        )
        raise
    finally:
        pump.drain()
    return 0


def cause_of_death(deaths: dict[int, tuple[int, int]]) -> records.End:
    """Which of the ranks {rank: (exit code, pid)} died first. torchrun itself ends the others by SIGTERM, and a rank
    that loses its peer exits with an error of its own: so a foreign signal is the best evidence, then an exit code."""

    def told_by(item: tuple[int, tuple[int, int]]) -> tuple[int, int]:
        rank, (code, _) = item
        if code == -signal.SIGTERM:
            return 2, rank
        return (0 if code < 0 else 1), rank

    rank, (code, pid) = min(deaths.items(), key=told_by)
    if code >= 0:
        return records.End(clean=False, message=f"Rank {rank} (process {pid}) exited with code {code}.", rank=rank)
    name = signal.Signals(-code).name
    hint = "The kernel does this when the machine or its container is out of memory." if name == "SIGKILL" else ""
    return records.End(
        clean=False,
        message=f"Rank {rank} (process {pid}) was killed by {name}.",
        hint=hint,
        rank=rank,
        is_killed=True,
    )


def with_changed_file(end: records.End, life: Path) -> records.End:
    """A rank that reads beyond the end of a file that it has mapped is killed by SIGBUS: says which file that is."""
    mapped = None if end.rank is None else records.read(life / records.mapped_file(end.rank), records.MappedFiles)
    if mapped is None or "SIGBUS" not in end.message:
        return end
    states = [FileState(Path(file.path), file.size, file.modified_ns, file.inode) for file in mapped.files]
    changed = [state.path for state in states if state.is_overwritten()]
    if not changed:
        return end.model_copy(update={"hint": "A file that it had mapped cannot be read any more."})
    message = f"{end.message.removesuffix('.')}: {changed[0]} was changed while the ranks had it in memory."
    hint = "The next prompt reads it anew. To replace a model in use, write a new file and rename it."
    return end.model_copy(update={"message": message, "hint": hint})


def _logs(life: Path, settings: records.Settings) -> dict[Path, BoundedLog]:
    logs = {rank: life / records.rank_log(rank) for rank in settings.local_ranks}
    return {
        pipe_path(log): BoundedLog(log, settings.log_bytes, partial(_tell, life, settings, rank))
        for rank, log in logs.items()
    }


def _tell(life: Path, settings: records.Settings, rank: int, errno: int) -> None:
    from .rendezvous import connect_board

    # Without a board nobody is left to hear it.
    with contextlib.suppress(OSError, RuntimeError):
        connect_board(settings, life).tell_lost_log(LostLog(rank=rank, errno=errno))


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2:])
    sys.stderr.flush()
    os._exit(code)  # all is closed: taking torch's modules apart would cost a second
