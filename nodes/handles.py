"""What the outputs of our loaders carry: all that is needed to load again in a new sidecar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..parallel_backend.errors import UserError
from ..parallel_backend.families.registry import FAMILIES
from ..parallel_backend.families.spec import FamilySpec, LatentSpec
from ..parallel_backend.files.latents import latents_of
from ..parallel_backend.layout.rules import RunFacts
from ..parallel_backend.protocol.messages import ImagePromptUse, LoraRef, ModelRef, StepCache, WeightChange
from .layout_choice import LayoutChoice

if TYPE_CHECKING:
    from torch import Tensor

POSITIVE, NEGATIVE = 0, 1
"""The sides of a prompt, as ComfyUI numbers them."""


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """A picture that prompts a MODEL; `embeddings` `[B, …]`: for the positive prompt and for the negative one."""

    message: ImagePromptUse
    embeddings: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SentChange:
    """A change as a request names it, and its tensors by role."""

    message: WeightChange
    tensors: Mapping[str, Tensor]


ATTACHMENT = "paralleldit"
"""Under this name a MODEL of ComfyUI carries our handle."""
OWN_LOADER = "load the model with ComfyUI's own loader."
"""The alternative that hints offer for what the ranks cannot do."""


@dataclass(frozen=True)
class ModelHandle:
    """A model in the ranks. `family` and `config` (as diffusers names them) are derived from the checkpoint's header.

    `loras`: the LoRA files that the ranks apply. `pictures`: the image prompts. `cache`: what skips blocks.
    """

    ref: ModelRef
    layout: LayoutChoice | None
    family: str
    config: dict[str, Any]
    loras: tuple[LoraRef, ...] = ()
    pictures: tuple[EncodedPicture, ...] = ()
    cache: StepCache | None = None

    @property
    def spec(self) -> FamilySpec:
        return FAMILIES[self.family]

    @property
    def latents(self) -> tuple[LatentSpec, ...]:
        """What it samples, scaled as the VAE in its folder says, if there is one."""
        return latents_of(self.spec, self.config, Path(self.ref.path))

    def facts(self, ranks: int) -> RunFacts:
        """What a layout for `ranks` must know of the model, whatever the run."""
        spec, config = self.spec, self.config
        return RunFacts(
            ranks=ranks,
            blocks=spec.count_blocks(config),
            heads=spec.count_heads(config),
            can=spec.can,
            cache=self.cache.rule if self.cache else None,
        )


def handle_of(model: Any) -> ModelHandle:
    """The handle in a MODEL. Raises `UserError` for a model that did not come from our loader."""
    if isinstance(model, ModelHandle):
        return model
    attachments = getattr(model, "attachments", {})
    if ATTACHMENT not in attachments:
        raise UserError(
            "This model was not loaded by Parallel Loader, so it is in ComfyUI's memory and not in the ranks.",
            "Connect the MODEL of a Parallel Loader to Parallel Sampler.",
        )
    return attachments[ATTACHMENT]
