"""The same VAE file gives the same pictures and latents as ComfyUI's own VAE.

`COMFYUI_PATH` names a checkout of ComfyUI, `COMFYUI_PYTHON` a Python that has its requirements (by default this one).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.vae.decode import decode
from paralleldit.parallel_backend.vae.encode import encode
from paralleldit.parallel_backend.vae.load import load_vae
from paralleldit.tests.comfyui import vae_host as host
from paralleldit.tests.unit.vae_original_layout import original_state
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]

ALONE = Axis("alone", [0], None, Ledger())

# ComfyUI knows no other widths.
WIDTHS = (128, 256, 512, 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One file of each case in the original layout, and what ComfyUI makes of it."""
    place = tmp_path_factory.mktemp("vae")
    for name, (channels, quant) in host.CASES.items():
        save_file(original_state(WIDTHS, 2, channels, quant, True), place / f"{name}.safetensors")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, "-W", "ignore", str(Path(host.__file__)), str(place)]
    env = os.environ | {"PYTHONPATH": str(Path(host.__file__).parent / "shim")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"ComfyUI's side failed:\n{done.stderr[-3000:]}"
    return place


@pytest.mark.parametrize("name", host.CASES)
def test_pictures_and_latents_equal_the_hosts(name, folder):
    vae = load_vae(folder / f"{name}.safetensors", device="cpu", dtype=torch.float32)
    native = load_file(folder / f"{name}.host.safetensors")
    image = decode(vae, host.latent(vae.latent_channels), ALONE)
    torch.testing.assert_close(image, native["image"], rtol=0, atol=1e-4)
    torch.testing.assert_close(encode(vae, host.image(), ALONE), native["latent"], rtol=1e-4, atol=1e-4)
