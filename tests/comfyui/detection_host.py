"""Asks ComfyUI's own detection: run by `test_detection.py` with the host's Python.

COMFYUI_PATH=... python detection_host.py FOLDER

For each FOLDER/NAME.json (`family`, `config` and the `shapes` of its weights in the original layout) that this ComfyUI
is not too old for writes
NAME.host.json: what the detection says of the shapes (`detected`) and the pack of the config (`said`), the class of
ComfyUI's that each leads to, the shapes of the network that it builds of `said`, and what it calls its weights in
`loras`.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch


def main(folder: Path) -> None:
    sys.argv[1:] = ["--cpu"]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "conftest.py"))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.model_detection
    from paralleldit.nodes.comfyui.remote_model import Operations, host_knows, model_config, unet_config
    from paralleldit.parallel_backend.families.registry import FAMILIES

    for asked in sorted(folder.glob("*.json")):
        given = json.loads(asked.read_text())
        spec = FAMILIES[given["family"]]
        if not host_knows(spec):
            continue
        weights = {key: torch.empty(shape, device="meta") for key, shape in given["shapes"].items()}
        detected = comfy.model_detection.detect_unet_config(weights, "")
        said = unet_config(spec, given["config"])
        rows = [comfy.model_detection.model_config_from_unet_config(detected), model_config(spec, given["config"])]
        rows[1].set_inference_dtype(torch.float32, None)
        rows[1].custom_operations = Operations
        model = rows[1].get_model({}, device=torch.device("meta"))
        network = model.diffusion_model
        answer = {
            "detected": detected,
            "said": said,
            "classes": [type(row).__name__ for row in rows],
            "loras": comfy.lora.model_lora_keys_unet(model, {}),
            "shapes": {key: tuple(value.shape) for key, value in network.state_dict().items()},
        }
        asked.with_suffix(".host.json").write_text(json.dumps(answer, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
