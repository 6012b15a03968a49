"""Scales latents by the formats of MODELs of another VAE: run by `test_latent_formats.py` with the host's Python.

COMFYUI_PATH=... python latent_format_host.py FOLDER

For each model of FOLDER/models.json (its `family` and `config`, by name) and each of `VAES`, unless this ComfyUI is too
old for it, makes the MODEL of a folder
with such a VAE, and writes FOLDER/NAME VAE.safetensors: a latent, what the MODEL makes of it and back, and the colours
of its preview, beside those of the same latent in the usual scale.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VAES: dict[str, Any] = {
    "scale": {"scaling_factor": 0.69},
    "scale and shift": {"scaling_factor": 0.69, "shift_factor": -0.21},
    "by channel": {"scaling_factor": 0.69, "shift_factor": -0.21, "latents_mean": True, "latents_std": True},
}


def vae_config(kind: str, channels: int) -> dict[str, Any]:
    numbers = torch.arange(1.0, 1 + channels) / channels
    by_channel = {"latents_mean": (numbers - 0.4).tolist(), "latents_std": (numbers + 0.7).tolist()}
    return {key: by_channel.get(key, value) for key, value in VAES[kind].items()}


def main(folder: Path) -> None:
    sys.argv[1:] = ["--cpu", "--preview-method=latent2rgb"]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "conftest.py"))
    import comfy.options

    comfy.options.enable_args_parsing()
    import latent_preview
    from paralleldit.nodes.comfyui.remote_model import host_knows, new_model
    from paralleldit.nodes.handles import ModelHandle
    from paralleldit.parallel_backend.families.registry import FAMILIES
    from paralleldit.parallel_backend.protocol.messages import ModelRef

    models = json.loads((folder / "models.json").read_text())
    for name, model in ((name, model) for name, model in models.items() if host_knows(FAMILIES[name])):
        for kind in VAES:
            path = folder / name / kind
            (path / "vae").mkdir(parents=True)
            handles = [ModelHandle(ModelRef(path=str(each)), None, **model) for each in (folder, path)]
            spec = handles[0].spec.latent
            (path / "vae" / "config.json").write_text(json.dumps(vae_config(kind, spec.channels)))
            usual, own = (new_model(handle).model for handle in handles)
            latent = torch.randn(1, spec.channels, *[2] * (spec.dims == 3), 5, 7)
            inner = own.process_latent_in(latent)
            results = {"latent": latent, "inner": inner, "back": own.process_latent_out(inner)}
            for who, each in (("usual", usual), ("own", own)):
                colours = latent_preview.get_previewer("cpu", each.latent_format)
                picture = colours.decode_latent_to_preview(each.process_latent_in(latent / 8))
                results[who] = torch.tensor(list(picture.getdata()), dtype=torch.int32)
            save_file(
                {key: value.contiguous() for key, value in results.items()}, folder / f"{name} {kind}.safetensors"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
