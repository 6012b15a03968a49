"""Tiny ControlNets in files that ComfyUI and the ranks read, for `parity_host.py`: runs in the host's process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

STD = 0.1
MODES = {"flux": 2}
"""The kind of picture that a union ControlNet is told; the others are none."""
CPU = torch.device("cpu")


def controlnet(name: str, native: Any, file: Path) -> Any:
    """ComfyUI's CONTROL_NET `name`, one of `NETS`, for the MODEL `native`, of random weights, which go to `file`."""
    config = {key: value for key, value in native.model.model_config.unet_config.items() if key != "dtype"}
    return NETS[name](config, file)


def flux(config: dict[str, Any], file: Path) -> Any:
    """A union ControlNet as InstantX'."""
    import comfy.controlnet
    import comfy.ops
    from diffusers import FluxControlNetModel

    heads = config["num_heads"]
    network = FluxControlNetModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=config["hidden_size"] // heads,
        num_attention_heads=heads,
        joint_attention_dim=config["context_in_dim"],
        pooled_projection_dim=config["vec_in_dim"],
        guidance_embeds=True,
        axes_dims_rope=tuple(config["axes_dim"]),
        num_mode=4,
    )
    save_file(of_random_weights(network).state_dict(), file)
    # ComfyUI takes every Flux for one of the full width.
    told = (SimpleNamespace(unet_config=config), comfy.ops.manual_cast, CPU, torch.float32, None, CPU)
    with mock.patch.object(comfy.controlnet, "controlnet_config", return_value=told):
        loaded = comfy.controlnet.load_controlnet(str(file))
    # By default it repeats its residuals for as many blocks as Flux.1 has.
    inner = loaded.control_model
    inner.main_model_double, inner.main_model_single = config["depth"], config["depth_single_blocks"]
    loaded.set_extra_arg("control_type", [MODES["flux"]])
    return loaded


def sd3(config: dict[str, Any], file: Path) -> Any:
    """As InstantX'. ComfyUI tells the model's depth from its width."""
    import comfy.controlnet
    from diffusers import SD3ControlNetModel

    width = 64 * config["depth"]
    network = SD3ControlNetModel(
        num_layers=1,
        attention_head_dim=64,
        num_attention_heads=config["depth"],
        joint_attention_dim=config["context_embedder_config"]["params"]["in_features"],
        caption_projection_dim=width,
        pooled_projection_dim=config["adm_in_channels"],
        pos_embed_max_size=9,
    )
    save_file(of_random_weights(network).state_dict(), file)
    return comfy.controlnet.load_controlnet(str(file))


def hunyuandit(config: dict[str, Any], file: Path) -> Any:
    """As Tencent's, which ComfyUI knows in the full size alone. It is told neither size nor style."""
    import comfy.controlnet
    import comfy.ops
    from comfy import latent_formats
    from comfy.ldm.hydit.controlnet import HunYuanControlNet

    settings = config | {"size_cond": False, "use_style_cond": False}
    network = HunYuanControlNet(operations=comfy.ops.manual_cast, dtype=torch.float32, device="cpu", **settings)
    skips = config["depth"] // 2 - 1
    network.blocks, network.after_proj_list = network.blocks[:skips], network.after_proj_list[:skips]
    save_file(of_random_weights(network).state_dict(), file)
    extra = ["text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size"]
    return comfy.controlnet.ControlNet(
        network.eval(),
        compression_ratio=1,
        latent_format=latent_formats.SDXL(),
        load_device=CPU,
        extra_conds=extra,
    )


def stability(config: dict[str, Any], file: Path, is_double: bool) -> Any:
    """As Stability's for 3.5, by their published names. `is_double`: with pooled text that the model has embedded.

    What ComfyUI copies out of the model is not in their files.
    """
    import comfy.controlnet
    import comfy.ops
    from comfy.cldm import dit_embedder
    from comfy.utils import MMDIT_MAP_BASIC

    kind = dit_embedder.ControlNetEmbedder
    network = kind(
        img_size=None,
        patch_size=2,
        in_chans=16,
        num_layers=1,
        main_model_double=config["depth"],
        double_y_emb=is_double,
        attention_head_dim=64,
        num_attention_heads=config["depth"],
        adm_in_channels=config["adm_in_channels"],
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.manual_cast,
    )
    copied = "orig_y_embedder." if is_double else "x_embedder."
    names = {each[0]: each[1] for each in MMDIT_MAP_BASIC}
    weights = of_random_weights(network).state_dict()
    save_file({names.get(key, key): each for key, each in weights.items() if not key.startswith(copied)}, file)
    # ComfyUI knows pooled text of the full width alone.
    narrow = lambda **settings: kind(**settings | {"adm_in_channels": config["adm_in_channels"]})  # noqa: E731
    with mock.patch.object(dit_embedder, "ControlNetEmbedder", narrow):
        return comfy.controlnet.load_controlnet(str(file))


NETS = {
    "flux": flux,
    "sd3": sd3,
    "hunyuandit": hunyuandit,
    "sd3, Stability's": lambda config, file: stability(config, file, False),
    "sd3, Stability's with embedded text": lambda config, file: stability(config, file, True),
}


def of_random_weights(network: Any) -> Any:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * STD)
    return network
