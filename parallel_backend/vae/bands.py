"""A VAE whose decoder works on one band of rows per rank (DistVAE)."""

from __future__ import annotations

import copy

import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from distvae.models.layers.conv_mixin import PatchConvMixin
from distvae.modules.adapters.layers.norm_adapters import GroupNormAdapter
from distvae.vae import parallelize_decoder
from torch import Tensor, nn


class Float32(nn.Module):
    """`module`, computed in fp32 for input of any dtype."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.float()).to(x.dtype)


def row_parallel(module: AutoencoderKL, group: dist.ProcessGroup) -> AutoencoderKL:
    """A copy of `module` that shares its parameters and decodes across `group`; `module` stays as it was.

    The copy takes any number of calls of any size with at least one latent row per rank, and gives the whole picture to
    every rank.
    """
    # DistVAE rewires the decoder in place: it gets a copy of the modules, around the same parameters.
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, shared)
    parallelize_decoder(copied, group)
    for part in copied.modules():
        if isinstance(part, PatchConvMixin):
            # Else each convolution keeps its halo rows for every size that was ever decoded.
            part.halo_buffer = None  # pyright: ignore[reportArgumentType]
        elif isinstance(part, GroupNormAdapter):
            # DistVAE squares deviations in the input's dtype: past 255 that is infinite in fp16, and the output 0.
            part.group_norm = Float32(part.group_norm)  # pyright: ignore[reportAttributeAccessIssue]
    return copied
