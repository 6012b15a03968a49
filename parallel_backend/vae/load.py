"""Loading an AutoencoderKL from a diffusers folder or a single safetensors file, without a hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from ..errors import UserError
from ..weights.checkpoint import open_checkpoint
from .keys import Shape, config_from_shapes, diffusers_names
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
        return self.module.config[self.kind.latent_channels]

    @property
    def image_channels(self) -> int:
        return self.module.config["out_channels"]

    @property
    def scale(self) -> int:
        """Pixels per latent row or column."""
        return self.kind.scale(self.module.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.device


def load_vae(path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> LoadedVAE:
    """Load the AutoencoderKL at `path`: a pipeline's folder, a VAE's folder, or a safetensors file.

    A file may be of the original layout or of diffusers', on its own or inside a whole checkpoint; its configuration is
    read off its header. Raises UserError for anything that is not a whole AutoencoderKL.
    """
    path = Path(path)
    if path.is_dir() and not any((folder / "config.json").is_file() for folder in (path / "vae", path)):
        raise UserError(
            f"{path} holds no VAE: there is neither vae/config.json nor config.json.",
            "Choose a diffusers folder (of a pipeline or of a VAE) or a safetensors file.",
        )
    checkpoint = open_checkpoint(path, "vae")
    names = diffusers_names(checkpoint.tensors, str(path))
    shapes = {name: checkpoint.tensors[key].shape for name, key in names.items()}
    module = _module(checkpoint.config or config_from_shapes(shapes, str(path)), str(path))
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check(expected, shapes, str(path))
    module.load_state_dict(
        {
            # The original layout stores the attention's linear layers as 1x1 convolutions.
            name: checkpoint.tensor(names[name]).reshape(shape).to(device=device, dtype=dtype)
            for name, shape in expected.items()
        },
        assign=True,
    )
    return LoadedVAE(module.eval().requires_grad_(False), str(path))


def _module(config: Mapping[str, Any], source: str) -> AutoencoderKL:
    """The VAE that `config` describes, on the meta device."""
    kind = config.get("_class_name", AutoencoderKL.__name__)
    if kind != AutoencoderKL.__name__:
        raise UserError(f"{source} is a VAE of the kind {kind}, expected was {AutoencoderKL.__name__}.")
    try:
        with torch.device("meta"):
            module = AutoencoderKL.from_config(dict(config))
    except (TypeError, ValueError) as error:
        raise UserError(f"The config.json of {source} describes no VAE: {error}.") from error
    assert isinstance(module, AutoencoderKL)
    return module


def _check(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str) -> None:
    if missing := expected.keys() - found.keys():
        raise UserError(f"{source} lacks {len(missing)} of the VAE's {len(expected)} tensors: {_some(missing)}.")
    if foreign := found.keys() - expected.keys():
        raise UserError(f"{source} holds {len(foreign)} tensors that an AutoencoderKL has not: {_some(foreign)}.")
    for name, shape in expected.items():
        if found[name] not in (shape, (*shape, 1, 1)):
            raise UserError(f"{source}: {name} has the shape {list(found[name])}, expected was {list(shape)}.")


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
