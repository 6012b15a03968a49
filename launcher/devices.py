"""Which devices the ranks get, and the environment that they need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from ..parallel_backend.errors import UserError
from ..parallel_backend.machine import resources

PACK = Path(__file__).resolve().parent.parent
CPU_RANKS = 2
"""The default number of ranks of a CPU sidecar."""
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The network interface at which ranks listen for each other: on one host, where no other machine reaches them."""

MEETING_VARIABLES = ("GLOO_DEVICE_TRANSPORT", "TP_SOCKET_IFNAME", "NCCL_COMM_ID", "NCCL_NET", "NCCL_IB_HCA")
"""How ranks meet on other hosts: settings of a cluster, which one host has no use for."""
HARDWARE_QUEUES = "32"
"""`CUDA_DEVICE_MAX_CONNECTIONS`: streams of a GPU that share a queue wait for each other, in a circle where stages of
PipeFusion do; as many queues as there are keep them apart."""

LEFT_OVER = ("PET_", "TORCHELASTIC_")
"""Settings of a torchrun that this process is one rank of, or was started beside."""

Device = Literal["cpu", "cuda"]


def gpu_count(python: str = sys.executable) -> int:
    """GPUs that torch sees in the environment of `python`. Raises `UserError` when it has no torch."""
    if python == sys.executable and "torch" in sys.modules:
        return sys.modules["torch"].cuda.device_count()
    command = [python, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except OSError as error:
        raise UserError(f"The sidecar's Python {python} cannot be run: {error.strerror}.") from error
    if answer.returncode:
        last = answer.stderr.strip().rpartition("\n")[2]
        raise UserError(
            f"The sidecar's Python {python} cannot import torch: {last}",
            f"Install the pack's requirements into it: {python} -m pip install -r {PACK / 'requirements.txt'}",
        )
    # Whatever a sitecustomize prints comes before.
    count = answer.stdout.strip().rpartition("\n")[2]
    if not count.isdecimal():
        raise UserError(
            f"The sidecar's Python {python} does not say how many GPUs there are, but {count[:200]!r}.",
            "Something prints when it ends: sitecustomize, or a file of site-packages.",
        )
    return int(count)


def gpus_of(text: str) -> tuple[int, ...]:
    """The GPUs of a list such as "0,1", by their places among those that torch sees; none of an empty one.

    Raises `UserError` for any other text.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if any(not (part.isascii() and part.isdecimal()) for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UserError(
            f"devices={text!r} is no list of GPUs.",
            "Write their numbers, each once, as in 0,1, or leave it empty for the first ones.",
        )
    return tuple(map(int, parts))


def check_gpus(gpus: Sequence[int], ranks: int, kind: str, count: int) -> None:
    """Raise `UserError` unless the `count` GPUs that torch sees have all of `gpus`, and `ranks` of a host (0: as many
    as there are) is their number."""
    named = ",".join(map(str, gpus))
    if kind == "cpu" or not count:
        why = "the ranks run on the CPU" if kind == "cpu" else "torch sees no GPU on this machine"
        raise UserError(f"devices={named} names GPUs, but {why}.", "Leave devices empty.")
    if missing := [gpu for gpu in gpus if gpu >= count]:
        raise UserError(
            f"devices={named} names GPU {missing[0]}, but torch sees {count}: {', '.join(map(str, range(count)))}.",
            "Name some of these. The numbers are those that torch gives, within CUDA_VISIBLE_DEVICES if that is set.",
        )
    if ranks not in (0, len(gpus)):
        raise UserError(
            f"{ranks} ranks do not fit devices={named}, which names {len(gpus)} of the GPUs.",
            "Set ranks to 0, for one rank on each of these GPUs, or name as many as there are ranks.",
        )


def choose(kind: Literal["auto", "cpu", "cuda"], ranks: int, nnodes: int, gpus: int) -> tuple[Device, int]:
    """The device and the number of ranks over all hosts. `ranks` 0: all GPUs of `nnodes` equal hosts, or 2 on CPU."""
    device: Device = "cuda" if kind == "cuda" or (kind == "auto" and gpus) else "cpu"
    ranks = ranks or (max(CPU_RANKS, nnodes) if device == "cpu" else gpus * nnodes)
    if ranks % nnodes:
        raise UserError(
            f"{ranks} ranks cannot be spread evenly over {nnodes} hosts.",
            f"Use a multiple of {nnodes} ranks: every host runs the same number.",
        )
    if device == "cuda" and ranks // nnodes > gpus:
        raise UserError(
            f"{ranks // nnodes} ranks on this host need as many GPUs, but torch sees {gpus}.",
            f"Use at most {gpus * nnodes} ranks, or device cpu."
            if gpus
            else "Use device cpu, or install a CUDA torch.",
        )
    return device, ranks


def rank_environment(
    device: Device, local_ranks: int, *, single_host: bool, base: Mapping[str, str], gpus: Sequence[int] = ()
) -> dict[str, str]:
    """The environment of torchrun: `base`, with what the ranks need and without what harms them.

    `gpus`: the only ones that they see, by their places among those that `base` shows.
    """
    env = {name: value for name, value in base.items() if not name.startswith(LEFT_OVER)}
    env.setdefault("OMP_NUM_THREADS", str(max(1, resources.cores() // local_ranks)))
    if single_host:
        for name in MEETING_VARIABLES:
            env.pop(name, None)
        env.update(dict.fromkeys(SOCKET_VARIABLES, "lo"))
    _set_cuda(env)
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    elif gpus:
        visible = base.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(gpu) for gpu in range(max(gpus) + 1)]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in gpus)
    return env


def _set_cuda(env: dict[str, str]) -> None:
    """Settings of CUDA and of its allocator that others have made for programs with one stream or one size of tensors.

    A launch that blocks hangs two stages that wait for each other. Tensors of PipeFusion and of tiles come in many
    sizes, for which segments that grow keep memory whole, unless the user has chosen another allocator's options.
    """
    env["CUDA_DEVICE_MAX_CONNECTIONS"] = HARDWARE_QUEUES
    env.pop("CUDA_LAUNCH_BLOCKING", None)
    chosen = {name: kept for name in ALLOCATOR_VARIABLES if (kept := without_async_allocator(env.pop(name, "")))}
    env.update(chosen or {ALLOCATOR_VARIABLES[0]: "expandable_segments:True"})


def without_async_allocator(setting: str) -> str:
    """ComfyUI may choose cudaMallocAsync; ranks that exchange tensors climb to out-of-memory with it."""
    kept = [option for option in setting.split(",") if option.strip() not in ("backend:cudaMallocAsync", "")]
    return ",".join(kept)
