"""Measures a VAE in the ranks: the memory that each needs, and the time beside plain diffusers and DistVAE.

    python tools/bench_vae.py memory [--case NAME] [--pixels 1024 2048] [--width 16] [--ranks 1 2 4] [--direction D]
    python tools/bench_vae.py peaks [--case NAME]
    python tools/bench_vae.py speed [--pixels 1024] [--width 128] [--rounds 3] [--only NAME]

VAEs of random weights in fp32 with the published configurations, but for their channels: `width` in the level of most
pixels, the others in proportion. One thread per rank; each line by fresh processes.

memory: the most that the rank that needs most has in use at a time, above what it had before. "of one rank" is that
over the same of one rank, the picture that rank 0 gives back taken off both; "allowed" is 1.25 / ranks.
peaks: the same of one rank for every class, in the terms of the planner (`PEAKS` in parallel_backend/vae/plan.py).
speed: the median and the least seconds of the rounds, of the slowest rank, after a first round that is not counted.
"two copies": two plain decodes at once, each by itself: the ceiling of the machine for two ranks.

Prints Markdown tables. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parallel_backend.distributed.axis import Axis
from parallel_backend.distributed.ledger import Ledger
from parallel_backend.vae.decode import decode
from parallel_backend.vae.encode import encode
from parallel_backend.vae.kinds import Direction
from parallel_backend.vae.load import LoadedVAE
from parallel_backend.vae.plan import PEAKS, Peak

MB = 1e6
PORT = 29575
M_MMAP_THRESHOLD = -3
"""Of mallopt(3): blocks of this size and more go back to the system as soon as they are freed."""


def _kl(width: int, **more: object) -> dict[str, object]:
    return {
        "block_out_channels": tuple(width * factor for factor in (1, 2, 4, 4)),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 4 if width < 32 else 32,
        **more,
    }


def _dc(width: int) -> dict[str, object]:
    """SANA's, of 128 channels."""
    wide = tuple(width * factor for factor in (1, 2, 4, 4, 8, 8))
    plain, attending = ("ResBlock",) * 3, ("EfficientViTBlock",) * 3
    scales = ((), (), (), (5,), (5,), (5,))
    return {
        "latent_channels": 32,
        "attention_head_dim": width // 4,
        "encoder_block_types": (*plain, *attending),
        "decoder_block_types": (*plain, *attending),
        "encoder_block_out_channels": wide,
        "decoder_block_out_channels": wide,
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
        "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
    }


CASES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "AutoencoderKL": ("AutoencoderKL", _kl),
    "without attention": ("AutoencoderKL", lambda width: _kl(width, mid_block_add_attention=False)),
    "AutoencoderDC": ("AutoencoderDC", _dc),
    "Wan 2.1": ("AutoencoderKLWan", lambda width: {"base_dim": width}),
    "Qwen-Image": ("AutoencoderKLQwenImage", lambda width: {"base_dim": width}),
    "Wan 2.2": (
        "AutoencoderKLWan",
        lambda width: {
            "base_dim": width * 5 // 8,
            "decoder_base_dim": width,
            "z_dim": 48,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
    ),
    "HunyuanVideo": (
        "AutoencoderKLHunyuanVideo",
        lambda width: {
            "block_out_channels": tuple(width * factor for factor in (1, 2, 4, 4)),
            "norm_num_groups": 4,
        },
    ),
    "CogVideoX": (
        "AutoencoderKLCogVideoX",
        lambda width: {
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": tuple(width * factor for factor in (1, 2, 2, 4)),
            "norm_num_groups": 4,
        },
    ),
    "Mochi": (
        "AutoencoderKLMochi",
        lambda width: {  # its normalisation needs 32 channels
            "encoder_block_out_channels": tuple(max(32, width // 2) * factor for factor in (1, 2, 4, 6)),
            "decoder_block_out_channels": tuple(max(64, width) * factor for factor in (1, 2, 4, 6)),
        },
    ),
    "LTX-Video": (
        "AutoencoderKLLTXVideo",
        lambda width: {
            "block_out_channels": tuple(width * factor for factor in (1, 2, 4, 4)),
            "decoder_block_out_channels": tuple(width * factor for factor in (1, 2, 4, 4)),
        },
    ),
}
"""By what the tables call it: the class, and its configuration for a width."""

WAYS = {
    "plain diffusers": ("plain", 1),
    "diffusers' tiles": ("tiles", 1),
    "two copies": ("plain", 2),
    "DistVAE, 2 ranks": ("distvae", 2),
    "DistVAE, 4 ranks": ("distvae", 4),
    "bands, 2 ranks": ("bands", 2),
    "bands, 4 ranks": ("bands", 4),
    "bands, 8 ranks": ("bands", 8),
}
"""What the table of speeds calls it: what each rank does, and the number of ranks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("memory", _memory), ("peaks", _peaks), ("speed", _speed)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument(
            "--width", type=int, default={"speed": 128, "peaks": 32}.get(name, 16), help="a multiple of 16"
        )
        if name == "speed":
            command.add_argument("--pixels", type=int, default=1024, help="side of the picture, a multiple of 8")
            command.add_argument("--rounds", type=int, default=3)
            command.add_argument("--only", default="", help="only ways with this in their name, e.g. bands")
        else:
            command.add_argument("--case", default="", help=f"only these: {', '.join(CASES)}")
        if name == "memory":
            command.add_argument("--pixels", type=int, nargs="+", default=[1024], help="sides of the pictures")
            command.add_argument("--frames", type=int, default=1, help="latent frames of a video")
            command.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
            command.add_argument("--direction", choices=("decode", "encode"), default="decode")
    arguments = parser.parse_args()
    arguments.run(arguments)


def _memory(arguments: argparse.Namespace) -> None:
    print("| VAE | Pixels | Ranks | Peak per rank (MB) | of one rank | allowed |\n|---|---|---|---|---|---|")
    for case in _cases(arguments):
        for pixels in arguments.pixels:
            alone = 0.0
            for ranks in arguments.ranks:
                used = _spawn(ranks, _peak, case, arguments.width, arguments.direction, pixels, arguments.frames)
                peak = max(peak - given for peak, given in used)
                alone = alone or peak * ranks
                share = f"{peak / alone:.3f} | {1.25 / ranks if ranks > 1 else 1:.3f}"
                shown = max(peak for peak, _ in used) / MB
                print(f"| {case} | {pixels} | {ranks} | {shown:.0f} | {share} |", flush=True)


def _peaks(arguments: argparse.Namespace) -> None:
    print("| VAE | Direction | picture | frame | result |\n|---|---|---|---|---|")
    for case in _cases(arguments):
        for direction in ("decode", "encode"):
            vae = _vae(case, arguments.width, random=False)
            peak = _fitted(case, vae, direction, arguments.width, PEAKS[vae.architecture][direction].chunk)
            print(f"| {case} | {direction} | {peak.picture:.1f} | {peak.frame:.2f} | {peak.result:.0f} |", flush=True)


def _fitted(case: str, vae: LoadedVAE, direction: Direction, width: int, chunk: int | None) -> Peak:
    """The planner's terms, from one frame, from a chunk of them, and from several chunks."""
    side = 64 if vae.frames else 256
    unit = 4 * vae.width(direction)

    def per_pixel(frames: int) -> tuple[int, float]:
        latent_frames = 1 + -(-(frames - 1) // (vae.frames or 1))
        ((peak, _),) = _spawn(1, _peak, case, width, direction, side, latent_frames)
        return 1 + (latent_frames - 1) * (vae.frames or 1), peak / (side * side)

    _, first = per_pixel(1)
    if not vae.frames:
        return Peak(first / unit)
    frames, at_once = per_pixel(chunk or 3 * vae.frames)
    result = 0.0
    if chunk:
        more, longer = per_pixel(3 * frames)
        result = max(0.0, (longer - at_once) / (more - frames))
    frame = max(0.0, (at_once - first) / (frames - 1) - result) / unit
    return Peak(max(0.0, (first - result) / unit - frame), frame, result, chunk)


def _speed(arguments: argparse.Namespace) -> None:
    print("| Way | Median (s) | Least (s) |\n|---|---|---|")
    for name, (way, ranks) in WAYS.items():
        if arguments.only in name:
            rounds = zip(*_spawn(ranks, _seconds, way, arguments), strict=True)
            seconds = [max(of_round) for of_round in rounds]
            print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} |", flush=True)


def _cases(arguments: argparse.Namespace) -> list[str]:
    return [case for case in CASES if arguments.case in case]


def _vae(case: str, width: int, *, random: bool = True) -> LoadedVAE:
    """Of random weights, or of zeros, which are made sooner."""
    torch.manual_seed(1)
    name, config = CASES[case]
    with torch.device("cpu" if random else "meta"):
        module = getattr(diffusers, name)(**config(width)).eval().requires_grad_(False)
    if not random:
        module.to_empty(device="cpu")
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    return LoadedVAE(module, "bench")


# -- in the ranks ------------------------------------------------------------------------------------------------


def _spawn(ranks: int, measure: Callable[..., Any], *task: object) -> list[Any]:
    """What `measure(axis, *task)` gave on each of so many fresh processes."""
    # Forks of a process that has computed nothing: each finds torch imported, and has no threads of it.
    context = mp.get_context("fork")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(rank, ranks, answers, measure, task)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("A rank failed.")
    return [answers.get() for _ in processes]


@torch.inference_mode()
def _rank(rank: int, ranks: int, answers: Any, measure: Callable[..., Any], task: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=rank, world_size=ranks)
    axis = Axis("world", range(ranks), dist.group.WORLD, Ledger())
    answers.put(measure(axis, *task))
    dist.barrier()
    dist.destroy_process_group()


def _peak(axis: Axis, case: str, width: int, direction: str, pixels: int, frames: int) -> tuple[int, int]:
    """Most bytes in use at once above those before, and those of the result."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    vae = _vae(case, width, random=False)

    def work(side: int, frames: int) -> torch.Tensor | None:
        if direction == "decode":
            size = [*([frames] if vae.frames else []), side // vae.scale, side // vae.scale]
            return decode(vae, torch.randn(1, vae.latent_channels, *size), axis)
        size = [*([1 + (frames - 1) * vae.frames] if vae.frames else []), side, side, vae.image_channels]
        return encode(vae, torch.rand(1, *size), axis)

    work(2 * vae.scale * axis.size, 1)  # all code is in memory now
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the high-water mark begins anew
    before = _status("VmRSS")
    result = work(pixels, frames)
    return _status("VmHWM") - before, result.nbytes if result is not None else 0


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _seconds(axis: Axis, way: str, arguments: argparse.Namespace) -> list[float]:
    work = _work(axis, way, arguments)
    seconds = []
    for _ in range(1 + arguments.rounds):
        dist.barrier()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _work(axis: Axis, way: str, arguments: argparse.Namespace) -> Callable[[], object]:
    vae = _vae("AutoencoderKL", arguments.width)
    latent = torch.randn(1, 16, arguments.pixels // 8, arguments.pixels // 8)
    if way == "bands":
        return lambda: decode(vae, latent, axis)
    if way == "tiles":
        vae.module.enable_tiling()
    elif way == "distvae":
        from distvae.vae import parallelize_decoder

        parallelize_decoder(vae.module, dist.group.WORLD)
    return lambda: vae.module.decode(latent)


if __name__ == "__main__":
    main()
