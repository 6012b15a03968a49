"""Inputs of the made-up family, and its plain forward."""

from __future__ import annotations

import torch
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.tests.made_up.network import TEXT, MadeUpNetwork
from paralleldit.tests.made_up.view import MadeUp

CPU = torch.device("cpu")
LAYERS = 4
SIZES = {"video": (5, 6, 4), "sound": (7, 3)}
"""Frames, rows and columns of the video; moments and columns of the sound."""


def network(layers: int = LAYERS) -> MadeUpNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = MadeUpNetwork(layers).eval().requires_grad_(False)
        for parameter in made.parameters():
            parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1)
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.data += 1
    return made


def family(dtype: torch.dtype = torch.float32) -> MadeUp:
    return MadeUp(network().to(dtype), dtype, CPU)


def latents(batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    channels = {"video": 3, "sound": 2}
    return {name: torch.randn(batch, channels[name], *size, generator=generator) for name, size in SIZES.items()}


def condition(seed: int = 6, batch: int = 1, text: int = 5) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, text, TEXT, generator=generator)
    return Condition({"tokens": tokens, "each": torch.randn(batch, LAYERS, 3, TEXT, generator=generator)})


def plain(given: Condition, time: torch.Tensor, next_time: torch.Tensor) -> dict[str, torch.Tensor]:
    """The network's own forward for `latents`; `time` `[B]` or `[B, T]`."""
    own = latents()
    time = time if time.ndim == 2 else time[:, None].expand(-1, SIZES["video"][0])
    text, each = (given[name].expand(len(time), *given[name].shape[1:]) for name in ("tokens", "each"))
    video, sound = network()(**own, time=time, next_time=next_time, text=text, each=each)
    return {"video": video, "sound": sound}
