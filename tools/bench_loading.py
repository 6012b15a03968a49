"""Measures host memory and time of loading one checkpoint in several ranks at once, beside plain diffusers.

    python tools/bench_loading.py [--ranks 1 2 4] [--single-blocks 2] [--folder DIR]

Writes a Flux.1 of random bf16 weights (hidden size 3072, one double block, some single blocks: 1.4 GB with two) in the
original layout and as a diffusers folder, into a temporary folder. Each rank is a process of its own; all load at the
same time, touch every page of the weights, and hold them until the last is done. Memory is the sum over the ranks of
the proportional set size (PSS, /proc/PID/smaps_rollup: a page shared by n processes counts 1/n for each), sampled all
the while. Prints a Markdown table. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import cast

PACK = Path(__file__).resolve().parent.parent
LOADERS = ("parallel_backend", "from_single_file", "from_pretrained")
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks to measure")
    parser.add_argument("--single-blocks", type=int, default=2, help="size of the model: 0.28 GB for each")
    parser.add_argument("--folder", help="where to put the temporary folder (needs twice the model's size)")
    parser.add_argument("--worker", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stopped run ends its ranks and its folder too
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        size = write_model(Path(folder), arguments.single_blocks)
        print(f"File: {size / 1e9:.2f} GB, bf16, in the page cache; ranks with one thread each.\n")
        print(
            "| loader | ranks | load (s) | load + touch (s) | peak, all ranks (MB) | peak / file | own, per rank (MB) |"
        )
        print("|---|---|---|---|---|---|---|")
        for ranks in arguments.ranks:
            for loader in LOADERS:
                print(row(loader, ranks, folder, size), flush=True)
    print("\nPeak: above the idle ranks (imports done, nothing loaded). Own: anonymous memory that loading added.")


def write_model(folder: Path, single_blocks: int) -> int:
    """Writes flux.safetensors (original layout) and diffusers/; returns the size of the former in bytes."""
    import torch
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from safetensors.torch import save_file

    from parallel_backend.families.keys.flux import RULES
    from parallel_backend.weights.load import load_transformer

    with init_empty_weights():
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=single_blocks, guidance_embeds=True)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = {}
    for rule in RULES:
        for i in range(max(1, single_blocks)):
            for suffix, target_suffix in rule.suffixes.items():
                targets = [f"{target.replace('{i}', str(i))}.{target_suffix}" for target in rule.targets]
                if shapes.keys() >= set(targets):
                    size = (sum(shapes[target][0] for target in targets), *shapes[targets[0]][1:])
                    key = f"{rule.source.replace('{i}', str(i))}.{suffix}"
                    weights[key] = torch.empty(size, dtype=torch.bfloat16).uniform_(-0.05, 0.05)
    path = folder / "flux.safetensors"
    save_file(weights, path)
    weights.clear()
    module = cast(FluxTransformer2DModel, load_transformer(path, device="cpu").module)
    module.save_pretrained(folder / "diffusers", max_shard_size="100GB")
    return path.stat().st_size


def row(loader: str, ranks: int, folder: str, size: int) -> str:
    """Runs `ranks` processes with `loader` and returns their row of the table."""
    command = [sys.executable, __file__, "--worker", loader, folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(ranks)
    ]
    try:
        for worker in workers:
            answer(worker)
        pids = [worker.pid for worker in workers]
        idle = memory(pids)
        peak, done = [idle["Pss"]], threading.Event()
        sampler = threading.Thread(target=sample, args=(pids, peak, done))
        sampler.start()
        for worker in workers:
            command_worker(worker, "load")
        times = [json.loads(answer(worker)) for worker in workers]
        done.set()
        sampler.join()
        held = memory(pids)
        for worker in workers:
            command_worker(worker, "leave")
        for worker in workers:
            worker.wait(timeout=60)
    finally:
        for worker in workers:
            worker.kill()
    above = max(*peak, held["Pss"]) - idle["Pss"]
    own = (held["Anonymous"] - idle["Anonymous"]) / ranks
    load, touched = (max(column) for column in zip(*times, strict=True))
    return (
        f"| {loader} | {ranks} | {load:.2f} | {touched:.2f} | {above / MB:.0f} (idle {idle['Pss'] / MB:.0f}) "
        f"| {above / size:.2f} | {own / MB:.0f} |"
    )


def command_worker(worker: subprocess.Popen[str], word: str) -> None:
    assert worker.stdin
    worker.stdin.write(f"{word}\n")
    worker.stdin.flush()


def answer(worker: subprocess.Popen[str]) -> str:
    """The worker's next line of answer; other lines that libraries print are passed over."""
    assert worker.stdout
    for line in worker.stdout:
        if line.startswith("answer "):
            return line.removeprefix("answer ")
    raise RuntimeError(f"a rank ended early with exit code {worker.wait()}")


def sample(pids: list[int], peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.02):
        peak[0] = max(peak[0], memory(pids)["Pss"])


def memory(pids: list[int]) -> dict[str, int]:
    """Sums over the processes, in bytes, of the fields of smaps_rollup."""
    totals = {"Pss": 0, "Anonymous": 0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, kilobytes = line.split()[:2]
            if name[:-1] in totals:
                totals[name[:-1]] += int(kilobytes) * 1024
    return totals


def work(loader: str, folder: str) -> None:
    """One rank: imports, waits for the word, loads, touches every page, waits again."""
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    from parallel_backend.weights.load import load_transformer

    file, diffusers_folder = f"{folder}/flux.safetensors", f"{folder}/diffusers"
    load = {
        "parallel_backend": lambda: load_transformer(file, device="cpu").module,
        "from_single_file": lambda: FluxTransformer2DModel.from_single_file(
            file, config=diffusers_folder, torch_dtype=torch.bfloat16
        ),
        "from_pretrained": lambda: FluxTransformer2DModel.from_pretrained(diffusers_folder, torch_dtype=torch.bfloat16),
    }[loader]
    print("answer ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    module = load()
    loaded = time.perf_counter() - start
    for tensor in module.parameters():
        tensor.data.reshape(-1).view(torch.uint8)[::4096].sum()
    print("answer", json.dumps([loaded, time.perf_counter() - start]), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    sys.path.insert(0, str(PACK))
    main()
