"""Loading a VAE, without a hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..errors import UserError
from .header import Shape, VaeHeader, read_header
from .kinds import KINDS, Kind


@dataclass(frozen=True)
class LoadedVAE:
    """A VAE on this rank's device, in evaluation mode."""

    module: Any
    """Of one of the classes in `KINDS`."""
    source: str

    @property
    def kind(self) -> Kind:
        return KINDS[type(self.module).__name__]

    @property
    def latent_channels(self) -> int:
        return self.kind.latent_channels(self.module.config)

    @property
    def image_channels(self) -> int:
        return self.kind.image_channels(self.module.config)

    @property
    def scale(self) -> int:
        """Pixels per latent row or column."""
        return self.kind.scale(self.module.config)

    @property
    def frames(self) -> int | None:
        """Frames per latent frame, None for pictures."""
        return self.kind.frames and self.kind.frames(self.module.config)

    @property
    def reach(self) -> int:
        """The most rows that a convolution takes of what is above or below its own."""
        convolutions = (part for part in self.module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
        return max(part.kernel_size[-2] // 2 for part in convolutions)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.device

    def decode(self, latent: Tensor) -> Tensor:
        """`[B, C, (T,) h, w]`, as the graph has it, to `[B, 3, (T',) H, W]`: -1 to 1."""
        latent = latent.to(self.device, self.dtype)
        if self.kind.normalised:
            mean, deviation = self._statistics()
            latent = latent * deviation + mean
        return self.module.decode(latent).sample

    def encode(self, image: Tensor) -> Tensor:
        """`[B, 3, (T',) H, W]`, -1 to 1, to the mode of the posterior, `[B, C, (T,) h, w]`, as the graph has it."""
        encoded = self.module.encode(image.to(self.device, self.dtype))
        latent = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent
        if self.kind.normalised:
            mean, deviation = self._statistics()
            latent = (latent - mean) / deviation
        return latent

    def _statistics(self) -> tuple[Tensor, Tensor]:
        return tuple(each.view(1, -1, 1, 1, 1) for each in (self.module.latents_mean, self.module.latents_std))


def load_vae(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> LoadedVAE:
    """Load the VAE that `read_header` finds at `path`. Raises UserError for anything that is not a whole VAE."""
    header = read_header(path)
    module = _module(header)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check(expected, header.shapes, header.source)
    module.load_state_dict(
        {
            # The original layout stores the attention's linear layers as 1x1 convolutions.
            name: header.tensor(name).reshape(shape).to(device=device, dtype=dtype)
            for name, shape in expected.items()
        },
        assign=True,
    )
    return LoadedVAE(module.eval().requires_grad_(False), header.source)


def _module(header: VaeHeader) -> ModelMixin:
    """The VAE that its header describes, on the meta device."""
    if header.config.get("timestep_conditioning"):
        raise UserError(
            f"{header.source} is a VAE whose decoder adds noise by a timestep; the ranks do not run those.",
            "Use ComfyUI's own VAE nodes for it.",
        )
    try:
        with torch.device("meta"):
            return getattr(diffusers, header.name).from_config(dict(header.config))
    except (TypeError, ValueError) as error:
        raise UserError(f"The config.json of {header.source} describes no VAE: {error}.") from error


def _check(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str) -> None:
    if missing := expected.keys() - found.keys():
        raise UserError(f"{source} lacks {len(missing)} of the VAE's {len(expected)} tensors: {_some(missing)}.")
    if foreign := found.keys() - expected.keys():
        raise UserError(f"{source} holds {len(foreign)} tensors that its class has not: {_some(foreign)}.")
    for name, shape in expected.items():
        if found[name] not in (shape, (*shape, 1, 1)):
            raise UserError(f"{source}: {name} has the shape {list(found[name])}, expected was {list(shape)}.")


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
