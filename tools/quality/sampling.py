"""Pictures of the demo model: through real sidecars of ranks, and by plain diffusers in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from torch import Tensor

from ...launcher.client import Client, Event
from ...launcher.lifecycle import ensure_sidecar, stop
from ...launcher.spec import SidecarSpec
from ...parallel_backend.protocol.messages import (
    Conditioning,
    Decode,
    EncodeText,
    Evaluations,
    ModelRef,
    Sample,
    TextRef,
    VaeRef,
)
from ...parallel_backend.sampling.noise import initial_noise
from .methods import Method

SAMPLER = "euler"


@dataclass(frozen=True)
class Task:
    """What every method is asked for: one picture per caption, true CFG against the empty prompt, all in fp32.

    Picture number i starts from draw number i of the seed, whatever the batch is.
    """

    model: Path
    captions: tuple[str, ...]
    size: int = 256
    steps: int = 20
    cfg: float = 3.5
    batch: int = 8
    seed: int = 0

    def batches(self) -> Iterator[slice]:
        for first in range(0, len(self.captions), self.batch):
            yield slice(first, min(first + self.batch, len(self.captions)))


@dataclass(frozen=True)
class Made:
    """Latents `[N, C, h, w]` and pictures `[N, H, W, 3]` in 0..1, both fp32.

    `seconds`: that the ranks sampled; `whole`: what step caches reported, the evaluations computed in full and all.
    """

    latents: Tensor
    pictures: Tensor
    seconds: float
    whole: tuple[int, int]


@contextmanager
def sidecar(ranks: int) -> Iterator[Client]:
    """A sidecar of that many ranks for the time of the block."""
    with TemporaryDirectory(prefix="paralleldit-quality-") as folder:
        spec = SidecarSpec(ranks=ranks, directory=Path(folder))
        try:
            yield ensure_sidecar(spec)
        finally:
            stop(spec.slot)


def encode(client: Client, task: Task) -> dict[str, Tensor]:
    """Tokens and pooled vectors of all captions and of the empty prompt, named as a `Sample` wants them."""
    text = TextRef(path=str(task.model))

    def encoded(prompt: str) -> dict[str, Tensor]:
        return client.request(EncodeText(id=0, text=text, prompt=prompt))[1]

    captions = [encoded(caption) for caption in task.captions]
    empty = encoded("")
    return {
        **{f"positive.0.{part}": torch.cat([each[part] for each in captions]) for part in empty},
        **{f"negative.0.{part}": empty[part] for part in empty},
    }


def sample(client: Client, method: Method, task: Task, conditioning: dict[str, Tensor], sigmas: Tensor) -> Made:
    """All pictures of the task by one method, of as many ranks as the sidecar has. Raises `UserError` if it cannot."""
    latents, pictures, seconds, counts = [], [], 0.0, []
    for part in task.batches():
        numbers = range(len(task.captions))[part]
        request = Sample(
            id=0,
            model=ModelRef(path=str(task.model), weight_dtype="fp32"),
            layout=method.layout,
            cache=method.cache,
            positive=(Conditioning(),),
            negative=(Conditioning(),),
            cfg=task.cfg,
            sampler=SAMPLER,
            schedule=None,
            seed=task.seed,
            batch_index=tuple(numbers),
        )
        tensors = {
            "latent": torch.zeros(latent_shape(task, len(numbers))),
            "sigmas": sigmas,
            **{name: tensor[part] if name.startswith("positive") else tensor for name, tensor in conditioning.items()},
        }
        result, sampled = client.request(request, tensors, lambda event, _: _note(event, counts))
        latent, seconds = sampled["latent"], seconds + float(str(result.data["seconds"]))
        vae = VaeRef(path=str(task.model), weight_dtype="fp32")
        latents.append(latent)
        pictures.append(client.request(Decode(id=0, vae=vae), {"latent": latent})[1]["image"])
    whole = sum(each for each, _ in counts), sum(each for _, each in counts)
    return Made(torch.cat(latents), torch.cat(pictures), seconds, whole)


def _note(event: Event, counts: list[tuple[int, int]]) -> None:
    if isinstance(event, Evaluations):
        counts.append((event.computed, event.total))


def latent_shape(task: Task, batch: int) -> tuple[int, int, int, int]:
    return batch, 16, task.size // 8, task.size // 8


class Diffusers:
    """The stock `FluxPipeline`: the sigmas that it would use, and its latents for the same noise."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.pipeline = FluxPipeline.from_pretrained(task.model, dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)

    def sigmas(self) -> Tensor:
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / self.task.steps, self.task.steps))
        return scheduler.sigmas.clone()

    @torch.inference_mode()
    def latents(self) -> Tensor:
        """`[N, C, h, w]`, unscaled as a `Sample` answers them."""
        task, pipeline = self.task, self.pipeline
        made = []
        for part in task.batches():
            captions = list(task.captions[part])
            shape = latent_shape(task, len(captions))
            noise = initial_noise(shape, torch.float32, task.seed, range(len(task.captions))[part])
            output = pipeline(
                prompt=captions,
                negative_prompt=[""] * len(captions),
                true_cfg_scale=task.cfg,
                num_inference_steps=task.steps,
                height=task.size,
                width=task.size,
                max_sequence_length=pipeline.tokenizer_2.model_max_length,
                latents=pipeline._pack_latents(noise, *shape),
                output_type="latent",
            )
            packed = cast(FluxPipelineOutput, output).images
            made.append(pipeline._unpack_latents(packed, task.size, task.size, pipeline.vae_scale_factor))
        config = pipeline.vae.config
        return torch.cat(made) / config.scaling_factor + config.shift_factor
