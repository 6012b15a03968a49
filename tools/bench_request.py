"""What one request costs besides its work: `python tools/bench_request.py [--ranks 2] [--megabytes 1]`.

A sidecar whose engine returns at once what it got answers a tensor of the given size, sent each way.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=1.0, help="size of the tensor each way (default 1)")
    parser.add_argument("--count", type=int, default=200, help="requests (default 200)")
    args = parser.parse_args()

    package = types.ModuleType("paralleldit")
    package.__path__ = [str(PACK)]
    sys.modules["paralleldit"] = package
    import torch

    lifecycle = importlib.import_module("paralleldit.launcher.lifecycle")
    messages = importlib.import_module("paralleldit.parallel_backend.protocol.messages")
    spec_class = importlib.import_module("paralleldit.launcher.spec").SidecarSpec

    tensor = torch.rand(int(args.megabytes * 2**20) // 4)
    request = messages.EncodeText(id=0, text=messages.TextRef(path="/none"), prompt="return")
    with tempfile.TemporaryDirectory() as directory:
        spec = spec_class(
            ranks=args.ranks, device="cpu", worker="tools.bench_request_worker", directory=Path(directory, "run")
        )
        client = lifecycle.ensure_sidecar(spec, print)
        seconds, tensors = list[float](), dict[str, torch.Tensor]()
        try:
            for _ in range(args.count + 10):
                began = time.perf_counter()
                _, tensors = client.request(request, {"x": tensor})
                seconds.append(time.perf_counter() - began)
        finally:
            lifecycle.stop(spec.slot)
    if not torch.equal(tensors["x"], tensor):
        raise SystemExit("the tensor did not come back as it was sent")
    warm = sorted(seconds[10:])
    print(
        f"round trip of {args.megabytes:g} MB each way on {args.ranks} ranks, {args.count} requests: "
        f"median {1e3 * statistics.median(warm):.1f} ms, 95% {1e3 * warm[int(0.95 * len(warm))]:.1f} ms, "
        f"min {1e3 * warm[0]:.1f} ms, max {1e3 * warm[-1]:.1f} ms"
    )


if __name__ == "__main__":
    main()
