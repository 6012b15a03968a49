"""Injects faults one after the other, notes each, and prints what they have cost."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ...launcher import lifecycle
from ...nodes import host
from .faults import Prompter, fault_number, inject
from .report import tables


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/chaos", description=__doc__)
    add = parser.add_argument
    add("--faults", type=int, default=1000, help="how many there are to be in the log (default 1000)")
    add("--seed", type=int, default=0, help="of their order and moments (default 0)")
    add("--seconds", type=float, default=float("inf"), help="stop after so long; the next call goes on from there")
    add("--log", type=Path, default=Path("chaos.jsonl"), help="a line for each fault (default chaos.jsonl)")
    args = parser.parse_args()
    done = {record["number"]: record for record in _read(args.log) if record["seed"] == args.seed}
    ends = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as directory, args.log.open("a") as log:
        prompter = Prompter(Path(directory, "run"))
        host.use(prompter)
        try:
            for number in range(args.faults):
                if number not in done and time.monotonic() < ends:
                    done[number] = _one(args.seed, number, prompter)
                    print(json.dumps(done[number]), file=log, flush=True)
        finally:
            lifecycle.stop(prompter.spec.slot)
    records = list(done.values())
    print(*tables(records), sep="\n")
    return int(any(record["lost"] or record["orphans"] for record in records))


def _one(seed: int, number: int, prompter: Prompter) -> dict[str, Any]:
    fault, chances = fault_number(seed, number)
    outcome = inject(fault, prompter, chances)
    named = {"phase": fault.phase, "target": fault.target, "signal": fault.signal.name}
    return {"seed": seed, "number": number, **named, **outcome.to_json()}


def _read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
