"""What a client asks of the sidecar."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from ...layout.layout import Layout
from .base import Count, Index, Message
from .references import (
    Adapters,
    ControlUse,
    Digest,
    ImagePromptUse,
    ModelRef,
    Percent,
    StepCache,
    Strength,
    TextRef,
    VaeRef,
)

OnOutOfMemory = Literal["error", "tiles"]


class Request(Message):
    id: Count = Field(description="chosen by the client; events and the reply carry it")


class EncodeText(Request):
    """Reply tensors: `tokens` [1, St, C] and the family's other inputs, as in `Conditioning`."""

    type: Literal["encode_text"] = "encode_text"
    text: TextRef
    prompt: str
    prompt_2: str | None = None
    max_length: int | None = Field(default=None, ge=1, le=4096)


Pixels = Annotated[int, Field(ge=1, le=1 << 20)]
Size = tuple[Pixels, Pixels]
Offset = Annotated[int, Field(ge=0, le=1 << 20)]


MAX_STEPS = 10_000

Finite = Annotated[float, Field(ge=-1e6, le=1e6)]
MAX_DRAWS = 1 << 16
"""For one of them the noise of all earlier pictures is drawn, too."""
BatchIndex = Annotated[int, Field(ge=0, lt=MAX_DRAWS)]


class Schedule(Message):
    """Sigmas by name, computed in the ranks. `denoise` below 1 keeps the last part of a longer schedule."""

    scheduler: str
    steps: int = Field(ge=1, le=MAX_STEPS)
    denoise: float = Field(default=1.0, gt=0.0, le=1.0)


ReferencePlaces = Literal["offset", "index", "index_timestep_zero", "negative_index", "uxo"]
"""ComfyUI's names for the positions of reference pictures relative to the picture; families/joint.py defines them."""


class Prompt(Message):
    """The condition of one prediction. Tensors `<side>.<index>.tokens` [B or 1, St, C] and, if the model takes them,
    `….pooled` [B or 1, Cp], `….mask` [B or 1, St], the second text encoder's `….tokens_2` and `….mask_2`, and as many
    `….reference.<number>` [B or 1, C, ..., h, w] as there are `references`: latents of pictures to look at, scaled as
    the request's latent is. For each of the `image_prompts` `….image.<number>` [B or 1, …], the picture as the
    IP-Adapter's image encoder gives it.

    `size` and `target_size`: height and width in pixels, for models that take them; `crop`: what was cut off above and
    on the left of the picture; `aesthetic_score`: how beautiful it is to be.
    """

    guidance: Finite | None = None
    size: Size | None = None
    target_size: Size | None = None
    crop: tuple[Offset, Offset] = (0, 0)
    aesthetic_score: Finite | None = None
    references: int = Field(default=0, ge=0, le=16)
    reference_places: ReferencePlaces | None = None
    image_prompts: tuple[ImagePromptUse, ...] = Field(default=(), max_length=16)


Cells = Annotated[int, Field(ge=0, le=1 << 17)]


class Conditioning(Prompt):
    """One entry of a side: a prompt, and where, when and how much it counts among others (strategies.weighted_prompts).

    `prompt`: the earlier entry of this side whose tensors it shares; without one it has its own. `area`: height, width,
    top and left, in cells of the latent. It counts from `start` to `end` of the run. Tensor `<side>.<index>.region`
    [B or 1, H, W], of a video [B or 1, T or 1, H, W]: how much it counts in each cell of the latent, times `strength`.
    """

    prompt: Index | None = None
    area: tuple[Cells, Cells, Cells, Cells] | None = None
    strength: Strength = 1.0
    start: Percent = 0.0
    end: Percent = 1.0
    controls: tuple[Index, ...] = Field(default=(), description="indices into the request's controls")


class FindChanges(Request):
    """Reply `data`: {"missing": [those of `digests` that the ranks do not hold]}."""

    type: Literal["find_changes"] = "find_changes"
    digests: tuple[Digest, ...]


class KeepChanges(Request):
    """Tensors `<index>.<role>` of the change `digests[index]`; the roles are those of `adapters.lora.delta.ROLES`."""

    type: Literal["keep_changes"] = "keep_changes"
    digests: tuple[Digest, ...]


class Sample(Request):
    """Sample a latent. Tensors: `latent` (unscaled), [B, C, H, W] of pictures or [B, C, T, H, W] of videos, optionally
    `noise_mask` [B or 1, 1, H', W'] or [B or 1, 1 or C, T', H', W'], `sigmas` [steps + 1] when `schedule` is None, and
    those of every `Conditioning` (side = positive | negative). A model of several latents has `latent.<name>` and
    `noise_mask.<name>` instead, by the names in its family's spec.

    Of the run's steps those from `start_step` to before `end_step` are taken, the last of them down to no noise unless
    `leftover_noise`. Without `add_noise` the latent has its noise already.

    With `study` what changes from step to step is measured.

    Reply tensors: as the latents; of a study `study.levels` [E] of E evaluations, from 1 to 0, and between each two of
    them `study.changes` [E - 1, blocks, 6, 2] and `study.whole` [E - 1, 3, 2]: relative change and cosine of what
    caches/study.py names. Events: `Progress` per step, with tensor `preview` [1, C, H, W] if asked, of a video
    [1, C, 1, H, W]: its first frame.
    """

    type: Literal["sample"] = "sample"
    model: ModelRef
    layout: Layout
    positive: tuple[Conditioning, ...] = Field(min_length=1, max_length=64)
    negative: tuple[Conditioning, ...] = Field(default=(), max_length=64)
    cfg: float = Field(default=1.0, ge=0.0, le=1000.0)
    cfg_norm: float | None = Field(
        default=None, ge=0.0, le=100.0, description="the strength of ComfyUI's CFGNorm, where the graph has it"
    )
    sampler: str
    schedule: Schedule | None
    sampling_shift: Finite | None = Field(
        default=None, description="the flow shift, where the graph changes the family's own"
    )
    seed: int = Field(ge=0, lt=2**64)
    batch_index: tuple[BatchIndex, ...] | None = None
    add_noise: bool = True
    start_step: int = Field(default=0, ge=0, le=MAX_STEPS)
    end_step: int = Field(default=MAX_STEPS, ge=0, le=MAX_STEPS)
    leftover_noise: bool = False
    cpu_noise_offset: int = Field(
        default=1, ge=0, le=1, description="from the seed to that of a stochastic sampler's noise, where a CPU draws it"
    )
    preview: bool = False
    adapters: Adapters = Adapters()
    controls: tuple[ControlUse, ...] = Field(default=(), max_length=16)
    cache: StepCache | None = None
    study: bool = False


Key = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


ResidualList = Literal["input", "output"]
ResidualNumber = Annotated[int, Field(ge=0, le=1024)]


class RunPrompt(Prompt):
    """The condition of a `Predict`, with the ControlNets that work now. The client knows the run, and names them while
    they work: `start` and `end` count for nothing here. Tensors `<key>.0.control.<number>` as `ControlUse` says.
    """

    controls: tuple[ControlUse, ...] = Field(default=(), max_length=16)


class Predict(Request):
    """One prediction of the transformer for a sampler that runs in the client, for one or more conditions at once.

    `run` names the sampler's run. Its conditions come once, in `run_conditions`, and are named by their keys from then
    on; those of another run are forgotten. Tensors: `latent` [N * B, C, H, W] or [N * B, C, T, H, W], one after the
    other for each of the N `conditions`, scaled as the model takes it; `timestep` [N * B] or [N * B, frames] on the
    model's clock, and that of the run's next level, `next_timestep` [N * B], for models that are given it; those of
    every `RunPrompt` that comes (side = its key, index = 0); `residual.<number>` [N * B or 1, S, h] of the client's own
    ControlNets, which `residuals` puts where ComfyUI's lists "input" and "output" have them.

    A model of several latents has `latent.<name>` instead, and `prediction.<name>` is answered.

    Reply tensor: `prediction`, of the latent's shape; or `data` {"missing": [keys]} of conditions that are not held.
    """

    type: Literal["predict"] = "predict"
    model: ModelRef
    layout: Layout
    run: Key
    conditions: tuple[Key, ...] = Field(min_length=1, max_length=256)
    run_conditions: dict[Key, RunPrompt] = Field(default_factory=dict, max_length=256)
    adapters: Adapters = Adapters()
    residuals: dict[ResidualList, tuple[ResidualNumber | None, ...]] = Field(default_factory=dict)
    cache: StepCache | None = None


def entries_of(request: Request) -> tuple[Prompt, ...]:
    """The prompts that a request brings."""
    match request:
        case Sample():
            return (*request.positive, *request.negative)
        case Predict():
            return tuple(request.run_conditions.values())
    return ()


def controls_of(request: Request) -> tuple[ControlUse, ...]:
    """The ControlNets that a request brings."""
    match request:
        case Sample():
            return request.controls
        case Predict():
            return tuple(control for entry in request.run_conditions.values() for control in entry.controls)
    return ()


class EndRun(Request):
    """Forgets the conditions and adapters of `run`."""

    type: Literal["end_run"] = "end_run"
    run: Key


class VaeWork(Request):
    """`tile_size` in pixels; 0 shares each whole picture in row bands (exact). `on_out_of_memory`: whether tiles may be
    taken where memory is too small for that."""

    vae: VaeRef
    tile_size: int = Field(default=0, ge=0, le=8192)
    overlap: int = Field(default=64, ge=0, le=4096)
    on_out_of_memory: OnOutOfMemory = "error"


class Decode(VaeWork):
    """Latent to picture. Tensor: `latent` [B, C, h, w]. Reply tensor: `image` [B, H, W, 3] in 0..1."""

    type: Literal["decode"] = "decode"


class EncodeImage(VaeWork):
    """Picture to latent. Tensor: `image` [B, H, W, 3] in 0..1. Reply tensor: `latent` [B, C, h, w]."""

    type: Literal["encode_image"] = "encode_image"


class Unload(Request):
    """Free what the ranks hold. Reply `data`: {"freed_bytes": [per rank]}."""

    type: Literal["unload"] = "unload"


class Status(Request):
    """Reply `data`: {"ranks": [per rank], "models": [...], "traffic": {...}, "uptime_s": ...}."""

    type: Literal["status"] = "status"


class Shutdown(Request):
    """End the sidecar. It is refused while another client's request is under way, unless `force`; `by` says to those
    whose requests it ends who it was."""

    type: Literal["shutdown"] = "shutdown"
    by: str = Field(default="", max_length=200)
    force: bool = False


class Cancel(Message):
    """Leave the run `id` at the next step. It is answered by that run's `Failure` of code "cancelled"."""

    type: Literal["cancel"] = "cancel"
    id: Count


AnyRequest = (
    EncodeText
    | FindChanges
    | KeepChanges
    | Sample
    | Predict
    | EndRun
    | Decode
    | EncodeImage
    | Unload
    | Status
    | Shutdown
)
FROM_CLIENT: TypeAdapter[AnyRequest | Cancel] = TypeAdapter(Annotated[AnyRequest | Cancel, Field(discriminator="type")])
