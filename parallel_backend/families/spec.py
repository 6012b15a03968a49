"""What every part of the pack knows of a family: one record of data, without torch's modules or diffusers.

Nodes, command line, launcher and ranks read it. What computes is the family's view, which a rank imports by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from ..layout.capabilities import Capabilities
from ..layout.stages import BlockList

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = {"weight": "weight", "bias": "bias"}

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a file's or a model's tensors, by name."""

Config = Mapping[str, Any]
"""The arguments of a model's class in diffusers."""


@dataclass(frozen=True)
class LatentSpec:
    """One latent that a model samples: `[B, C, H, W]` with 2 `dims`, `[B, C, T, H, W]` with 3.

    `stride`: frames, rows and columns of pixels (of any signal) to a cell. `patch`: frames, rows and columns of cells
    to a token. The model's own latent is `((x - mean) / std - shift) * scale` of the VAE's, mean and deviation given
    by channel, if at all. `channels_last`: whether a token's values are those of its first cell in all channels, then
    of the next, rather than all cells of the first channel first.
    """

    channels: int
    name: str = "image"
    dims: Literal[2, 3] = 2
    stride: tuple[int, int, int] = (1, 8, 8)
    patch: tuple[int, int, int] = (1, 2, 2)
    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels_last: bool = False

    def of_vae(self, config: Mapping[str, Any]) -> LatentSpec:
        """The same of a VAE with that config.json: with the numbers that it says, and the others as they are.

        Raises `UserError` for numbers that no latent can be scaled by.
        """
        said: dict[str, Any] = {}
        if config.get("scaling_factor") is not None:
            said = {"scale": config["scaling_factor"], "shift": config.get("shift_factor") or 0.0}
        if config.get("latents_mean") and config.get("latents_std"):
            said |= {"mean": tuple(config["latents_mean"]), "std": tuple(config["latents_std"])}
        found = replace(self, **said)
        _check_numbers(found)
        return found

    def process_in(self, latent: Tensor) -> Tensor:
        """Converts the VAE's latent `[B, C, ...]` to the latent that the model was trained on."""
        if self.mean:
            latent = (latent - _by_channel(self.mean, latent)) / _by_channel(self.std, latent)
        return (latent - self.shift) * self.scale

    def process_out(self, latent: Tensor) -> Tensor:
        """The inverse of `process_in`."""
        latent = latent / self.scale + self.shift
        return latent * _by_channel(self.std, latent) + _by_channel(self.mean, latent) if self.mean else latent


def _by_channel(numbers: Sequence[float], latent: Tensor) -> Tensor:
    key = tuple(numbers), latent.dtype, latent.device
    if key not in _by_device:
        _by_device[key] = latent.new_tensor(numbers)
    return _by_device[key].view(-1, *[1] * (latent.ndim - 2))


_by_device: dict[tuple[object, ...], Tensor] = {}
"""Numbers of VAEs on the devices of latents: copied there once, since a copy waits for the device."""


def _check_numbers(spec: LatentSpec) -> None:
    numbers = [spec.scale, spec.shift, *spec.mean, *spec.std]
    are_numbers = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    fits = not spec.mean or len(spec.mean) == len(spec.std) == spec.channels
    if not are_numbers or not fits or 0 in (spec.scale, *spec.std):
        raise UserError(
            f"The VAE's config.json scales latents of {spec.channels} channels by scaling_factor={spec.scale!r}, "
            f"shift_factor={spec.shift!r}, {len(spec.mean)} latents_mean and {len(spec.std)} latents_std.",
            "It takes finite numbers, of which scaling_factor and latents_std are not 0, and of the last two one for "
            "each channel. Download the VAE's config.json again.",
        )


@dataclass(frozen=True)
class Rule:
    """The modules `targets` hold the rows of the module `source`, in order; the target "" is the model itself.

    `{i}` stands for a block's number, `{last}` for the last block's: a rule with it comes before those with `{i}`.
    `swap_halves`: the target holds the second half of the source's rows first. `suffixes`: parameter names, source
    to target.
    """

    source: str
    targets: tuple[str, ...]
    swap_halves: bool = False
    suffixes: Mapping[str, str] = field(default_factory=lambda: SUFFIXES)


@dataclass(frozen=True)
class LoraName:
    """What trainers call modules, beside the names of the two layouts.

    Modules of the `layout`, whose names in it match `pattern`, are `called` so too (a replacement for `re`), behind the
    prefixes of the layout `like`: its own, where that is "". `parts`: of how many of the parameters that a module holds
    it is the name, the first ones; 0 is all.
    """

    layout: str
    pattern: str
    called: str
    like: str = ""
    parts: int = 0


@dataclass(frozen=True)
class HeadGroup:
    """Attention heads that are cut alike. `count`, `width`: what the config calls their number and their channels.

    The width may be a number, too, or be computed from a config that does not say it. `serves`: the group of the query
    heads that attend to these, where they are fewer (grouped-query attention). A rank has those that its own query
    heads attend to, so that ranks repeat them rather than cut them.
    """

    count: str
    width: str | int | Callable[[Config], int]
    serves: str | None = None


HEADS: Mapping[str, HeadGroup] = {"heads": HeadGroup("num_attention_heads", "attention_head_dim")}
FEATURES = "features"


@dataclass(frozen=True)
class Cut:
    """How the layers of a block are cut whose names within it match the regular expression `layers`.

    "column": a rank computes some of the outputs, and keeps them. "row": a rank takes the inputs that it has, and the
    outputs of all ranks are added up; the bias is the first rank's. "gathered": as "column", and every rank gets the
    outputs of all. "norm": a root mean square norm over heads that the ranks have parts of; they add up the squares.
    `spans`: what the cut dim consists of, in order, each cut by itself: a group of heads by its name, or "features" (an
    even part of what remains). A norm has one group of heads.
    """

    layers: str
    style: Literal["column", "row", "gathered", "norm"]
    spans: tuple[str, ...] = (FEATURES,)


@dataclass(frozen=True)
class Input:
    """A tensor that a model is conditioned on: `name` in a `Condition` and in a request, of `ndim` dims, batch first.

    `what`: in words, for errors. `entry`: its key in an entry of ComfyUI's CONDITIONING; None for the entry's own
    tensor. `network`: the argument of ComfyUI's network that becomes it; None where the host's network takes none.
    `mask`: the input `[B, S]` that says which of its tokens count; without one all of them do. `trimmed`: the model is
    given those that count, and no mask.
    """

    name: str
    ndim: int
    what: str
    entry: str | None = None
    network: str | None = None
    required: bool = True
    mask: str | None = None
    trimmed: bool = False


@dataclass(frozen=True, eq=False)
class FamilySpec:
    """One family of models. See the fields. Equal to no other."""

    name: str
    title: str
    """The name that people read."""
    view: str
    """Module of this folder and class, as "flux:Flux": imported in the ranks alone."""
    class_name: str
    """The network's class in diffusers; module and class, as for `view`, of a network that diffusers lacks."""
    blocks: tuple[BlockList, ...]
    """The lists of blocks, in the order of computation."""
    latents: tuple[LatentSpec, ...]
    """What it samples."""
    inputs: tuple[Input, ...]
    encoders: str
    """The text encoders that make its conditioning, for messages."""
    latent_scale: Callable[[Config], float] | None = None
    """The scale of the first latent, where it differs among the family's models."""
    guidance: float = 3.5
    """The distilled guidance scale that ComfyUI gives a model of a prompt that says none."""
    unread: tuple[str, ...] = ()
    """Keys of an entry of CONDITIONING that ComfyUI's text encoders give, and its network does not look at."""
    landmarks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Keys that together occur in this family's files only: by layout ("original", "diffusers"), then by meaning."""
    reject: Callable[[Shapes, Mapping[str, str]], str | None] = lambda shapes, metadata: None
    """Names the neighbour with the same landmarks that a file belongs to, from its shapes and metadata; None if it is
    this family's."""
    rules: tuple[Rule, ...] = ()
    """Map the original names to those of diffusers."""
    derive_config: Callable[[str, Shapes, Config], dict[str, Any]] = lambda layout, shapes, declared: dict(declared)
    """Returns the arguments of the diffusers class, from layout, shapes and the declared config (of config.json)."""
    cuts: tuple[Cut, ...] = ()
    """How tensor parallelism cuts its blocks' layers; a layer in no row is whole on every rank."""
    heads: Mapping[str, HeadGroup] = field(default_factory=lambda: HEADS)
    """Groups of attention heads that `cuts` name."""
    older_class_names: tuple[str, ...] = ()
    """What config.json of an older diffusers calls the class."""
    not_weights: tuple[str, ...] = ()
    """Keys of tensors that the module does not need."""
    marks: tuple[str, ...] = ()
    """Keys that tell a kind of model and are none of its weights: in a file that holds more, they stand beside the
    model's. Those of a model, as `derive_config` says in `_marks`, are told to ComfyUI's detection."""
    never_fp8: tuple[str, ...] = ()
    """Modules whose matrices other modules use."""
    host_config: Callable[[Config], dict[str, Any]] | None = None
    """What ComfyUI's detection says of a model with such a config; None where ComfyUI has no class for it."""
    host_class: str | None = None
    """The class of such models in ComfyUI's `supported_models`, where not every ComfyUI has it, or where only the width
    tells it from that of another family; None: it follows from `host_config`."""
    host_params: str | None = None
    """Module and class of ComfyUI that is given `host_config`, where older versions take fewer arguments."""
    host_reads: tuple[str, ...] = ()
    """Modules of ComfyUI's network, by their original names, whose weights its ControlNets copy."""
    residuals: Callable[[Config], Mapping[str, Sequence[int]]] | None = None
    """The blocks behind which ComfyUI adds the residuals of its lists "input" and "output"; None: it adds none."""
    all_residuals: bool = False
    """Whether ComfyUI takes a list only with a residual for each of these blocks."""
    reference_places: tuple[str, ...] = ()
    """ComfyUI's names of the rules that its view knows for positions of reference pictures, whose tokens follow the
    picture's; without any it takes none."""
    aesthetic_scores: Mapping[str, float] = field(default_factory=dict)
    """How beautiful a picture is to be, by the side of a prompt that does not say it; of models that are told."""
    takes_next_time: bool = False
    """Whether the model is given the time of the noise level to which the sampler will step."""
    lora_names: tuple[LoraName, ...] = ()
    """What trainers call its modules."""
    teacache: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """The published coefficients of TeaCache, highest power first, by the number of blocks of the model."""
    can: Capabilities = field(default_factory=Capabilities)
    """The parallel methods that its view serves."""
    published: Mapping[str, Config] = field(default_factory=dict)
    """Configs of published models, by their names."""

    @property
    def latent(self) -> LatentSpec:
        """The only latent, or the first."""
        return self.latents[0]

    def count_blocks(self, config: Config) -> int:
        """The number of blocks of a model with `config`."""
        return sum(config[each.count] if isinstance(each.count, str) else each.count(config) for each in self.blocks)

    def count_heads(self, config: Config) -> int | None:
        """The attention's query heads, where such a config says how many there are."""
        return next((config.get(group.count) for group in self.heads.values()), None)

    def count_rows(self, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """Into how many patches latents of these `shapes` `[B, C, ..., H, W]`, by name, can be cut: each along its
        frames or its rows, whichever are more. None where they are not of this family."""
        if any(len(shapes.get(spec.name, ())) != 2 + spec.dims for spec in self.latents):
            return None
        cells = [(shapes[spec.name][2:], spec.patch[-spec.dims :]) for spec in self.latents]
        return min(max(-(-extent // size) for extent, size in list(zip(*each, strict=True))[:-1]) for each in cells)


def count_blocks(shapes: Shapes, stem: str) -> int:
    """Number of blocks `stem.0`, `stem.1`, …; raises UserError if one is missing in between."""
    numbers = {int(match.group(1)) for key in shapes if (match := re.match(rf"{re.escape(stem)}\.(\d{{1,9}})\.", key))}
    if numbers and max(numbers) + 1 != len(numbers):
        first = next(number for number in range(len(numbers)) if number not in numbers)
        raise UserError(
            f"Block {stem}.{first} is missing; there are {len(numbers)} blocks up to number {max(numbers)}."
        )
    return len(numbers)


def joined(module: str, name: str) -> str:
    """The name of a parameter of `module`, which may be the model itself."""
    return ".".join(part for part in (module, name) if part)
