"""ControlNets (arXiv 2302.05543) for transformers: extra blocks, whose outputs are added to the model's tokens.

A ControlNet is seen as its family is: blocks over the same tokens, so that the ranks which share the model's tokens
share its too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...caches.policy import COMPUTE_ALL
from ...errors import UserError
from ...families.blocks import Block, run_blocks
from ...families.condition import Condition
from ...families.family import TokenFamily
from ...families.flux import Flux
from ...families.hunyuandit import HunyuanDiT, as_block
from ...families.sd3 import SD3
from ...families.state import Evaluation, State
from ...files.controlnet import ControlNetInfo
from ...tokens.grid import Grid
from ...tokens.plan import Segment
from .load import load_controlnet


@dataclass(frozen=True)
class ControlledEvaluation:
    """The inputs of a ControlNet's evaluation. `picture`: the tokens of the control picture's part, `[B, S, c]`;
    `mode`: the kind of picture, for a union ControlNet."""

    evaluation: Evaluation
    picture: Tensor
    mode: int | None

    @property
    def own_picture(self) -> Tensor:
        """This rank's tokens of the control picture."""
        return self.picture[:, self.evaluation.shard["image"]]


class ControlNet(ABC):
    """A loaded ControlNet. `extra_text`: text tokens that its blocks have before those of the prompt."""

    extra_text = 0
    latent_shift = True
    """Whether the control picture's latent is shifted as the model's own are."""
    model: TokenFamily
    """The model of the current run."""
    view_class: type[TokenFamily]

    def __init__(self, info: ControlNetInfo, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.info = info
        self.module: Any = module
        self.view = self.view_class(module, dtype, device)
        self.bytes = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))

    def work_with(self, family: TokenFamily, mode: int | None) -> None:
        """Serves this model from now on. Raises `UserError` for one that it was not made for, or an unknown `mode`."""
        self.model = family
        name, width, modes = self.info.checkpoint.source.name, self.module.inner_dim, self.info.modes
        if (self.info.family, width) != (family.name, family.hidden_size):
            raise UserError(
                f"{name} is a ControlNet for {self.info.family} models of width {width}; this {family.name} model has "
                f"the width {family.hidden_size}.",
                "Choose a ControlNet that was trained for the model.",
            )
        if modes and (mode is None or mode >= modes):
            raise UserError(
                f"{name} is a union ControlNet of {modes} kinds of pictures; the mode is "
                f"{'not set' if mode is None else mode}.",
                f"Set a mode from 0 to {modes - 1}.",
            )
        if mode is not None and not modes:
            raise UserError(f"{name} is no union ControlNet; the mode is {mode}.", "Set the mode to none (-1).")

    def see(self, picture: Tensor) -> Tensor:
        """What `embed` is given tokens of, `[B, C, H, W]`: the control picture's latent, in the model's space."""
        latent = self.model.latent if self.latent_shift else replace(self.model.latent, shift=0.0)
        return latent.process_in(picture.float()).to(self.model.device)

    @abstractmethod
    def embed(self, given: ControlledEvaluation) -> State:
        """Has the contract of `TokenFamily.embed`."""

    def segments(self, condition: Condition, grids: Mapping[str, Grid]) -> dict[str, list[Segment]]:
        """The segments of its own streams: the prompt's text after its own, and the grid without references."""
        segments = self.view.segments(replace(condition, references=()), grids)
        if "text" in segments:
            segments["text"] = [Segment(each.count + self.extra_text) for each in segments["text"]]
        return segments

    def outputs(self) -> Sequence[nn.Module]:
        """What makes a residual of each block's image tokens."""
        return self.module.controlnet_blocks

    @abstractmethod
    def targets(self, family: TokenFamily) -> dict[int, int]:
        """Maps each block of the model that a residual is added behind to the number of that residual."""

    def residuals(self, state: State) -> list[Tensor]:
        """Every block's residual of the image tokens, `[B, Si, h]`."""
        outputs, made = self.outputs(), []

        def on_block(number: int, state: State) -> None:
            made.append(outputs[number](state["image"]))

        run_blocks(self.view, state, self.view.blocks, policy=COMPUTE_ALL, on_block=on_block)
        return made


class FluxControlNet(ControlNet):
    """ControlNet of Flux.1. A union ControlNet takes the kind of its picture as a token before the text.

    Those that take pixels (XLabs') make of them what is in a latent's place.
    """

    view_class = Flux

    def __init__(self, info: ControlNetInfo, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(info, module, dtype, device)
        self.extra_text = int(info.modes > 0)

    def see(self, picture: Tensor) -> Tensor:
        hint: nn.Module | None = self.module.input_hint_block
        if hint is None:
            return super().see(picture)
        if self.module.x_embedder.weight.is_meta:
            return picture  # another stage evaluates it
        return hint((2 * picture - 1).to(self.model.device, self.model.dtype))

    def embed(self, given: ControlledEvaluation) -> State:
        model, dtype, evaluation = self.module, self.view.dtype, given.evaluation
        shard, condition = evaluation.shard, evaluation.condition
        image = model.x_embedder(evaluation.tokens["image"][:, shard["image"]].to(dtype))
        image = image + model.controlnet_x_embedder(given.own_picture.to(dtype))
        text = model.context_embedder(condition["tokens"].to(dtype)).expand(evaluation.batch, -1, -1)
        if self.extra_text:
            assert given.mode is not None
            kind = model.controlnet_mode_embedder(torch.tensor([[given.mode]], device=text.device))
            text = torch.cat((kind.expand(evaluation.batch, -1, -1), text), dim=1)
            # Positions are counted from the prompt's tokens.
            tensors = {**condition.tensors, "tokens": F.pad(condition["tokens"], (0, 0, 1, 0))}
            condition = replace(condition, tensors=tensors)
        evaluation = replace(evaluation, condition=replace(condition, references=()))
        return self.view.resume(evaluation, {"text": text[:, shard["text"]], "image": image})

    def outputs(self) -> Sequence[nn.Module]:
        return [*self.module.controlnet_blocks, *self.module.controlnet_single_blocks]

    def targets(self, family: TokenFamily) -> dict[int, int]:
        own_double, own_single = len(self.module.controlnet_blocks), len(self.module.controlnet_single_blocks)
        model: Any = family.transformer
        double, single = len(model.transformer_blocks), len(model.single_transformer_blocks)
        # XLabs' take turns; the others' residuals are each for a run of blocks.
        in_turn = self.info.takes_pixels
        targets = {block: block % own_double for block in range(double)} if in_turn else _spread(own_double, double)
        return targets | {double + block: own_double + own for block, own in _spread(own_single, single).items()}


class SD3ControlNet(ControlNet):
    """ControlNet of Stable Diffusion 3 and 3.5. Some were trained without pooled text, and with unshifted latents."""

    view_class = SD3

    def __init__(self, info: ControlNetInfo, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(info, module, dtype, device)
        self.latent_shift = not info.config["force_zeros_for_pooled_projection"]

    def embed(self, given: ControlledEvaluation) -> State:
        evaluation = given.evaluation
        if not self.latent_shift:
            condition = evaluation.condition
            tensors = {**condition.tensors, "pooled": torch.zeros_like(condition["pooled"])}
            evaluation = replace(evaluation, condition=replace(condition, tensors=tensors))
        state = self.view.embed(evaluation)
        control = self.view.embed_patches(self.module.pos_embed_input.proj, given.own_picture)
        return state.with_streams(image=state["image"] + control)

    def targets(self, family: TokenFamily) -> dict[int, int]:
        # The last block, which gives no text, gets none.
        count, own = len(family.blocks), len(self.module.controlnet_blocks)
        return {block: int(block / (count / own)) for block in range(count - 1)}


class SD3ImageBlocks(SD3):
    """Blocks over the image alone."""

    def adopt_network(self) -> None:
        super().adopt_network()
        self.blocks = [_as_image_block(layer) for layer in self.transformer.transformer_blocks]

    def segments(self, condition: Condition, grids: Mapping[str, Grid]) -> dict[str, list[Segment]]:
        return {"image": [Segment.of(grids["image"], "image")]}

    def attentions(self) -> list[tuple[int, str, Any]]:
        return [(block, "attn", layer.attn) for block, layer in enumerate(self.transformer.transformer_blocks)]


class SD3ImageControlNet(ControlNet):
    """Stability's for 3.5 Large: it sees no text tokens, and begins with the image tokens as the model embeds them."""

    view_class = SD3ImageBlocks

    def embed(self, given: ControlledEvaluation) -> State:
        assert isinstance(self.model, SD3)
        control = self.view.embed_patches(self.module.pos_embed_input.proj, given.own_picture)
        image = self.model.embed_image(given.evaluation) + control
        return self.view.resume(given.evaluation, {"image": image})

    def targets(self, family: TokenFamily) -> dict[int, int]:
        # As in Stability's own code and in ComfyUI, behind the last block too; diffusers leaves that out.
        return _spread(len(self.module.controlnet_blocks), len(family.blocks))


class HunyuanBlocks(HunyuanDiT):
    """The blocks of a HunyuanDiT ControlNet, which are the first half of a model's, without skips."""

    def adopt_network(self) -> None:
        super().adopt_network()
        self.skips = {}
        self.blocks = [as_block(layer, text) for layer, text in zip(self.layers, self.texts, strict=True)]


class HunyuanControlNet(ControlNet):
    """ControlNet of HunyuanDiT: its residuals are added to the skips."""

    view_class = HunyuanBlocks

    def embed(self, given: ControlledEvaluation) -> State:
        state = self.view.embed(given.evaluation)
        control = self.view.embed_patches(self.module.pos_embed.proj, given.own_picture)
        return state.with_streams(image=state["image"] + self.module.input_block(control))

    def targets(self, family: TokenFamily) -> dict[int, int]:
        return {source: source for source in family.skips}


CONTROLNETS: dict[str, type[ControlNet]] = {
    "flux": FluxControlNet,
    "sd3": SD3ControlNet,
    "sd3 image": SD3ImageControlNet,
    "hunyuandit": HunyuanControlNet,
}
"""ControlNets by their kind."""


def open_controlnet(
    path: Path, device: torch.device, dtype: torch.dtype, check_cancelled: Callable[[], None] = lambda: None
) -> ControlNet:
    """The ControlNet in a file. Raises `UserError` when there is none that is known."""
    info, module = load_controlnet(path, device, dtype, check_cancelled)
    return CONTROLNETS[info.kind](info, module, dtype, device)


def _spread(own: int, count: int) -> dict[int, int]:
    """Maps each of `count` blocks to the one of `own` residuals that is added behind it."""
    interval = math.ceil(count / own) if own else 0
    return {block: block // interval for block in range(count)} if own else {}


def _as_image_block(layer: nn.Module) -> Block:
    def run(state: State) -> State:
        return state.with_streams(image=layer(hidden_states=state["image"], temb=state.modulation))

    return run
