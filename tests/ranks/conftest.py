"""A pool of rank processes (gloo on CPU), started once per test session and shared by every test."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if TYPE_CHECKING:
    from paralleldit.tests.ranks.matrix import Figures

VAE_ERRORS: pytest.StashKey[dict[str, dict[str, float]]] = pytest.StashKey()
FIGURES: pytest.StashKey[Figures] = pytest.StashKey()
POOL_SIZE = 8
TIMEOUT_S = 120
STRAGGLERS_S = 5
"""How long the other ranks may take once one has failed."""


class RankPool:
    """Runs module-level functions of test modules on the first n of its ranks."""

    def __init__(self, size: int = POOL_SIZE, start: str = "forkserver", patience: int = TIMEOUT_S) -> None:
        """`start`: how processes are started. A fork may not use CUDA once its parent has asked for devices.

        `patience`: seconds after which ranks that do not answer end the session.
        """
        context = mp.get_context(start)
        if isinstance(context, ForkServerContext):
            # One server imports all that is large once; the ranks are its forks, made before it has any thread.
            context.set_forkserver_preload(["tests.ranks.preloaded"])
        port = _free_port()
        self.generation = self.world_size = 0
        self.patience = patience
        self.pipes: list[Connection] = []
        self.processes = []
        self.known: dict[str, list[Any]] = {}
        for rank in range(size + 1):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, there, port), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        # What others are compared with comes from a rank that stays alone, and leaves the others' world as it is.
        self.alone = self.pipes.pop()

    def run(self, n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(world: Axis, *args)` on n ranks; the list of what each returned. A rank's error fails the test."""
        code = function.__code__
        pipes, generation = [self.alone], 0
        if n > 1:
            self.generation += self.world_size != n
            self.world_size = n
            pipes, generation = self.pipes[:n], self.generation
        for pipe in pipes:
            pipe.send((code.co_filename, function.__name__, n, generation, args))
        answers: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        while waiting:
            failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
            ready = wait(list(waiting), timeout=STRAGGLERS_S if failures else self.patience)
            if not ready:
                stuck = f"ranks {sorted(waiting.values())} of {n} did not answer {function.__name__}{args}"
                pytest.exit("\n".join([*failures, stuck]), returncode=3)
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                answers[rank] = pipe.recv()  # type: ignore[union-attr]
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        return [answers[rank][1] for rank in range(n)]

    def once(self, n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As `run`, for what many tests compare with: the same question is put to the ranks once in a session."""
        question = f"{n} {function.__module__} {function.__name__} {args}"
        if question not in self.known:
            self.known[question] = self.run(n, function, *args)
        return self.known[question]

    def close(self) -> None:
        for pipe in (*self.pipes, self.alone):
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _serve(rank: int, size: int, pipe: Connection, port: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    _load_module(Path(__file__).resolve().parent.parent / "conftest.py")
    from paralleldit.parallel_backend.distributed.axis import Axis
    from paralleldit.parallel_backend.distributed.ledger import Ledger

    store = dist.TCPStore("127.0.0.1", port, size + 1, is_master=rank == 0, timeout=timedelta(seconds=120))
    joined = None
    while (task := pipe.recv()) is not None:
        path, name, n, generation, args = task
        try:
            if generation != joined:
                _join_world(dist.PrefixStore(f"world {generation}", store), rank % size, n)
                joined = generation
            world = Axis("world", range(n), dist.group.WORLD, Ledger())
            answer = (True, getattr(_load_module(Path(path)), name)(world, *args))
        except Exception:  # noqa: BLE001 the text travels to the test, which fails with it
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def _join_world(store: dist.Store, rank: int, size: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S))


def _load_module(path: Path) -> Any:
    name = f"rank_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    # Ranks load this file too, before they know the pack by its name.
    from paralleldit.tests.ranks.matrix import Figures

    return request.config.stash.setdefault(FIGURES, Figures())


@pytest.fixture(scope="session")
def vae_errors(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    """{VAE and direction: {ranks: largest relative error}}, printed as a table at the end of the session."""
    return request.config.stash.setdefault(VAE_ERRORS, {})


def _vae_table(errors: dict[str, dict[str, float]]) -> list[str]:
    columns = sorted({column for row in errors.values() for column in row})
    head = ["| VAE | Direction |" + "".join(f" {column} |" for column in columns), "|---" * (2 + len(columns)) + "|"]
    cells = {
        name: [f"{row[column]:.1e}" if column in row else "" for column in columns] for name, row in errors.items()
    }
    return head + [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was noted; with PARALLELDIT_WRITE_MATRIX set, write it into docs/MATRIX.md and the README."""
    if errors := terminalreporter.config.stash.get(VAE_ERRORS, None):
        terminalreporter.section("largest relative errors of VAEs to plain diffusers")
        for line in _vae_table(errors):
            terminalreporter.line(line)
    figures = terminalreporter.config.stash.get(FIGURES, None)
    if figures is None:
        return
    from paralleldit.tests.ranks.matrix import PAGE, README, summarized, written

    terminalreporter.section("largest relative errors")
    for line in figures.lines():
        terminalreporter.line(line)
    if os.environ.get("PARALLELDIT_WRITE_MATRIX"):
        PAGE.write_text(written(PAGE.read_text(), figures.noted))
        README.write_text(summarized(README.read_text(), PAGE.read_text()))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()
