"""Tiny ControlNets of ComfyUI's own classes, for `parity_host.py`: runs in the host's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

STD = 0.1


def controlnet(name: str, native: Any, file: Path) -> Any:
    """A CONTROL_NET for the MODEL `native`, with random weights, which `file` holds where ours reads the same."""
    import comfy.controlnet
    import comfy.ops
    from comfy import latent_formats
    from comfy.ldm.flux.controlnet import ControlNetFlux
    from comfy.ldm.hydit.controlnet import HunYuanControlNet

    if name == "sd3":
        save_file(of_random_weights(sd3_controlnet()).state_dict(), file)
        return comfy.controlnet.load_controlnet(str(file))
    config = native.model.model_config.unet_config
    settings = {**config, "operations": comfy.ops.manual_cast, "dtype": torch.float32, "device": "cpu"}
    extra = ["y", "guidance"] if name == "flux" else ["y"]
    if name == "flux":
        network = ControlNetFlux(latent_input=True, control_latent_channels=16, **settings)
        # By default it repeats its residuals for as many blocks as Flux.1 has.
        network.main_model_double, network.main_model_single = config["depth"], config["depth_single_blocks"]
        latent_format = latent_formats.Flux()
    else:
        # It is told neither size nor style, whatever the model is told.
        network = HunYuanControlNet(**(settings | {"size_cond": False, "use_style_cond": False}))
        skips = config["depth"] // 2 - 1
        network.blocks, network.after_proj_list = network.blocks[:skips], network.after_proj_list[:skips]
        latent_format = latent_formats.SDXL()
        extra = ["text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size"]
    of_random_weights(network)
    if name == "hunyuandit":
        save_file(network.state_dict(), file)
    device = torch.device("cpu")
    return comfy.controlnet.ControlNet(
        network.eval(), compression_ratio=1, latent_format=latent_format, load_device=device, extra_conds=extra
    )


def of_random_weights(network: Any) -> Any:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * STD)
    return network


def sd3_controlnet() -> Any:
    """As InstantX': ComfyUI tells the widths of the rest from the number of channels."""
    from diffusers import SD3ControlNetModel

    return SD3ControlNetModel(
        num_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=128,
        pooled_projection_dim=40,
        pos_embed_max_size=9,
    )
