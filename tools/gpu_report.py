"""Runs what needs one CUDA GPU, the most important first, and writes what it printed.

    python tools/gpu_report.py [--seconds 560] [--report gpu_report.md]

Each part has a share of the time; one that exceeds it is ended, and the report says so. Parts that no longer fit are
left out by name. The report is rewritten after each part, so that a machine that goes takes only the part under way.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

PACK = Path(__file__).resolve().parent.parent
LINES = 40
"""Of each part's output, the last."""
SHORTEST_S = 20
"""What is left for a part, at least, for it to begin."""


@dataclass(frozen=True)
class Part:
    name: str
    arguments: tuple[str, ...]
    seconds: int


def tests(*files: str, seconds: int) -> Part:
    paths = [f"tests/gpu/{file}" for file in files]
    return Part(", ".join(files), ("-m", "pytest", "-q", "--durations=5", *paths), seconds)


PARTS = (
    tests("test_sidecar.py", seconds=150),
    tests("test_ranks.py", seconds=150),
    tests("test_compiled.py", seconds=90),
    Part("bench_gpu.py", ("tools/bench_gpu.py", "--seconds", "110"), 160),
    Part("gpu_waits.py", ("tools/gpu_waits.py",), 60),
    tests("test_engine.py", "test_kernels.py", seconds=120),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560.0, help="of all parts together")
    parser.add_argument("--report", type=Path, default=Path("gpu_report.md"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device: every part would skip or fail.", file=sys.stderr)
        return 1
    deadline = time.monotonic() + arguments.seconds
    sections = [f"# {torch.cuda.get_device_name()}, torch {torch.__version__}"]
    failed = False
    for part in PARTS:
        left = deadline - time.monotonic()
        if left < SHORTEST_S:
            sections.append(f"## {part.name}\n\nNot run: no time was left.")
            failed = True
        else:
            text, ended_well = _run(part, min(left, part.seconds))
            sections.append(text)
            failed |= not ended_well
        arguments.report.write_text("\n\n".join(sections) + "\n")
    print(f"Written to {arguments.report}.")
    return int(failed)


def _run(part: Part, seconds: float) -> tuple[str, bool]:
    """Its section of the report, and whether it ended well. It is ended after `seconds`, and says so then."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *part.arguments],
        cwd=PACK,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            end = f"exit code {process.returncode} after {time.monotonic() - began:.0f} s"
        except subprocess.TimeoutExpired:
            # With its ranks, which would hold the pipe open.
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            end = f"ended after its {seconds:.0f} s"
    lines = output.splitlines()[-LINES:]
    return "\n".join([f"## {part.name}: {end}", "", "```", *lines, "```"]), process.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
