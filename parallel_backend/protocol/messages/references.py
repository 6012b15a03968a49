"""References to models and adapters in requests, by their paths on the ranks' host."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Index, Message

WeightDtype = Literal["auto", "bf16", "fp16", "fp32", "fp8_e4m3fn"]


class ModelRef(Message):
    """A diffusion transformer: a diffusers folder or a safetensors file, as the ranks' host sees the path."""

    kind: Literal["model"] = "model"
    path: str
    weight_dtype: WeightDtype = "auto"


class TextRef(Message):
    """The text encoders of a diffusers pipeline folder."""

    kind: Literal["text"] = "text"
    path: str


class VaeRef(Message):
    """A VAE: a diffusers folder or a single safetensors file."""

    kind: Literal["vae"] = "vae"
    path: str
    weight_dtype: WeightDtype = "auto"


Strength = Annotated[float, Field(ge=-100.0, le=100.0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class LoraRef(Message):
    """A LoRA file of any format, as the ranks' host sees the path.

    `block_strengths`: factors of the strength, one for each of the model's blocks in the order of computation.
    """

    kind: Literal["lora"] = "lora"
    path: str
    strength: Strength = 1.0
    block_strengths: tuple[Strength, ...] = ()


class ControlNetRef(Message):
    """A ControlNet: a diffusers folder or a safetensors file, as the ranks' host sees the path.

    `dtype`: what the ranks have loaded it in; the client leaves it empty.
    """

    kind: Literal["controlnet"] = "controlnet"
    path: str
    dtype: str = ""


Percent = Annotated[float, Field(ge=0.0, le=1.0)]


class ControlUse(Message):
    """The use of a ControlNet, from `start` to `end` of the run. `mode`: the kind of picture, for a union ControlNet.

    Tensor `control.<index>` [B or 1, C, h, w]: the control picture's latent, as the VAE gives it, of the size of the
    latent, or of the area of the entries that name it; for one that takes pixels [B or 1, 3, 8 h, 8 w], the control
    picture in 0..1.
    """

    net: ControlNetRef
    strength: Strength = 1.0
    start: Percent = 0.0
    end: Percent = 1.0
    mode: int | None = Field(default=None, ge=0, le=1000)


class IPAdapterRef(Message):
    """An IP-Adapter: a safetensors file, as the ranks' host sees the path.

    `dtype`: what the ranks have loaded it in; the client leaves it empty.
    """

    kind: Literal["ip_adapter"] = "ip_adapter"
    path: str
    dtype: str = ""


class ImagePromptUse(Message):
    """A picture that an IP-Adapter shows the model, from `start` to `end` of the run.

    In a `Predict`, whose run the client knows, it is named while it is to work, and works.
    """

    adapter: IPAdapterRef
    weight: Strength = 1.0
    start: Percent = 0.0
    end: Percent = 1.0


CacheRule = Literal["first block", "teacache", "schedule", "attention"]
Coefficient = Annotated[float, Field(ge=-1e9, le=1e9)]
Rate = Annotated[float, Field(ge=0.0, le=1e6)]


class StepCache(Message):
    """A step cache by the `rule` that a module of caches/ describes, from `start` to `end` of the run.

    In a `Predict`, whose run the client knows, it is named while it is to work. `coefficients`: of TeaCache's
    polynomial; none: those that were published for the model. `rates`: of a schedule; `attention`: of each
    block's attention.
    """

    rule: CacheRule = "first block"
    threshold: float = Field(ge=0.0, le=10.0)
    coefficients: tuple[Coefficient, ...] = Field(default=(), max_length=16)
    rates: tuple[Rate, ...] = Field(default=(), max_length=1000)
    attention: tuple[tuple[Rate, ...], ...] = Field(default=(), max_length=1000)
    max_skips: Index = 0
    order: int = Field(default=0, ge=0, le=2)
    start: Percent = 0.0
    end: Percent = 1.0


class WeightChange(Message):
    """A change of the parameter `key` (as the original model and ComfyUI name it), or of `rows` (start, length) of it.

    `digest`: of its tensors, which the ranks have kept (`KeepChanges`). `swap_halves`: its rows are those of the
    diffusers layout, whose halves the original has the other way around.
    """

    key: str
    digest: Digest
    strength: Strength
    rows: tuple[Index, Index] | None = None
    swap_halves: bool = False


class Adapters(Message):
    """The changes of the model's weights in a run: LoRA files, then changes that the graph has sent."""

    files: tuple[LoraRef, ...] = ()
    changes: tuple[WeightChange, ...] = ()
