"""Parallel Sampler: one request per run; the ranks do all the steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

from ..launcher.client import Client
from ..parallel_backend.protocol.messages import MAX_STEPS, Adapters, Sample
from ..parallel_backend.sampling.names import (
    CFG_PP_SAMPLERS,
    SAMPLER_NAMES,
    SCHEDULER_NAMES,
    WHOLE_BATCH_SAMPLERS,
    check_negative,
    check_part,
    needs_negative,
    unknown,
)
from . import host
from .handles import handle_of
from .layout_choice import LayoutChoice
from .request import conditioning, controls, image_prompts, latent, regions
from .session import session, weight_delivery
from .widgets import allowed


class ParallelDiTSampler:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "ksampler",
        "ksampler advanced",
        "sampler",
        "denoise",
        "generate",
        "multi gpu",
        "multigpu",
        "distributed",
        "xdit",
        "xfuser",
        "raylight",
    )
    DESCRIPTION = "Samples a latent in the ranks. All samplers, schedulers and noise of KSampler."
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The denoised latent.",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "From Parallel Loader."}),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 0xFFFFFFFFFFFFFFFF,
                        "control_after_generate": True,
                        "tooltip": "The same seed gives the same noise as in KSampler, however many ranks there are.",
                    },
                ),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip": "Steps from noise to latent."}),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.1,
                        "round": 0.01,
                        "tooltip": "Weight of the positive against the negative prompt. At 1 the negative prompt is "
                        "not evaluated: right for distilled models such as Flux. The samplers cfg_pp need it at 1 too.",
                    },
                ),
                "sampler_name": (
                    list(SAMPLER_NAMES),
                    {"default": "euler", "tooltip": "How a step uses the model's prediction."},
                ),
                "scheduler": (
                    list(SCHEDULER_NAMES),
                    {"default": "simple", "tooltip": "How the noise falls over the steps."},
                ),
                "positive": (
                    "CONDITIONING",
                    {"tooltip": "What to show: a prompt, or several in their places and times."},
                ),
                "latent_image": ("LATENT", {"tooltip": "An empty latent, or a picture's latent with denoise below 1."}),
                "denoise": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.01,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Below 1 the latent is noised only in part, so that the picture stays similar.",
                    },
                ),
            },
            "optional": {
                "negative": ("CONDITIONING", {"tooltip": "What to avoid. Needed when cfg is not 1."}),
                "add_noise": (
                    ["enable", "disable"],
                    {
                        "default": "enable",
                        "advanced": True,
                        "tooltip": "Disabled: the latent has its noise already, left over by the sampler before.",
                    },
                ),
                "start_at_step": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MAX_STEPS,
                        "advanced": True,
                        "tooltip": "The first of the steps to take, counted from 0: those before are another "
                        "sampler's.",
                    },
                ),
                "end_at_step": (
                    "INT",
                    {
                        "default": MAX_STEPS,
                        "min": 0,
                        "max": MAX_STEPS,
                        "advanced": True,
                        "tooltip": "The step before which to stop. At or beyond steps the run is taken to its end.",
                    },
                ),
                "return_with_leftover_noise": (
                    ["disable", "enable"],
                    {
                        "default": "disable",
                        "advanced": True,
                        "tooltip": "Enabled: a run that stops before its end keeps its noise, for a sampler that goes "
                        "on from there. Disabled: its last step removes all noise.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, sampler_name: str, scheduler: str, start_at_step: int = 0, end_at_step: int = MAX_STEPS
    ) -> bool:
        return allowed(_check_inputs, sampler_name, scheduler, start_at_step, end_at_step)

    def sample(
        self,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: list[Any],
        latent_image: dict[str, Any],
        denoise: float,
        negative: list[Any] | None = None,
        add_noise: str = "enable",
        start_at_step: int = 0,
        end_at_step: int = MAX_STEPS,
        return_with_leftover_noise: str = "disable",
    ) -> tuple[dict[str, Any]]:
        reply = self.ask(
            model,
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            latent_image,
            denoise,
            negative,
            add_noise,
            start_at_step,
            end_at_step,
            return_with_leftover_noise,
        )
        sampled = {name: host.current().kept(tensor) for name, tensor in reply.tensors.items()}
        return (latent.from_reply(latent_image, handle_of(model).spec.latents, sampled),)

    def ask(
        self,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: list[Any],
        latent_image: dict[str, Any],
        denoise: float = 1.0,
        negative: list[Any] | None = None,
        add_noise: str = "enable",
        start_at_step: int = 0,
        end_at_step: int = MAX_STEPS,
        return_with_leftover_noise: str = "disable",
        *,
        study: bool = False,
    ) -> session.Reply:
        """The ranks' reply to a run with the inputs of `sample`. A `study` measures blocks, and skips none."""
        here = host.current()
        handle = handle_of(model)
        here.check_model(model)
        _check_inputs(sampler_name, scheduler, start_at_step, end_at_step)
        check_negative(sampler_name, cfg, has_negative=negative is not None)

        specs = handle.spec.latents
        latents, tensors = latent.to_message(latent_image, specs, handle.family)
        first = latents[specs[0].name]
        shape = first.shape
        if len(specs) > 1:
            regions.refuse_places({"positive": positive, "negative": negative or []}, handle.family)
        sides = regions.placed_sides(positive, negative or [], shape)
        guided = needs_negative(sampler_name, cfg)
        if not guided:
            del sides["negative"]
        prompts = {side: conditioning.to_message(side, each, handle.family, shape) for side, each in sides.items()}
        named, placed = controls.to_message({side: (prompts[side][0], sides[side]) for side in sides})
        for side, (_, prompt_tensors) in prompts.items():
            named[side], embeddings = image_prompts.to_message(named[side], side, handle.pictures)
            tensors |= prompt_tensors | embeddings
        schedule, sigmas, shift = here.schedule(model, sampler_name, scheduler, steps, denoise)
        tensors |= {} if sigmas is None else {"sigmas": sigmas}
        batch = len(first)
        changes = here.changes(model)

        choice = handle.layout or LayoutChoice()
        client = session.client_for(handle.layout)
        facts = replace(
            handle.facts(client.welcome.ranks),
            batch=batch,
            cfg=cfg,
            cfg_pp=sampler_name in CFG_PP_SAMPLERS,
            sampler=sampler_name,
            whole_batch=sampler_name in WHOLE_BATCH_SAMPLERS,
            has_negative=negative is not None,
            cache=handle.cache.rule if handle.cache and not study else None,
            is_study=study,
            token_rows=handle.spec.count_rows({name: each.shape for name, each in latents.items()}),
            controls=len(placed),
            entries=tuple(chain.from_iterable(named.values())),
        )
        layout = choice.resolve(facts, guided=guided, preferred_attention=here.chosen_attention(model))
        tensors |= {f"control.{index}": control.picture(first) for index, control in enumerate(placed)}
        message = Sample(
            id=0,
            model=handle.ref,
            layout=layout,
            positive=named["positive"],
            negative=named.get("negative", ()),
            cfg=cfg,
            cfg_norm=here.cfg_norm(model),
            sampler=sampler_name,
            schedule=schedule,
            sampling_shift=shift,
            seed=seed,
            batch_index=latent.batch_index(latent_image, len(first)),
            add_noise=add_noise == "enable",
            start_step=min(start_at_step, MAX_STEPS),
            end_step=min(end_at_step, MAX_STEPS),
            leftover_noise=return_with_leftover_noise == "enable",
            cpu_noise_offset=here.cpu_noise_offset,
            preview=here.wants_previews(model),
            cache=None if study else handle.cache,
            study=study,
            controls=tuple(control.message for control in placed),
            adapters=Adapters(files=handle.loras, changes=tuple(change.message for change in changes)),
        )

        def ask(client: Client) -> session.Reply:
            weight_delivery.deliver(client, changes)
            return session.ask(client, message, tensors, model)

        return session.with_living(client, ask)


def _check_inputs(sampler_name: str, scheduler: str, start_at_step: int, end_at_step: int) -> None:
    check_part(start_at_step, end_at_step)
    for what, name, known in (("sampler", sampler_name, SAMPLER_NAMES), ("scheduler", scheduler, SCHEDULER_NAMES)):
        if name not in known:
            raise unknown(what, name, known)
