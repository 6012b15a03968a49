"""Loading a VAE, without a hub."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..errors import UserError
from .files.header import Shape, VaeHeader, read_header
from .kinds import KINDS, SIDES, Direction, Kind

TIMESTEP, NOISE_SHARE = 0.05, 0.025
"""At which decoders with a timestep work, and the share of noise in what they are given: as in ComfyUI."""
NOISE_SEED = 0
"""ComfyUI draws that noise anew each time; here the same latent gives the same picture, on any number of ranks."""


@dataclass(frozen=True)
class LoadedVAE:
    """A VAE on this rank's device, in evaluation mode."""

    module: Any
    """An instance of one of the classes in `KINDS`. A side that the file lacks is None."""
    source: str

    @property
    def kind(self) -> Kind:
        return KINDS[type(self.module).__name__]

    @property
    def architecture(self) -> str:
        """The class, and its form where it has two: Wan 2.2 is the residual one."""
        return type(self.module).__name__ + (" (residual)" if self.module.config.get("is_residual") else "")

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

    def width(self, direction: Direction) -> float:
        """Channels per pixel in the level of most pixels."""
        encoder, decoder = self.kind.widths(self.module.config)
        return decoder if direction == "decode" else encoder

    @property
    def sides(self) -> tuple[Direction, ...]:
        """The directions whose side it has."""
        return tuple(way for way, side in SIDES.items() if getattr(self.module, side) is not None)

    def on_meta(self) -> LoadedVAE:
        """The same VAE with shapes in place of weights, on the meta device."""
        with torch.device("meta"):
            module = type(self.module).from_config(self.module.config).to(self.dtype)
        return LoadedVAE(_with_sides(module, self.sides).eval().requires_grad_(False), self.source)

    @property
    def reach(self) -> int:
        """The most rows that a convolution takes of what is above or below its own."""
        convolutions = (part for part in self.module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
        return max(part.kernel_size[-2] // 2 for part in convolutions)

    @property
    def takes_timestep(self) -> bool:
        """Whether the decoder is the last step of a denoising, as in LTX-Video from 0.9.1 on."""
        return bool(self.module.config.get("timestep_conditioning"))

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.device

    def noised(self, latent: Tensor) -> Tensor:
        """The decoder's input for `latent` `[B, C, (T,) h, w]`: with some noise for a decoder that removes it."""
        if not self.takes_timestep:
            return latent
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
        return latent.lerp(noise.to(latent), NOISE_SHARE)

    def decode(self, latent: Tensor) -> Tensor:
        """`[B, C, (T,) h, w]`, as the graph has it and `noised`, to `[B, 3, (T',) H, W]`: -1 to 1."""
        latent = latent.to(self.device, self.dtype)
        if self.kind.normalised:
            mean, deviation = self._statistics()
            latent = latent * deviation + mean
        if not self.takes_timestep:
            return self.module.decode(latent).sample
        timestep = latent.new_full((len(latent),), TIMESTEP)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(NOISE_SEED)  # of the noise that some decoders add to their features
            return self.module.decode(latent, timestep).sample

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


def load_vae(
    path: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    check_cancelled: Callable[[], None] = lambda: None,
) -> LoadedVAE:
    """Load the VAE that `read_header` finds at `path`. Raises UserError for anything that is not a whole VAE.

    A file that holds the decoder or the encoder alone gives a VAE without the other. `check_cancelled` is called before
    each tensor is read.
    """
    header = read_header(path)
    module = _with_sides(_module(header), header.sides)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check(expected, header.shapes, header.source)
    tensors = {}
    for name, shape in expected.items():
        check_cancelled()
        # The original layouts store the attention's linear layers as convolutions of size 1.
        tensors[name] = header.tensor(name).reshape(shape).to(device=device, dtype=dtype)
    module.load_state_dict(tensors, assign=True)
    return LoadedVAE(module.eval().requires_grad_(False), header.source)


def _module(header: VaeHeader) -> ModelMixin:
    """The VAE that its header describes, on the meta device."""
    try:
        with torch.device("meta"):
            return getattr(diffusers, header.name).from_config(dict(header.config))
    except (TypeError, ValueError) as error:
        raise UserError(f"The config.json of {header.source} describes no VAE: {error}.") from error


def _with_sides(module: ModelMixin, held: Collection[Direction]) -> ModelMixin:
    """`module` without the sides that are not `held`."""
    for direction in SIDES.keys() - held:
        setattr(module, SIDES[direction], None)
    return module


def _check(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str) -> None:
    if missing := expected.keys() - found.keys():
        raise UserError(f"{source} lacks {len(missing)} of the VAE's {len(expected)} tensors: {_some(missing)}.")
    if foreign := found.keys() - expected.keys():
        raise UserError(f"{source} holds {len(foreign)} tensors that its class has not: {_some(foreign)}.")
    for name, shape in expected.items():
        if found[name][: len(shape)] != shape or any(each != 1 for each in found[name][len(shape) :]):
            raise UserError(f"{source}: {name} has the shape {list(found[name])}, expected was {list(shape)}.")


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
