"""The MODEL of a pipeline folder scales latents as its VAE says, and previews keep their colours: for every family.

`COMFYUI_PATH` names a checkout of ComfyUI, `COMFYUI_PYTHON` a Python that has its requirements (by default this one).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.tests.comfyui import latent_format_host as host
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]

MODELS = {
    name: {"family": name, "config": next(iter(spec.published.values()))}
    for name, spec in FAMILIES.items()
    if spec.host_config is not None
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("formats")
    (place / "models.json").write_text(json.dumps(MODELS))
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, "-W", "ignore", str(Path(host.__file__)), str(place)]
    env = os.environ | {"PYTHONPATH": str(Path(host.__file__).parent / "shim")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, f"ComfyUI's side failed:\n{done.stderr[-3000:]}"
    return place


def by_channel(numbers: list[float], latent: Tensor) -> Tensor:
    return torch.tensor(numbers).view(1, -1, *[1] * (latent.ndim - 2))


@pytest.mark.parametrize("kind", host.VAES)
@pytest.mark.parametrize("name", MODELS)
def test_latents_are_scaled_as_the_folders_vae_says(folder, name, kind):
    file = folder / f"{name} {kind}.safetensors"
    if not file.exists():
        pytest.skip("this ComfyUI is older than the family")
    found = load_file(file)
    spec = FAMILIES[name].latent
    told = host.vae_config(kind, spec.channels)
    latent = found["latent"]
    mean, std = told.get("latents_mean") or list(spec.mean), told.get("latents_std") or list(spec.std)
    inner = (latent - by_channel(mean, latent)) / by_channel(std, latent) if mean else latent
    inner = (inner - told.get("shift_factor", 0.0)) * told["scaling_factor"]
    torch.testing.assert_close(found["inner"], inner)
    torch.testing.assert_close(found["back"], latent)
    assert (found["own"] - found["usual"]).abs().max() <= 1, "colours of 0 to 255"
    assert found["usual"].float().std() > 1
