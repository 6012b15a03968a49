"""LATENT as what a request carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UserError
from ...parallel_backend.families.spec import LatentSpec
from ...parallel_backend.protocol.messages import MAX_DRAWS

RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
"""Keys of an empty LATENT in ComfyUI since 2026: pixels and frames to a cell, if the node that made it assumed some."""


def to_message(
    latent_image: Mapping[str, Any], specs: Sequence[LatentSpec], family: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The latents of a LATENT by name, and the request's tensors of them: `latent` and, if there is one, `noise_mask`;
    of a model of several latents `latent.<name>` and `noise_mask.<name>`.

    As in ComfyUI, an empty latent gets the model's number of channels and, where it says what it is made for, its
    compression; a picture's latent `[B, C, H, W]` is one frame to a model of videos `[B, C, T, H, W]`. Raises
    `UserError` for a latent that cannot be sampled.
    """
    parts, masks = _parts(latent_image["samples"]), _parts(latent_image.get("noise_mask"))
    names = names_of(len(parts), specs, family)
    latents = {
        spec.name: _batched(_fitted(part, spec, family, latent_image if len(specs) == 1 else {}), latent_image)
        for spec, part in zip(specs, parts, strict=True)
    }
    tensors = {f"latent{name}": latent for name, latent in zip(names, latents.values(), strict=True)}
    # Masks may be fewer: what has none is sampled anew.
    for name, spec, mask in zip(names, specs, masks, strict=False):
        tensors[f"noise_mask{name}"] = _placed(mask, spec)
    return latents, tensors


def names_of(count: int, specs: Sequence[LatentSpec], family: str) -> list[str]:
    """What the names of a request's tensors end with, for each of `count` latents: nothing where there is one.

    Raises `UserError` where the model samples fewer or more.
    """
    if count != len(specs):
        raise UserError(
            f"The LATENT holds {_counted(count)}, but {family} samples {_counted(len(specs))}: "
            f"{', '.join(spec.name for spec in specs)}.",
            "Use the empty latent nodes of this model's kind, put together as its workflows do.",
        )
    return [""] if count == 1 else [f".{spec.name}" for spec in specs]


def from_reply(
    latent_image: Mapping[str, Any], specs: Sequence[LatentSpec], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The LATENT of a reply: that which was sent, with other samples, nested again where there are several."""
    if len(specs) == 1:
        samples = tensors["latent"]
    else:
        samples = type(latent_image["samples"])([tensors[f"latent.{spec.name}"] for spec in specs])
    return {**{key: value for key, value in latent_image.items() if key not in RATIOS}, "samples": samples}


def batch_index(latent_image: Mapping[str, Any], batch: int) -> tuple[int, ...] | None:
    """The number of the draw of noise of each of `batch` latents; a single number counts for all, as in ComfyUI.

    Raises `UserError` where they are others than the latents.
    """
    indices = latent_image.get("batch_index")
    if indices is None:
        return None
    if len(indices) not in (1, batch):
        raise UserError(
            f"The latent's batch_index has {len(indices)} numbers for a batch of {batch}.",
            "Use Latent From Batch and Repeat Latent Batch, which keep both in step.",
        )
    if not all(0 <= index < MAX_DRAWS for index in indices):
        raise UserError(
            f"The latent's batch_index names the draws of noise {min(indices)} to {max(indices)}; they are from 0 to "
            f"{MAX_DRAWS - 1}.",
            "Look at the node that made it.",
        )
    return tuple(int(index) for index in (indices if len(indices) == batch else list(indices) * batch))


def _batched(latent: Tensor, latent_image: Mapping[str, Any]) -> Tensor:
    """As many latents as the LATENT names draws of noise: a single one is repeated, as in ComfyUI."""
    count = len(latent_image.get("batch_index") or (0,))
    return latent.repeat(count, *[1] * (latent.ndim - 1)) if len(latent) == 1 else latent


def _parts(samples: Any) -> list[Tensor]:
    """The latents, or the masks, of a LATENT: ComfyUI nests those of video and sound in one object."""
    if samples is None:
        return []
    return list(samples.unbind()) if samples.is_nested else [samples]


def _placed(mask: Tensor, spec: LatentSpec) -> Tensor:
    """A noise mask with the dims of its latent; the first dim of a smaller one counts pictures, of a video frames."""
    if spec.dims == 3:
        return mask if mask.ndim == 5 else mask.reshape(1, 1, -1, *mask.shape[-2:])
    return mask.reshape(-1, 1, *mask.shape[-2:])


def _counted(number: int) -> str:
    return "one latent" if number == 1 else f"{number} latents"


def _fitted(latent: Tensor, spec: LatentSpec, family: str, latent_image: Mapping[str, Any]) -> Tensor:
    """A latent of a LATENT as the model takes it."""
    if latent.numel() == 0:
        raise UserError(
            f"The latent is empty: its shape is {list(latent.shape)}.",
            "Give a batch, a width and a height of at least 1.",
        )
    dims = 2 + spec.dims
    if latent.ndim not in (4, dims):
        wanted = "batch, channels, rows, columns" if dims == 4 else "batch, channels, frames, rows, columns"
        raise UserError(
            f"The latent has {latent.ndim} dims; this model takes {dims}: {wanted}.",
            "Use a latent for pictures, not for video or sound." if dims == 4 else "Use a latent for videos.",
        )
    broken = int(latent.numel() - torch.isfinite(latent).sum())
    if broken:
        raise UserError(
            f"The latent is not finite: {broken} of {latent.numel()} values are NaN or infinite.",
            "Look at the node that made it: a VAE in float16 does this.",
        )
    if latent.ndim < dims:
        latent = latent.unsqueeze(2)
    if not latent.any():
        return latent.new_zeros(_empty_shape(latent.shape, spec, latent_image))
    if latent.shape[1] != spec.channels:
        raise UserError(
            f"The latent has {latent.shape[1]} channels, but {family} samples latents of {spec.channels}.",
            "Encode the picture with the VAE that belongs to the model.",
        )
    return latent


def _empty_shape(shape: Sequence[int], spec: LatentSpec, latent_image: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape for the model, of an empty latent of `shape` that may be made for other channels and compression."""
    batch, _, *frames, rows, columns = shape
    spatial, temporal = (latent_image.get(ratio) for ratio in RATIOS)
    if spatial is not None:
        rows, columns = (round(cells * (spatial / spec.stride[1])) for cells in (rows, columns))
    if temporal is not None and frames:
        frames = [max(1, round(frames[0] * (temporal / spec.stride[0])))]
    return (batch, spec.channels, *frames, rows, columns)
