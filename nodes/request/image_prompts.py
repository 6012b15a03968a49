"""IP-Adapter pictures of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...parallel_backend.protocol.messages import Conditioning
from ..handles import NEGATIVE, POSITIVE, EncodedPicture

if TYPE_CHECKING:
    from torch import Tensor


def to_message(
    entries: tuple[Conditioning, ...], side: str, pictures: Sequence[EncodedPicture]
) -> tuple[tuple[Conditioning, ...], dict[str, Tensor]]:
    """The message's entries of one `side` (positive or negative) with the model's pictures, and their tensors."""
    messages = tuple(picture.message for picture in pictures)
    number = POSITIVE if side == "positive" else NEGATIVE
    tensors = {
        f"{side}.{index}.{name}": tensor
        for index, entry in enumerate(entries)
        if entry.prompt is None
        for name, tensor in embeddings(pictures, number).items()
    }
    return tuple(entry.model_copy(update={"image_prompts": messages}) for entry in entries), tensors


def embeddings(pictures: Sequence[EncodedPicture], side: int) -> Mapping[str, Tensor]:
    """The embeddings of one side of the prompt, by the names of a condition's tensors."""
    return {f"image.{number}": picture.embeddings[side] for number, picture in enumerate(pictures)}
