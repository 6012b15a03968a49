"""Parallel Redundancy: measures where a model's blocks change little from step to step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..parallel_backend.sampling.names import SAMPLER_NAMES, SCHEDULER_NAMES
from . import host
from .handles import handle_of
from .sampler import ParallelDiTSampler
from .study.findings import Findings, Measured
from .study.heatmaps import heat_maps, to_image

if TYPE_CHECKING:
    from torch import Tensor

MORE_PROMPTS = ("positive_2", "positive_3", "positive_4")


class ParallelDiTRedundancy:
    CATEGORY = "ParallelDiT"
    DESCRIPTION = (
        "Samples each prompt once, and measures how much every block changes from step to step. From that follow heat "
        "maps, and for Parallel Cache a schedule and TeaCache's polynomial of this model."
    )
    SEARCH_ALIASES = ("redundancy", "cache calibration", "teacache coefficients", "heat map", "profile model")
    RETURN_TYPES = ("IMAGE", "PARALLELDIT_STUDY", "STRING")
    RETURN_NAMES = ("heat_maps", "study", "report")
    OUTPUT_TOOLTIPS = (
        "Relative changes and cosines: blocks down, steps across. The first two are of the first prompt.",
        "For Parallel Cache.",
        "What was found, as text.",
    )
    FUNCTION = "measure"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sampler = ParallelDiTSampler.INPUT_TYPES()["required"]
        prompt = ("CONDITIONING", {"tooltip": "A prompt. What is found hardly depends on it."})
        return {
            "required": {
                "model": (
                    "MODEL",
                    {"tooltip": "From Parallel Loader or Parallel LoRA. A cache on it does not work here."},
                ),
                "positive": prompt,
                "latent_image": sampler["latent_image"],
                "seed": sampler["seed"],
                "steps": sampler["steps"],
                "cfg": sampler["cfg"],
                "sampler_name": (
                    list(SAMPLER_NAMES),
                    {"default": "euler", "tooltip": sampler["sampler_name"][1]["tooltip"]},
                ),
                "scheduler": (
                    list(SCHEDULER_NAMES),
                    {"default": "simple", "tooltip": sampler["scheduler"][1]["tooltip"]},
                ),
                "save": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Writes what was found beside the model, where Parallel Cache finds it.",
                    },
                ),
            },
            "optional": {
                "negative": ("CONDITIONING", {"tooltip": "What to avoid. Needed when cfg is not 1."}),
                **dict.fromkeys(MORE_PROMPTS, prompt),
            },
        }

    def measure(
        self,
        model: Any,
        positive: list[Any],
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        save: bool,
        negative: list[Any] | None = None,
        positive_2: list[Any] | None = None,
        positive_3: list[Any] | None = None,
        positive_4: list[Any] | None = None,
    ) -> dict[str, Any]:
        here, path = host.current(), Path(handle_of(model).ref.path)
        prompts = [positive, *(prompt for prompt in (positive_2, positive_3, positive_4) if prompt is not None)]
        runs, pictures = [], []
        for number, prompt in enumerate(prompts, start=1):
            reply = ParallelDiTSampler().ask(
                model, seed, steps, cfg, sampler_name, scheduler, prompt, latent_image, negative=negative, study=True
            )
            name = f"prompt {number}, {steps} steps of {sampler_name}"
            runs.append(Measured.of(name, reply.tensors))
            pictures += heat_maps(runs[-1].changes, f"{path.name}, {name}")
        findings = Findings.of(runs)
        text = findings.text()
        if save:
            try:
                text += f"\nWritten to {findings.save(path)}."
            except OSError as error:
                text += f"\nCould not be written beside the model: {error}"
        here.say(text)
        image: Tensor = to_image(pictures)
        return {"ui": {"text": [text]}, "result": (image, findings, text)}
