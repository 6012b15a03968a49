"""Someone who knows other nodes finds ours by their names, and sees the inputs first that most runs need."""

from __future__ import annotations

from typing import Any

import pytest
from paralleldit import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")

WANTED = {
    "multi gpu": ("Loader", "Layout", "Sampler"),
    "multigpu": ("Loader", "Layout", "Sampler"),
    "gpu": ("Loader", "Layout"),
    "usp": ("Layout",),
    "xdit": ("Loader", "Layout", "Sampler"),
    "xfuser": ("Loader", "Layout", "Sampler"),
    "raylight": ("Loader", "Layout", "Sampler", "Lora"),
    "distributed": ("Loader", "Layout", "Sampler"),
    "sequence parallel": ("Layout",),
    "ring attention": ("Layout",),
    "ulysses": ("Layout",),
    "tensor parallel": ("Layout",),
    "pipefusion": ("Layout",),
    "distrifusion": ("Layout",),
    "load diffusion model": ("Loader",),
    "unet loader": ("Loader",),
    "load checkpoint": ("Loader",),
    "flux loader": ("Loader",),
    "ksampler": ("Sampler",),
    "load lora": ("Lora",),
    "controlnet": ("ControlNetLoader", "ControlNetApply"),
    "apply controlnet": ("ControlNetApply",),
    "ipadapter": ("IPAdapter",),
    "clip text encode": ("TextEncode",),
    "load vae": ("VAELoader",),
    "vae decode": ("VAEDecode",),
    "vae decode tiled": ("VAEDecode",),
    "vae encode": ("VAEEncode",),
    "inpaint": ("VAEEncodeForInpaint",),
    "free memory": ("Unload",),
    "vram": ("Status", "Unload"),
}
"""What people type, and the nodes of ours that they want, without the prefix of their ids."""

SHOWN = {
    "Loader": ("model", "weight_dtype"),
    "Layout": (
        *("ranks", "ulysses_degree", "ring_degree", "cfg_degree"),
        *("pipefusion_degree", "tensor_degree", "weights", "devices"),
    ),
    "Sampler": ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "Lora": ("lora", "strength"),
    "ControlNetApply": ("strength", "start_percent", "end_percent"),
    "TextEncode": ("text_encoders", "text", "guidance"),
    "VAELoader": ("vae", "weight_dtype"),
    "VAEDecode": ("tile_size",),
    "VAEEncode": ("tile_size",),
}
"""The widgets that are no advanced inputs."""


def texts(name: str) -> list[str]:
    """What ComfyUI's search reads of a node: its name, its title and its aliases."""
    aliases = getattr(NODE_CLASS_MAPPINGS[name], "SEARCH_ALIASES", ())
    return [text.lower() for text in (name, NODE_DISPLAY_NAME_MAPPINGS[name], *aliases)]


def widgets(name: str) -> dict[str, dict[str, Any]]:
    groups = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    declared = {**groups["required"], **groups.get("optional", {})}
    return {each: spec[1] for each, spec in declared.items() if isinstance(spec[0], list) or spec[0] in WIDGETS}


@pytest.mark.parametrize("typed", WANTED)
def test_what_people_type_finds_the_nodes_that_they_want(typed):
    wanted = {f"ParallelDiT{name}" for name in WANTED[typed]}
    assert wanted <= {name for name in NODE_CLASS_MAPPINGS if any(typed in text for text in texts(name))}


@pytest.mark.parametrize("name", SHOWN)
def test_rare_inputs_are_advanced_ones(name):
    shown = {each for each, options in widgets(f"ParallelDiT{name}").items() if not options.get("advanced")}
    assert shown == set(SHOWN[name])


def test_no_alias_is_given_twice_to_a_node():
    for name, node in NODE_CLASS_MAPPINGS.items():
        aliases = list(getattr(node, "SEARCH_ALIASES", ()))
        assert aliases, name
        assert len(aliases) == len(set(aliases)), name
