"""What makes a layout unfit for a run: one rule a cause, each with the remedy. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .capabilities import Capabilities
from .layout import AXES, Layout
from .split import split_sizes

Misfit = tuple[str, str]
"""What clashes, with its numbers; what to do."""


class PromptFacts(Protocol):
    """Where, when and beside what a prompt counts, as `protocol.messages.Conditioning` says."""

    @property
    def area(self) -> tuple[int, int, int, int] | None: ...

    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...

    @property
    def references(self) -> int: ...


@dataclass(frozen=True)
class RunFacts:
    """What a layout is to be used for, as far as it is known by now. What is None is not judged.

    `ranks`: that there are; `stepwise`: whether each step is asked for by itself, by a sampler elsewhere; `batch`:
    pictures; `cfg`: the guidance scale, at 1 of which the negative prompt is not evaluated unless the sampler is one of
    CFG++: `cfg_pp`; `blocks`, `heads`: of the model; `token_rows`: rows of image tokens; `whole_batch`: whether
    `sampler` looks at the whole latent of the whole batch; `controls`: ControlNets; `entries`: of both sides;
    `cache`: by which rule there is a step cache; `is_study`: whether blocks are measured; `can`: which methods the
    model serves.
    """

    ranks: int | None = None
    stepwise: bool = False
    batch: int | None = None
    cfg: float | None = None
    cfg_pp: bool = False
    has_negative: bool = False
    blocks: int | None = None
    heads: int | None = None
    token_rows: int | None = None
    sampler: str | None = None
    whole_batch: bool = False
    controls: int = 0
    entries: tuple[PromptFacts, ...] = ()
    cache: str | None = None
    is_study: bool = False
    can: Capabilities | None = None


def _ranks(layout: Layout, work: RunFacts) -> Misfit | None:
    if work.ranks is None or layout.ranks == work.ranks:
        return None
    degrees = " x ".join(f"{axis}_degree={layout.degree(axis)}" for axis in AXES)
    return (
        f"The layout's degrees {degrees} multiply to {layout.ranks}, but there are {work.ranks} ranks.",
        f"Make the product {work.ranks}, or start {layout.ranks} ranks.",
    )


def _stepwise(layout: Layout, work: RunFacts) -> Misfit | None:
    approximate = [name for name in ("pipefusion", "distrifusion") if layout.degree(name) > 1]
    if not work.stepwise or not approximate:
        return None
    name = approximate[0]
    return (
        f"{name}_degree={layout.degree(name)} goes on from the step before, but ComfyUI's own samplers ask for one "
        "step at a time.",
        f"Use Parallel Sampler, or a layout with {name}_degree=1.",
    )


def _cfg_degree(layout: Layout, work: RunFacts) -> Misfit | None:
    if layout.cfg_degree <= 2:
        return None
    return (
        f"cfg_degree={layout.cfg_degree}, but there are only 2 halves to spread: positive and negative.",
        "Use cfg_degree 1 or 2.",
    )


def _weights(layout: Layout, work: RunFacts) -> Misfit | None:
    if layout.weights != "sharded" or layout.replicas > 1:
        return None
    parts = layout.tensor_degree * layout.pipefusion_degree
    return (
        f"weights=sharded shares each block among the ranks that compute with it, but in a layout of {layout.ranks} "
        f"ranks with tensor_degree={layout.tensor_degree} and pipefusion_degree={layout.pipefusion_degree} "
        f"every rank has blocks of its own.",
        f"Choose weights=whole, weights=offloaded, or {2 * parts} ranks with ulysses_degree=2.",
    )


def _old_keys(layout: Layout, work: RunFacts) -> Misfit | None:
    approximate = {name: layout.degree(name) for name in ("pipefusion", "distrifusion") if layout.degree(name) > 1}
    if len(approximate) == 2:
        return (
            f"pipefusion_degree={layout.pipefusion_degree} and distrifusion_degree={layout.distrifusion_degree}: both "
            "keep keys and values of the step before, each in its own way.",
            "Set one of them to 1.",
        )
    if approximate and layout.attention == "yunchang":
        name, degree = approximate.popitem()
        return (
            f"attention=yunchang keeps no keys and values between steps, as {name}_degree={degree} needs.",
            "Choose attention=auto or another kernel.",
        )
    return None


NEEDS = {
    "ulysses_degree": ("sequence", "sequence parallelism", 1),
    "ring_degree": ("sequence", "sequence parallelism", 1),
    "pipefusion_degree": ("stages", "PipeFusion", 1),
    "tensor_degree": ("tensor", "tensor parallelism", 1),
    "distrifusion_degree": ("stale", "DistriFusion", 1),
    "weights": ("shards", "blocks in shares", "whole"),
    "compile": ("compile", "compiled blocks", "off"),
}
"""Of settings: the capability that they need and its name in words, unless they have the value that needs none."""


def _capabilities(layout: Layout, work: RunFacts) -> Misfit | None:
    if work.can is None:
        return None
    served = {setting for setting, (capability, *_) in NEEDS.items() if getattr(work.can, capability)}
    for setting, (_, method, neutral) in NEEDS.items():
        value = getattr(layout, setting)
        if value != neutral and setting not in served:
            degrees = [name for name in map("{}_degree".format, AXES) if name in served or name not in NEEDS]
            return (
                f"{setting}={value} asks for {method}, which this model's family cannot do.",
                f"Set {setting} to {neutral}; the ranks can share {', '.join(degrees)}.",
            )
    return None


def _heads(layout: Layout, work: RunFacts) -> Misfit | None:
    if layout.attention != "yunchang" or work.heads is None:
        return None
    uneven = [heads for heads in split_sizes(work.heads, layout.tensor_degree) if heads % layout.ulysses_degree]
    if not uneven:
        return None
    return (
        f"attention=yunchang needs heads that ulysses_degree={layout.ulysses_degree} divides; the model has "
        f"{work.heads}, of which a rank with tensor_degree={layout.tensor_degree} has {uneven[0]}.",
        "Choose attention=auto, which takes uneven heads.",
    )


def _batch(layout: Layout, work: RunFacts) -> Misfit | None:
    if work.batch is None or layout.data_degree <= work.batch:
        return None
    return (
        f"data_degree={layout.data_degree} cuts the batch over as many replicas, but the latent holds {work.batch}.",
        f"Use a batch of at least {layout.data_degree}, or ulysses_degree instead of data_degree.",
    )


def _guidance(layout: Layout, work: RunFacts) -> Misfit | None:
    if work.cfg is None or layout.cfg_degree == 1 or (work.has_negative and (work.cfg != 1.0 or work.cfg_pp)):
        return None
    reason = f"cfg={work.cfg}" if work.has_negative else "no negative conditioning"
    return (
        f"cfg_degree=2 evaluates the positive and the negative prompt on different ranks, but with {reason} "
        "half of the ranks would have nothing to do.",
        "Set cfg above 1 with a negative prompt, or cfg_degree=1 and twice the ulysses_degree.",
    )


def stages_misfit(layout: Layout, work: RunFacts) -> Misfit | None:
    stages, blocks, chosen = layout.pipefusion_degree, work.blocks, layout.stage_blocks
    if stages == 1 and chosen and chosen != "even":
        return (
            f"stage_blocks={','.join(map(str, chosen))} names the blocks of {len(chosen)} stages, but "
            "pipefusion_degree=1 makes none.",
            "Leave stage_blocks empty, or set pipefusion_degree to the number of stages.",
        )
    if stages == 1 or blocks is None:
        return None
    if stages > blocks:
        return (
            f"pipefusion_degree={stages} cuts the model into as many stages, but it has {blocks} blocks.",
            f"Use a pipefusion_degree of at most {blocks}.",
        )
    if chosen and chosen != "even" and (len(chosen) != stages or sum(chosen) != blocks or min(chosen) < 1):
        return (
            f"stage_blocks={','.join(map(str, chosen))} gives {len(chosen)} stages {sum(chosen)} blocks in all; "
            f"pipefusion_degree={stages} makes {stages} stages, and the model has {blocks} blocks.",
            f"Name {stages} numbers from 1 on that add up to {blocks}, or even, or none to have them chosen.",
        )
    return None


def patches_misfit(layout: Layout, work: RunFacts) -> Misfit | None:
    if layout.pipefusion_degree == 1 or work.token_rows is None or layout.num_patches <= work.token_rows:
        return None
    return (
        f"num_patches={layout.num_patches} cuts the picture into as many strips, but it has {work.token_rows} rows of "
        "tokens.",
        f"Use at most {work.token_rows} patches, or 0 to have their number chosen.",
    )


def _sampler(layout: Layout, work: RunFacts) -> Misfit | None:
    if not work.whole_batch:
        return None
    seen = {"pipefusion": "strips of it", "data": "some of its pictures"}
    cut = next((axis for axis in seen if layout.degree(axis) > 1), None)
    if cut is None:
        return None
    return (
        f"The sampler {work.sampler} looks at the whole latent; with {cut}_degree={layout.degree(cut)} it would see "
        f"{seen[cut]}.",
        f"Use another sampler (euler), or {cut}_degree=1.",
    )


def _controls(layout: Layout, work: RunFacts) -> Misfit | None:
    if not work.controls or layout.distrifusion_degree == 1:
        return None
    return (
        f"A ControlNet needs fresh keys and values; distrifusion_degree={layout.distrifusion_degree} has old ones.",
        "Set distrifusion_degree to 1.",
    )


def _areas(layout: Layout, work: RunFacts) -> Misfit | None:
    if layout.pipefusion_degree == 1 or all(entry.area is None for entry in work.entries):
        return None
    return (
        f"A prompt is for an area of the picture, but pipefusion_degree={layout.pipefusion_degree} predicts in strips "
        "that are as wide as the picture.",
        "Set pipefusion_degree to 1, or give the prompt a mask (set_cond_area default) in place of the area.",
    )


def _time_ranges(layout: Layout, work: RunFacts) -> Misfit | None:
    approximate = [name for name in ("pipefusion", "distrifusion") if layout.degree(name) > 1]
    ranges = [(entry.start, entry.end) for entry in work.entries if entry.start > 0.0 or entry.end < 1.0]
    if not approximate or not ranges:
        return None
    (start, end), name = ranges[0], approximate[0]
    return (
        f"A prompt counts from {start:g} to {end:g} of the run, but {name}_degree={layout.degree(name)} goes on from "
        "its keys and values of the step before.",
        f"Set {name}_degree to 1, or let the prompt count for the whole run.",
    )


def _references(layout: Layout, work: RunFacts) -> Misfit | None:
    references = max((entry.references for entry in work.entries), default=0)
    if layout.pipefusion_degree == 1 or not references:
        return None
    return (
        f"A prompt has {references} reference pictures, whose tokens are in none of the strips that "
        f"pipefusion_degree={layout.pipefusion_degree} cuts the picture into.",
        "Set pipefusion_degree to 1.",
    )


def _cache(layout: Layout, work: RunFacts) -> Misfit | None:
    if work.cache == "attention":
        return _shared_attention(layout)
    if layout.pipefusion_degree == 1 or work.cache in (None, "schedule"):
        return None
    return (
        f"A step cache of kind {work.cache} decides by the first block whether the others are computed, but with "
        f"pipefusion_degree={layout.pipefusion_degree} these are in stages that work on other strips by then.",
        "Set the kind of Parallel Cache to schedule, which looks at the noise level alone, or pipefusion_degree to 1.",
    )


def _shared_attention(layout: Layout) -> Misfit | None:
    for name in ("pipefusion", "distrifusion"):
        if layout.degree(name) > 1:
            return (
                f"{name}_degree={layout.degree(name)} takes keys and values of the step before, and shared attention "
                "has none.",
                f"Set {name}_degree to 1, or the kind of Parallel Cache to schedule.",
            )
    if layout.compile != "off":
        return (
            "A compiled block cannot leave out its attention in some of the steps.",
            "Set compile to off, or the kind of Parallel Cache to schedule.",
        )
    return None


def _study(layout: Layout, work: RunFacts) -> Misfit | None:
    if not work.is_study:
        return None
    for name in ("tensor", "pipefusion", "distrifusion"):
        if layout.degree(name) > 1:
            return (
                f"A study measures whole blocks in exact runs, but with {name}_degree={layout.degree(name)} a rank has "
                "parts of blocks, some of the blocks, or keys and values of the step before.",
                f"Set {name}_degree to 1 for the study.",
            )
    if layout.compile != "off":
        return ("A study looks into the blocks, and compiled ones cannot be looked into.", "Set compile to off.")
    return None


RULES = (
    _stepwise,
    _cfg_degree,
    _ranks,
    _capabilities,
    _weights,
    _old_keys,
    _heads,
    _batch,
    _guidance,
    stages_misfit,
    patches_misfit,
    _sampler,
    _controls,
    _cache,
    _study,
    _areas,
    _time_ranges,
    _references,
)
