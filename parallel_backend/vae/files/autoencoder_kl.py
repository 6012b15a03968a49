"""The config of an AutoencoderKL file, from its header, and its keys under diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ...errors import UserError

Shape = tuple[int, ...]

PREFIXES = ("first_stage_model.", "vae.", "")
"""The deepest first: a whole checkpoint holds the VAE under one of them, a file of its own under none."""

# Left in some published files by their training.
TRAINING_ONLY = ("loss.", "model_ema.")

# Every file of the original layout normalises over this many groups; no tensor's shape depends on it.
NORM_GROUPS = 32

_UP_LEVEL = re.compile(r"^decoder\.up\.(\d+)\.")

# The original layout on the left. `down` levels count as in diffusers, `up` levels count backwards (see `_reverse_up`).
_RENAMES = (
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.conv\.", r".\1_blocks.\2.\3samplers.0.conv."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"(\.attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.0)\.(?:q|query)\.", r"\1.to_q."),
    (r"(\.attentions\.0)\.(?:k|key)\.", r"\1.to_k."),
    (r"(\.attentions\.0)\.(?:v|value)\.", r"\1.to_v."),
    (r"(\.attentions\.0)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
)


def holds_image_vae(keys: Collection[str]) -> bool:
    """Whether an image autoencoder is among `keys`."""
    return _prefix(keys) is not None


def _prefix(keys: Collection[str]) -> str | None:
    return next((prefix for prefix in PREFIXES if f"{prefix}decoder.conv_in.weight" in keys), None)


def diffusers_names(keys: Iterable[str], source: str) -> dict[str, str]:
    """{diffusers' name: key in the file} for the VAE among `keys`, which are of the original layout or diffusers'.

    Raises UserError when `source` holds no image autoencoder.
    """
    keys = list(keys)
    prefix = _prefix(keys)
    if prefix is None:
        raise UserError(
            f"{source} is not an image VAE: it has no tensor decoder.conv_in.weight.",
            "Choose a file that holds an AutoencoderKL, such as ae.safetensors of Flux.1.",
        )
    own = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    return {name: prefix + key for name, key in ldm_names(own).items()}


def ldm_names(keys: Iterable[str]) -> dict[str, str]:
    """{diffusers' name: key} for the keys of one autoencoder, of the original layout or diffusers'."""
    own = [key for key in keys if not key.startswith(TRAINING_ONLY)]
    levels = 1 + max((int(match[1]) for key in own if (match := _UP_LEVEL.match(key))), default=0)
    return {renamed(_reverse_up(key, levels), _RENAMES): key for key in own}


def config_from_shapes(shapes: Mapping[str, Shape], source: str) -> dict[str, object]:
    """AutoencoderKL's configuration, from the shapes of its tensors under diffusers' names."""

    def shape(name: str) -> Shape:
        if name not in shapes:
            raise UserError(f"{source} is not a whole AutoencoderKL: it has no tensor for {name}.")
        if len(shapes[name]) != 4:
            raise UserError(
                f"{source} is not an image VAE: {name} has {len(shapes[name])} dimensions, an image VAE's has 4."
            )
        return shapes[name]

    levels = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    widths = [shape(f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(levels)]
    if not widths:
        raise UserError(f"{source} is not a whole AutoencoderKL: it has a decoder but no encoder.")
    if odd := [width for width in widths if width % NORM_GROUPS]:
        raise UserError(
            f"{source} has {odd[0]} channels in a block, which its {NORM_GROUPS} normalisation groups do not divide.",
            "Give the VAE's diffusers folder instead: its config.json tells the number of groups.",
        )
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": NORM_GROUPS,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in shapes,
    }


def count(shapes: Iterable[str], pattern: str) -> int:
    """How many different first groups `pattern` finds at the start of the names."""
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def _reverse_up(key: str, levels: int) -> str:
    return _UP_LEVEL.sub(lambda match: f"decoder.up.{levels - 1 - int(match[1])}.", key)


def renamed(key: str, renames: Iterable[tuple[str, str]]) -> str:
    """`key` after all substitutions (pattern, replacement), one after the other."""
    for pattern, name in renames:
        key = re.sub(pattern, name, key)
    return key
