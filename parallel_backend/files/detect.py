"""Which family a checkpoint belongs to, from its keys and shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..families.registry import FAMILIES
from ..families.spec import FamilySpec, Shapes
from .checkpoint import Checkpoint
from .key_map import Piece, identity_map, ruled_map
from .quantization import FORMAT, refuse_unread
from .recognise import refuse_others

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "")
"""Behind "model.model." ComfyUI saves HunyuanVideo."""


@dataclass(frozen=True)
class Detected:
    """A family's model in a checkpoint: `config` are the arguments of its class in diffusers.

    `layout` is "diffusers" or "original"; `shapes` are the model's keys without `prefix`.
    """

    spec: FamilySpec
    layout: str
    prefix: str
    config: dict[str, Any]
    shapes: Shapes

    @property
    def family(self) -> str:
        return self.spec.name

    def pieces(self, expected: Shapes) -> dict[str, list[Piece]]:
        """The pieces of the file that make each parameter in `expected` (diffusers names). Raises `UserError` if keys
        do not fit."""
        if self.layout == "diffusers":
            return identity_map(self.shapes, expected)
        return ruled_map(self.spec.rules, self.shapes, expected)


def detect(checkpoint: Checkpoint) -> Detected:
    """Raises UserError naming the file, what was looked at and the known families when none matches, or which
    neighbour of one it is; for quantized weights that cannot be read, too.

    Of a file that holds text encoders and a VAE as well, the model's own keys alone count.
    """
    neighbour = ""
    for prefix in PREFIXES:
        shapes = {
            key.removeprefix(prefix): info.shape for key, info in checkpoint.tensors.items() if key.startswith(prefix)
        }
        for spec in FAMILIES.values():
            marks = {mark: checkpoint.tensors[mark].shape for mark in spec.marks if mark in checkpoint.tensors}
            layouts = (name for name, keys in spec.landmarks.items() if all(key in shapes for key in keys.values()))
            if layout := next(layouts, None):
                found = spec.reject({**shapes, **marks}, checkpoint.metadata)
                if found is None:
                    refuse_unread(checkpoint, prefix)
                    return _detected(checkpoint, spec, layout, prefix, {**shapes, **marks})
                neighbour = neighbour or f"{checkpoint.source} holds {found}, which is not served; {spec.title} is."
    if neighbour:
        raise UserError(neighbour, "Choose another model, or load this one with ComfyUI's own loader.")
    refuse_unread(checkpoint)
    refuse_others(checkpoint, "a diffusion model")
    keys = sorted(checkpoint.tensors)
    declared = f", config.json says {checkpoint.config.get('_class_name')!r}" if checkpoint.config else ""
    raise UserError(
        f"{checkpoint.source} holds no model of a known family ({', '.join(FAMILIES)}); "
        f"looked at {len(keys)} tensors ({', '.join(keys[:3])}{' …' if len(keys) > 3 else ''}){declared}.",
        "Choose the file or folder of a diffusion transformer; text encoders and VAEs have loaders of their own.",
    )


def _detected(checkpoint: Checkpoint, spec: FamilySpec, layout: str, prefix: str, shapes: Shapes) -> Detected:
    declared = checkpoint.config or {}
    class_name = declared.get("_class_name", spec.class_name)
    if class_name not in (spec.class_name, *spec.older_class_names):
        raise UserError(
            f"{checkpoint.source}: config.json says {class_name!r}, but the weights are those of {spec.class_name}."
        )
    try:
        config = spec.derive_config(layout, shapes, declared)
    except UserError as error:
        raise UserError(f"{checkpoint.source}: {error.message}", error.hint) from error
    for name, value in config.items():
        stated = declared.get(name)
        if stated is not None and stated != (list(value) if isinstance(value, tuple) else value):
            raise UserError(
                f"{checkpoint.source}: config.json says {name} = {stated!r}, but the weights' shapes say {value!r}.",
                "Config and weights must come from the same model.",
            )
    others = {*spec.not_weights, *spec.marks}
    weights = {key: shape for key, shape in shapes.items() if key not in others and key.rsplit(".", 1)[-1] != FORMAT}
    return Detected(spec, layout, prefix, config, weights)
