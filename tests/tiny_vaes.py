"""A tiny VAE of random weights of every class that the ranks run."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from paralleldit.parallel_backend.vae.load import LoadedVAE

KL = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
}
WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "AutoencoderKL (Flux)": (
        "AutoencoderKL",
        KL | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    ),
    "AutoencoderKL (SD)": ("AutoencoderKL", KL | {"latent_channels": 4}),
    "AutoencoderKL without attention": (
        "AutoencoderKL",
        KL | {"latent_channels": 4, "mid_block_add_attention": False, "layers_per_block": 2},
    ),
    "AutoencoderDC (SANA)": (
        "AutoencoderDC",
        {
            "latent_channels": 8,
            "attention_head_dim": 8,
            "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 16, 32),
            "decoder_block_out_channels": (8, 16, 32),
            "encoder_layers_per_block": (1, 1, 2),
            "decoder_layers_per_block": (1, 1, 2),
            "encoder_qkv_multiscales": ((), (), (5,)),
            "decoder_qkv_multiscales": ((), (), (5,)),
        },
    ),
    "AutoencoderKLWan (2.1)": ("AutoencoderKLWan", WAN),
    "AutoencoderKLWan (2.2)": (
        "AutoencoderKLWan",
        WAN
        | {
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
            "decoder_base_dim": 12,
        },
    ),
    "AutoencoderKLQwenImage": ("AutoencoderKLQwenImage", WAN),
    "AutoencoderKLHunyuanVideo": (
        "AutoencoderKLHunyuanVideo",
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 16, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
    ),
    "AutoencoderKLCogVideoX": (
        "AutoencoderKLCogVideoX",
        {
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 16, 16),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
    ),
    "AutoencoderKLMochi": (
        "AutoencoderKLMochi",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (32, 32, 64, 64),
            "decoder_block_out_channels": (32, 32, 64, 64),
            "layers_per_block": (1, 1, 1, 1, 1),
        },
    ),
    "AutoencoderKLLTXVideo": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 16, 16),
            "decoder_block_out_channels": (8, 8, 16, 16),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
        },
    ),
    "AutoencoderKLLTXVideo (timestep)": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 16, 32, 64),
            "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "spatio_temporal_scaling": (True,) * 4,
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_block_out_channels": (8, 16, 32),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "decoder_spatio_temporal_scaling": (True,) * 3,
            "decoder_inject_noise": (True, True, True, False),
            "upsample_residual": (True,) * 3,
            "upsample_factor": (2,) * 3,
            "timestep_conditioning": True,
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
    ),
}
"""By what the README calls it: class and config of a tiny one."""


def new_vae(case: str, dtype: torch.dtype = torch.float32) -> LoadedVAE:
    torch.manual_seed(5)
    name, config = CASES[case]
    module = getattr(diffusers, name)(**config)
    for name, parameter in module.named_parameters():
        if "per_channel_scale" in name:  # of added noise: 0 in a fresh one
            torch.nn.init.uniform_(parameter)
    return LoadedVAE(module.to(dtype).eval().requires_grad_(False), "tiny")
