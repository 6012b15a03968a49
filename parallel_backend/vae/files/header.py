"""The facts of a VAE that its files' headers give, before it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import UserError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.recognise import refuse_others
from ..kinds import KINDS, SIDES, Direction, Kind
from .autoencoder_kl import Shape, config_from_shapes, diffusers_names, holds_image_vae
from .layouts import FileLayout
from .layouts import find as find_layout

IMAGE = "AutoencoderKL"
"""The class of a file, and of a config that names none."""


@dataclass(frozen=True)
class VaeHeader:
    """`name` of the class in diffusers, its `config`, and {name of a tensor in the class: its key in the files}.

    Where several names have one key, its tensor holds theirs, one after the other, in as many rows each.
    """

    source: str
    name: str
    config: Mapping[str, Any]
    names: Mapping[str, str]
    checkpoint: Checkpoint

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def scale(self) -> int:
        """Pixels per latent row or column."""
        return self.kind.scale(self.config)

    @property
    def frames(self) -> int | None:
        """Frames per latent frame, None for pictures."""
        return self.kind.frames and self.kind.frames(self.config)

    @property
    def sides(self) -> tuple[Direction, ...]:
        """The directions whose side of the VAE is in the files."""
        return tuple(way for way, side in SIDES.items() if any(name.startswith(f"{side}.") for name in self.names))

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: self._shape(key, len(self._sharing[key])) for name, key in self.names.items()}

    def _shape(self, key: str, parts: int) -> Shape:
        whole = self.checkpoint.tensors[key].shape
        return whole if parts == 1 else (whole[0] // parts, *whole[1:])

    def tensor(self, name: str) -> Tensor:
        key = self.names[name]
        whole, sharing = self.checkpoint.tensor(key), self._sharing[key]
        return whole if len(sharing) == 1 else whole.chunk(len(sharing))[sharing.index(name)]

    @cached_property
    def _sharing(self) -> dict[str, list[str]]:
        """The names that share each key."""
        names: dict[str, list[str]] = {}
        for name, key in self.names.items():
            names.setdefault(key, []).append(name)
        return names


def read_header(path: str | Path) -> VaeHeader:
    """The VAE at `path`: a pipeline's folder, a VAE's folder, or a safetensors file.

    A folder may be of any class in `KINDS`. A file is an AutoencoderKL or of a layout in `LAYOUTS`, on its own or
    inside a whole checkpoint; its configuration is read off its header. Raises UserError for anything else.
    """
    path = Path(path)
    source = str(path)
    if os.path.isdir(path) and not any((folder / "config.json").is_file() for folder in (path / "vae", path)):
        raise UserError(
            f"{path} holds no VAE: there is neither vae/config.json nor config.json.",
            "Choose a diffusers folder (of a pipeline or of a VAE) or a safetensors file.",
        )
    checkpoint = open_checkpoint(path, "vae")
    found = find_layout(checkpoint.tensors) if checkpoint.config is None else None
    if found:
        return _of_video(source, checkpoint, *found)
    name = (checkpoint.config or {}).get("_class_name", IMAGE)
    if name not in KINDS:
        raise UserError(f"{path} is a VAE of the kind {name}.", f"The ranks run {', '.join(KINDS)}.")
    if checkpoint.config is None and not holds_image_vae(checkpoint.tensors):
        refuse_others(checkpoint, "a VAE")
    names = diffusers_names(checkpoint.tensors, source) if name == IMAGE else {key: key for key in checkpoint.tensors}
    shapes = {each: checkpoint.tensors[key].shape for each, key in names.items()}
    config = checkpoint.config or config_from_shapes(shapes, source)
    return VaeHeader(source, name, {**KINDS[name].defaults, **config}, names, checkpoint)


def _of_video(source: str, checkpoint: Checkpoint, layout: FileLayout, prefix: str) -> VaeHeader:
    own = [key.removeprefix(prefix) for key in checkpoint.tensors if key.startswith(prefix)]
    names = {name: prefix + key for name, key in layout.names(own).items()}
    header = VaeHeader(source, layout.name, {}, names, checkpoint)
    try:
        return replace(header, config=layout.config(header.shapes))
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{source} looks like an {layout.name}, but its tensors do not make a whole one: {error}.",
            "Fetch the file anew, or give the VAE's diffusers folder.",
        ) from error
