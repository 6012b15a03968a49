"""Decodes and encodes with ComfyUI's own VAE: run by `test_vae_parity.py` with the host's Python.

COMFYUI_PATH=... python vae_host.py FOLDER

For each case reads FOLDER/NAME.safetensors and writes FOLDER/NAME.host.safetensors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CASES = {"flux": (16, False), "sd": (4, True)}
"""name: latent channels, quantisation convolutions"""


def latent(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 5, 7, generator=torch.Generator().manual_seed(1))


def image() -> torch.Tensor:
    return torch.rand(1, 45, 59, 3, generator=torch.Generator().manual_seed(2))


def main(folder: Path) -> None:
    sys.argv[1:] = ["--cpu"]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.sd import VAE

    for name, (channels, _) in CASES.items():
        vae = VAE(sd=load_file(folder / f"{name}.safetensors"), dtype=torch.float32)
        results = {"image": vae.decode(latent(channels)), "latent": vae.encode(image())}
        save_file({key: value.contiguous() for key, value in results.items()}, folder / f"{name}.host.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
