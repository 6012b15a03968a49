"""Sidecars of stand-ins, and what tests of their lives ask of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from paralleldit.launcher.spec import SidecarSpec
from paralleldit.parallel_backend.protocol import messages

PACK = Path(__file__).resolve().parents[2]
HANG_S = 3.0
ANOTHER = f"""
import os, signal, sys, types
sys.modules["pack"] = pack = types.ModuleType("pack")  # its nodes would load torch
pack.__path__ = [{str(PACK)!r}]
from pack.launcher.lifecycle import *
from pack.parallel_backend.protocol import messages
from pathlib import Path, PosixPath
"""
"""How a program of another process begins: with the launcher, in which the repr of a `SidecarSpec` is one."""


def spec_in(directory, **more):
    usual = {"ranks": 2, "device": "cpu", "worker": "tests.ranks.stand_in", "hang_timeout": HANG_S, "grace": 1.0}
    return SidecarSpec(directory=directory, **(usual | more))


def ask(client, prompt, tensors=None, **more):
    request = messages.EncodeText(id=0, text=messages.TextRef(path="/none"), prompt=prompt)
    return client.request(request, tensors, **more)


def pids_of(client):
    result, _ = ask(client, "echo")
    return result.data["pids"]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(life):
    return [process for process in (life.agent, *life.ranks.values()) if process and process.alive]


def launcher(directory, *arguments, wait=True):
    process = subprocess.Popen(
        [sys.executable, PACK / "cli", *arguments],
        env={**os.environ, "PARALLELDIT_RUNTIME_DIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err
