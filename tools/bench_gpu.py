"""Measures a step of Flux.1-dev on one CUDA GPU: our engine with each attention kernel, beside diffusers.

    python tools/bench_gpu.py [--tokens 4096] [--text 512] [--rounds 8] [--steps 2] [--seconds 100]

Flux.1-dev in size (19 double and 38 single blocks, 24 heads of 128) with random bf16 weights, which are made on the GPU
(24 GB) and shared by all variants: plain diffusers, with PyTorch's choice of attention and with cuDNN's, our engine
with every kernel that is installed, and those compiled block by block. Before it is timed, each variant's prediction is
compared with that of plain diffusers: "error" is the relative difference; what differs by more than roundings of bf16
(of 8-bit keys, for Sage) is left out. The variants take turns, in another order every round; no round begins that would
not end within `--seconds` of the start.

Prints Markdown: milliseconds per step on the GPU (median and minimum over rounds of `--steps` steps each), the ratio to
plain diffusers, milliseconds until the host has queued a step, and the memory that a step takes beside the weights.
With --device cpu, and sizes to go with it (--tokens 64 --text 16 --width 256 --layers 1 2), it measures the same there.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parallel_backend.attention.kernels import KERNELS
from parallel_backend.attention.usp import AttentionCore
from parallel_backend.distributed.axis import Axis
from parallel_backend.distributed.ledger import Ledger
from parallel_backend.families.blocks import compiled
from parallel_backend.families.condition import Condition
from parallel_backend.families.flux import Flux
from parallel_backend.strategies.sequence import SequenceParallel

PLAIN = "diffusers"
HEAD_DIM, JOINT_WIDTH, POOLED_WIDTH = 128, 4096, 768
LARGEST_ERROR = {True: 0.3, False: 0.08}
"""Relative; True: of Sage, whose queries and keys are of 8 bits. Random weights carry a rounding far."""

BEFORE_TIMING = 0.7
"""Share of the seconds that variants may be checked, and compiled, in."""

Step = Callable[[], Tensor]


@dataclass
class Measured:
    """Of one variant: seconds a step, seconds until it is queued, bytes beside the weights."""

    error: float
    peak: int
    first: float
    seconds: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="image tokens (a square): 4096 are 1024 pixels")
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--width", type=int, default=3072, help="hidden size, a multiple of 128")
    parser.add_argument("--layers", type=int, nargs=2, default=[19, 38], help="double and single blocks")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed together")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--only", default="", help="only variants with this in their name, and plain diffusers")
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.set_grad_enabled(False)
    device = torch.device(arguments.device)
    with torch.inference_mode():
        variants = Variants(arguments, device).steps()
        chosen = {name: step for name, step in variants.items() if name == PLAIN or arguments.only in name}
        results = checked(chosen, device, started + arguments.seconds * BEFORE_TIMING)
        in_turn(chosen, results, arguments, device, started)
    print(table(arguments, device, results), flush=True)


class Variants:
    """One set of random weights under every variant, and one prediction to ask each for."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self._arguments, self._device = arguments, device
        self._weights = {name: _random(name, tensor, device) for name, tensor in self._empty().state_dict().items()}
        self._own = self._family()
        self._side = round(arguments.tokens**0.5)
        generator = torch.Generator(device).manual_seed(3)
        self._latent = torch.randn(1, 16, 2 * self._side, 2 * self._side, device=device, generator=generator)
        self._text = torch.randn(1, arguments.text, JOINT_WIDTH, device=device, generator=generator).bfloat16()
        self._pooled = torch.randn(1, POOLED_WIDTH, device=device, generator=generator).bfloat16()
        self._sigma = torch.tensor([0.7], device=device)

    def steps(self) -> dict[str, Step]:
        """Those that are not compiled first."""
        has_gpu = self._device.type == "cuda"
        installed = [name for name, kernel in KERNELS.items() if not kernel.package or find_spec(kernel.package)]
        kernels = installed if has_gpu else ["sdpa"]
        peers = {PLAIN: "native", f"{PLAIN}, cuDNN": "_native_cudnn"} if has_gpu else {PLAIN: "native"}
        compiled_family = self._family()
        compiled_family.blocks = compiled(compiled_family.blocks)
        steps = {name: self._plain(backend) for name, backend in peers.items()}
        steps |= {f"engine, {name}": self._ours(self._own, name) for name in kernels}
        steps |= {f"{name}, compiled": self._plain(backend, compiled=True) for name, backend in peers.items()}
        ours = [name for name in kernels if name in ("sdpa", "cudnn")]
        return steps | {f"engine, {name}, compiled": self._ours(compiled_family, name) for name in ours}

    def _empty(self) -> FluxTransformer2DModel:
        double, single = self._arguments.layers
        with torch.device("meta"):
            return FluxTransformer2DModel(
                num_layers=double,
                num_single_layers=single,
                attention_head_dim=HEAD_DIM,
                num_attention_heads=self._arguments.width // HEAD_DIM,
                joint_attention_dim=JOINT_WIDTH,
                pooled_projection_dim=POOLED_WIDTH,
                guidance_embeds=True,
            )

    def _module(self) -> FluxTransformer2DModel:
        module = self._empty()
        module.load_state_dict(self._weights, assign=True)
        return module.eval().requires_grad_(False)

    def _family(self) -> Flux:
        return Flux(self._module(), torch.bfloat16, self._device)

    def _ours(self, family: Flux, kernel: str) -> Step:
        ulysses, ring, sequence = (Axis(name, [0], None, Ledger()) for name in ("ulysses", "ring", "sequence"))
        strategy = SequenceParallel(family, sequence, AttentionCore(ulysses, ring, KERNELS[kernel]))
        condition = Condition({"tokens": self._text, "pooled": self._pooled}, guidance=3.5)
        return lambda: strategy.predict(self._latent, self._sigma, condition)

    def _plain(self, backend: str, *, compiled: bool = False) -> Step:
        side, family, module = self._side, self._own, self._module()
        # Said of every module: the backend that one is told is also that of all which are told of none.
        module.set_attention_backend(backend)
        if compiled:
            module.compile_repeated_blocks(fullgraph=True)
        rows = torch.arange(side, device=self._device)
        ids = torch.zeros(side * side, 3, device=self._device)
        ids[:, 1], ids[:, 2] = rows.repeat_interleave(side), rows.repeat(side)
        given = {
            "hidden_states": family.tokenise({"image": self._latent})["image"].bfloat16(),
            "encoder_hidden_states": self._text,
            "pooled_projections": self._pooled,
            "timestep": self._sigma.bfloat16(),
            "img_ids": ids,
            "txt_ids": torch.zeros(self._text.shape[1], 3, device=self._device),
            "guidance": torch.tensor([3.5], device=self._device),
            "return_dict": False,
        }
        latents = {"image": self._latent}
        return lambda: family.untokenise({"image": module(**given)[0]}, latents)["image"]


def _random(name: str, like: Tensor, device: torch.device) -> Tensor:
    tensor = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
    # Scales of norms are about one; all else as small as keeps activations their size.
    return tensor.fill_(1.0) if ".norm_" in name and tensor.ndim == 1 else tensor.normal_(std=0.02)


def checked(variants: dict[str, Step], device: torch.device, until: float) -> dict[str, Measured]:
    """Each variant's first prediction, compared with plain diffusers'. Those are left out that fail, or differ, or
    whose turn would come after `until`.
    """
    results: dict[str, Measured] = {}
    expected = None
    for name, step in variants.items():
        before = time.monotonic()
        if before > until:
            print(f"{name}: left out, no time", flush=True)
            continue
        try:
            output = step().float()
            synchronize(device)
        except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:
            lines = str(error).strip().splitlines() or [""]
            print(f"{name}: left out, {type(error).__name__}: {lines[0]}", flush=True)
            continue
        first = time.monotonic() - before
        expected = output if expected is None else expected
        error = float((output - expected).norm() / expected.norm())
        if not error <= LARGEST_ERROR["sage" in name]:
            print(f"{name}: left out, differs from {PLAIN} by {error:.1e}", flush=True)
            continue
        results[name] = Measured(error, peak_of(step, device), first)
    return results


def in_turn(
    variants: dict[str, Step],
    results: dict[str, Measured],
    arguments: argparse.Namespace,
    device: torch.device,
    started: float,
) -> None:
    order, longest = random.Random(0), 0.0
    for _ in range(arguments.rounds):
        began = time.monotonic()
        if began + longest > started + arguments.seconds:
            return
        for name in order.sample(list(results), len(results)):
            seconds, queued = timed(variants[name], arguments.steps, device)
            results[name].seconds.append(seconds)
            results[name].queued.append(queued)
        longest = max(longest, time.monotonic() - began)


def timed(step: Step, steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds a step, of the device and of the host that queues it."""
    synchronize(device)
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(steps):
            step()
        seconds = (time.perf_counter() - began) / steps
        return seconds, seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began = time.perf_counter()
    start.record()
    for _ in range(steps):
        step()
    end.record()
    queued = time.perf_counter() - began
    end.synchronize()
    return start.elapsed_time(end) / 1000 / steps, queued / steps


def peak_of(step: Step, device: torch.device) -> int:
    """Bytes that a step takes at most beside what is there before."""
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(arguments: argparse.Namespace, device: torch.device, results: dict[str, Measured]) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = [
        f"{name}, torch {torch.__version__}: {arguments.layers[0]} + {arguments.layers[1]} blocks of width "
        f"{arguments.width}, {arguments.tokens} + {arguments.text} tokens, bf16, medians of "
        f"{len(results[PLAIN].seconds)} rounds of {arguments.steps} steps",
        "",
        "| Variant | ms a step | min | ratio | of minima | queued in ms | MB beside weights | error | first step s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plain = results[PLAIN]
    for name, found in results.items():
        rows.append(
            f"| {name} | {1000 * median(found.seconds):.1f} | {1000 * min(found.seconds):.1f} "
            f"| {median(found.seconds) / median(plain.seconds):.3f} | {min(found.seconds) / min(plain.seconds):.3f} "
            f"| {1000 * median(found.queued):.1f} | {found.peak / 1e6:.0f} | {found.error:.1e} | {found.first:.1f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
