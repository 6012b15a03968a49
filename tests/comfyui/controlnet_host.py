"""Tiny ControlNets of ComfyUI's own classes, for `parity_host.py`: runs in the host's process."""

from __future__ import annotations

from typing import Any

import torch

STD = 0.1


def controlnet(name: str, native: Any) -> Any:
    """A CONTROL_NET for the MODEL `native`, with random weights."""
    import comfy.controlnet
    import comfy.ops
    from comfy import latent_formats
    from comfy.cldm.mmdit import ControlNet as ControlNetSD3
    from comfy.ldm.flux.controlnet import ControlNetFlux
    from comfy.ldm.hydit.controlnet import HunYuanControlNet

    config = native.model.model_config.unet_config
    settings = {**config, "operations": comfy.ops.manual_cast, "dtype": torch.float32, "device": "cpu"}
    extra = ["y", "guidance"] if name == "flux" else ["y"]
    if name == "flux":
        network = ControlNetFlux(latent_input=True, control_latent_channels=16, **settings)
        # By default it repeats its residuals for as many blocks as Flux.1 has.
        network.main_model_double, network.main_model_single = config["depth"], config["depth_single_blocks"]
        latent_format = latent_formats.Flux()
    elif name == "sd3":
        network = ControlNetSD3(control_latent_channels=16, **(settings | {"num_blocks": 1}))
        latent_format = latent_formats.SD3()
    else:
        # It is told neither size nor style, whatever the model is told.
        network = HunYuanControlNet(**(settings | {"size_cond": False, "use_style_cond": False}))
        skips = config["depth"] // 2 - 1
        network.blocks, network.after_proj_list = network.blocks[:skips], network.after_proj_list[:skips]
        latent_format = latent_formats.SDXL()
        extra = ["text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size"]
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in (*network.parameters(), *network.buffers()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * STD)
    device = torch.device("cpu")
    return comfy.controlnet.ControlNet(
        network.eval(), compression_ratio=1, latent_format=latent_format, load_device=device, extra_conds=extra
    )
