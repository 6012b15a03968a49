"""The base of all views of a model, and the block view of a diffusion transformer, which most methods work on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.site import Attention
from ..errors import UserError
from ..layout.stages import block_parameters
from ..sampling.model_sampling import ModelSampling
from ..tokens.grid import Grid, Packing, tokenise, untokenise
from ..tokens.plan import Places, Segment
from .blocks import Block
from .condition import Condition
from .heads import OwnHeads
from .spec import FamilySpec, LatentSpec
from .state import Evaluation, State


class Sites:
    """Gives the sites of a view, which are installed once, the attention of the current evaluation."""

    attention: Attention


class Family(ABC):
    """The base of every view of a model: its latents, its conditions, its noise levels.

    `spec`: the data of the family. `max_side`: the most rows or columns of image tokens that the model has positions
    for.
    """

    spec: FamilySpec
    max_side: int | None = None

    def __init__(self, dtype: torch.dtype, device: torch.device, latents: tuple[LatentSpec, ...] | None) -> None:
        """`dtype`: what the network computes in (its weights may be stored in another).

        `latents`: what it samples, where the model's own VAE scales them as the family's does not.
        """
        self.latents = latents or self.spec.latents
        self.dtype = dtype
        self.device = device
        self.blocks: Sequence[Block] = ()
        self.block_parameters: Sequence[int] = ()
        """How many parameters each block has, in the whole model where this rank has a part of one."""
        self.prompt_sites: Sequence[int] = ()
        """The block of each attention site that can be given a picture, in the sites' order."""
        self._preludes: WeakKeyDictionary[Condition, Any] = WeakKeyDictionary()

    @abstractmethod
    def check_condition(self, condition: Condition) -> None:
        """Raise `UserError` when the conditioning is not of this model's kind."""

    @abstractmethod
    def model_sampling(self, shift: float | None) -> ModelSampling:
        """Sigmas and prediction type; `shift` replaces the family's own flow shift."""

    def make_prelude(self, condition: Condition) -> Any:
        """What the model makes of a condition whatever the time and the latent: computed once, see `prelude`."""
        return None

    def prelude(self, condition: Condition) -> Any:
        """Returns `make_prelude(condition)`, kept as long as the condition, or until `forget_preludes`."""
        if condition not in self._preludes:
            self._preludes[condition] = self.make_prelude(condition)
        return self._preludes[condition]

    def forget_preludes(self) -> None:
        """Forget what was made of conditions: the layers that made it have changed."""
        self._preludes.clear()

    @property
    def name(self) -> str:
        """The family's name."""
        return self.spec.name

    @property
    def latent(self) -> LatentSpec:
        """The only latent, or the first."""
        return self.latents[0]

    @property
    def input_channels(self) -> int:
        """Channels of what the model takes: the noisy latent's, and of what an inpainting model is given with it."""
        return self.latent.channels

    def refuse_shift(self, shift: float | None) -> None:
        """Raise `UserError` when the graph sets the flow shift of a model that is no flow."""
        if shift is not None:
            raise UserError(
                f"A {self.name} model has no flow shift, and the graph sets it to {shift:g}.",
                "Remove the ModelSampling node before Parallel Sampler.",
            )

    def process_in(self, latent: Tensor, spec: LatentSpec | None = None) -> Tensor:
        """Converts the VAE's latent to the latent that the transformer was trained on."""
        return (spec or self.latent).process_in(latent)

    def process_out(self, latent: Tensor, spec: LatentSpec | None = None) -> Tensor:
        """The inverse of `process_in`."""
        return (spec or self.latent).process_out(latent)

    def packing(self, latents: Mapping[str, Tensor]) -> Packing:
        """The packing of a run's latents, given by name."""
        return Packing({name: tuple(latent.shape[1:]) for name, latent in latents.items()})

    def grids(self, latents: Mapping[str, Tensor]) -> dict[str, Grid]:
        return {spec.name: Grid.of(latents[spec.name].shape[2:], spec.patch) for spec in self.latents}


class TokenFamily(Family):
    """A transformer as `embed -> blocks -> head`. It takes tokens and attention, and does not depend on ranks.

    `streams`: those of its tokens that go through the blocks, in the order in which they travel from one pipeline stage
    to the next. `controlled`: the stream of the grid, to which controls add residuals.
    """

    hidden_size: int
    streams: tuple[str, ...] = ("text", "image")
    controlled: str = "image"

    def __init__(
        self,
        transformer: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        latents: tuple[LatentSpec, ...] | None = None,
    ) -> None:
        """Takes `Family`'s arguments."""
        super().__init__(dtype, device, latents)
        self.transformer: Any = transformer
        self.sites = Sites()
        self.skips: Mapping[int, int] = {}
        """Maps each block that leaves a skip in the state to the later one that takes it."""
        self.hold_first_block: Callable[[], None] = lambda: None
        """Has the first block's weights at hand, for what uses them outside of the block."""
        shapes = {name: parameter.shape for name, parameter in transformer.named_parameters()}
        self.block_parameters = list(block_parameters(shapes, self.spec.blocks).values())
        self.adopt_network()

    @abstractmethod
    def adopt_network(self) -> None:
        """Sets what the network's config says (`hidden_size` ...), installs the attention sites, wraps the blocks."""

    @abstractmethod
    def segments(self, condition: Condition, grids: Mapping[str, Grid]) -> dict[str, list[Segment]]:
        """The segments of an evaluation's streams, by name, for latents of these grids."""

    @abstractmethod
    def embed(self, evaluation: Evaluation) -> State:
        """Embeds the tokens of the whole latents; returns the state of those in the shard."""

    @abstractmethod
    def resume(self, evaluation: Evaluation, streams: dict[str, Tensor]) -> State:
        """The state of the tokens in the shard, `[B, S, width]` each, embedded or out of a block already."""

    @abstractmethod
    def head(self, state: State, predicted: Mapping[str, Places]) -> dict[str, Tensor]:
        """The prediction of each latent, `[B, S, C * pt * ph * pw]`.

        `predicted`: by the latent's name, where in their stream the state's tokens are at which it is predicted.
        """

    def modulated_input(self, state: State) -> Tensor:
        """What the time makes of `state` before the first block does anything else with it, `[B, ...]` (TeaCache)."""
        raise UserError(
            f"TeaCache looks at the modulated input of the first block, and of {self.spec.title} it is not known.",
            "Use kind=first block in Parallel Cache.",
        )

    @cached_property
    def heads(self) -> OwnHeads:
        """Which attention heads this rank has. All, unless a tensor-parallel part of a model says otherwise."""
        return OwnHeads(self.spec.heads, self.transformer.config)

    def own_heads(self, group: str = "heads") -> range:
        """The heads of `group` that this rank has: the ones to take of a table with angles of each (`Rotary.heads`).

        Which of its key and value heads serve its query heads says `heads.serves(group)`, for `Attention.send`.
        """
        return self.heads.own(group)

    def add_residual(self, state: State, block: int, residual: Tensor) -> State:
        """The state after `block` with a control's residual of the tokens of the grid."""
        return state.with_streams(**{self.controlled: state[self.controlled] + residual})

    def embed_patches(self, projection: nn.Conv2d | nn.Conv3d, tokens: Tensor) -> Tensor:
        """Latent tokens `[B, S, C * pt * ph * pw]` -> `[B, S, h]`, by a convolution whose stride is its size.

        That is a matrix over the values of a token.
        """
        return F.linear(tokens.to(self.dtype), projection.weight.flatten(1), projection.bias)

    def latent_tokens(self, output: Tensor) -> Tensor:
        """A last layer's `[B, S, pt * ph * pw * channels]` -> `[B, S, C * pt * ph * pw]`.

        Channels beyond the latent's are those of a learned variance, which no sampler here uses.
        """
        by_place = output.unflatten(-1, (prod(self.latent.patch), -1))
        return by_place[..., : self.latent.channels].transpose(-1, -2).flatten(2)

    @property
    def widths(self) -> dict[str, int]:
        """The width of each stream's tokens."""
        return dict.fromkeys(self.streams, self.hidden_size)

    @property
    def carry_dtype(self) -> torch.dtype:
        """The dtype of the tokens between two blocks."""
        return self.dtype

    def tokenise(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cuts each latent into tokens `[B, S, C * pt * ph * pw]`."""
        return {
            spec.name: tokenise(latents[spec.name], spec.patch, channels_last=spec.channels_last)
            for spec in self.latents
        }

    def untokenise(self, tokens: Mapping[str, Tensor], latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `tokenise`, of the extents that these `latents` have."""
        return {
            spec.name: untokenise(
                tokens[spec.name], latents[spec.name].shape[2:], spec.patch, channels_last=spec.channels_last
            )
            for spec in self.latents
        }


def with_tokens(family: Family, what: str) -> TokenFamily:
    """`family`, for `what` works on the tokens of its blocks. Raises `UserError` for one without blocks."""
    if isinstance(family, TokenFamily):
        return family
    raise UserError(f"{what} works on the tokens of a model's blocks; a {family.name} model has none.", "Remove it.")
