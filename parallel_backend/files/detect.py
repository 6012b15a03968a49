"""Which family a checkpoint belongs to, from its keys and shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..families.keys.flux import FLUX
from ..families.keys.hunyuandit import HUNYUANDIT
from ..families.keys.pixart import PIXART_ALPHA, PIXART_SIGMA
from ..families.keys.sd3 import SD3
from ..families.spec import FileFamily, Shapes
from .checkpoint import Checkpoint
from .key_map import Piece, identity_map, ruled_map
from .quantization import FORMAT, refuse_unread

FAMILIES: tuple[FileFamily, ...] = (FLUX, SD3, PIXART_ALPHA, PIXART_SIGMA, HUNYUANDIT)
"""In the order in which they are tried."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")


@dataclass(frozen=True)
class Detected:
    """A family's model in a checkpoint: `config` are the arguments of the diffusers class `class_name`.

    `layout` is "diffusers" or "original"; `shapes` are the model's keys without `prefix`.
    """

    family: str
    class_name: str
    layout: str
    prefix: str
    config: dict[str, Any]
    shapes: Shapes
    row: FileFamily

    def pieces(self, expected: Shapes) -> dict[str, list[Piece]]:
        """Where each parameter in `expected` (diffusers names) lies; raises UserError if the keys do not fit."""
        if self.layout == "diffusers":
            return identity_map(self.shapes, expected)
        return ruled_map(self.row.rules, self.shapes, expected)


def detect(checkpoint: Checkpoint) -> Detected:
    """Raises UserError naming the file, what was looked at and the known families when none matches; for quantized
    weights that cannot be read, too.
    """
    refuse_unread(checkpoint)
    for prefix in PREFIXES:
        shapes = {
            key.removeprefix(prefix): info.shape for key, info in checkpoint.tensors.items() if key.startswith(prefix)
        }
        for row in FAMILIES:
            for layout, landmarks in row.landmarks.items():
                if all(key in shapes for key in landmarks.values()):
                    return _detected(checkpoint, row, layout, prefix, shapes)
    keys = sorted(checkpoint.tensors)
    declared = f", config.json says {checkpoint.config.get('_class_name')!r}" if checkpoint.config else ""
    raise UserError(
        f"{checkpoint.source} holds no model of a known family ({', '.join(row.name for row in FAMILIES)}); "
        f"looked at {len(keys)} tensors ({', '.join(keys[:3])}{' …' if len(keys) > 3 else ''}){declared}.",
        "Choose the file or folder of a diffusion transformer; text encoders and VAEs have loaders of their own.",
    )


def _detected(checkpoint: Checkpoint, row: FileFamily, layout: str, prefix: str, shapes: Shapes) -> Detected:
    declared = checkpoint.config or {}
    class_name = declared.get("_class_name", row.class_name)
    if class_name not in (row.class_name, *row.older_class_names):
        raise UserError(
            f"{checkpoint.source}: config.json says {class_name!r}, but the weights are those of {row.class_name}."
        )
    try:
        config = row.derive_config(layout, shapes, declared)
    except UserError as error:
        raise UserError(f"{checkpoint.source}: {error.message}", error.hint) from error
    for name, value in config.items():
        told = declared.get(name)
        if told is not None and told != (list(value) if isinstance(value, tuple) else value):
            raise UserError(
                f"{checkpoint.source}: config.json says {name} = {told!r}, but the weights' shapes say {value!r}.",
                "Config and weights must come from the same model.",
            )
    weights = {
        key: shape for key, shape in shapes.items() if key not in row.not_weights and key.rsplit(".", 1)[-1] != FORMAT
    }
    return Detected(row.name, row.class_name, layout, prefix, config, weights, row)
