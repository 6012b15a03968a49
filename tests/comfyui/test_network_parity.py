"""The same weights and the same CONDITIONING give the prediction of ComfyUI's own network.

`COMFYUI_PATH` names a checkout of ComfyUI, `COMFYUI_PYTHON` a Python that has its requirements (by default this one).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from paralleldit.nodes.request.conditioning import to_message
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.engine.conditioning import Inputs, entries_of_side
from paralleldit.parallel_backend.engine.model import build_family
from paralleldit.parallel_backend.families.keys.cogvideox import COGVIDEOX, COGVIDEOX15, HEADS_OF_5B
from paralleldit.parallel_backend.families.keys.hunyuanvideo import HUNYUANVIDEO
from paralleldit.parallel_backend.families.keys.mochi import MOCHI
from paralleldit.parallel_backend.families.keys.qwen_image import REFERENCES_AT_ZERO
from paralleldit.parallel_backend.families.keys.sdxl import V_PREDICTION, ZERO_TERMINAL
from paralleldit.parallel_backend.families.plain import PlainFamily
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.strategies.prompt_batches import one_by_one
from paralleldit.parallel_backend.strategies.row_parallel import RowParallel
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.parallel_backend.weights.load import load_transformer
from paralleldit.tests import tiny_unet, tiny_wan, tiny_zimage
from paralleldit.tests.comfyui import network_host as host
from paralleldit.tests.comfyui.tiny_networks import hunyuandit, mochi, pixart
from paralleldit.tests.original_layout import originals_of
from paralleldit.tests.tiny_models import TINY_MODELS
from paralleldit.tests.unit.cross_attention_original_layout import original_weights
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]


CASES = {
    "pixart-alpha": lambda: pixart(takes_size=True),
    "pixart-sigma": lambda: pixart(takes_size=False),
    "hunyuandit-1.1": lambda: hunyuandit(takes_size=True),
    "hunyuandit-1.2": lambda: hunyuandit(takes_size=False),
    "wan": lambda: tiny_wan.tiny_transformer(heads=1, text_width=20),
    "zimage": tiny_zimage.tiny_transformer,
    "cogvideox 5b": lambda: TINY_MODELS["cogvideox 5b"].make(HEADS_OF_5B, 1),
    "cogvideox 1.5": lambda: TINY_MODELS["cogvideox 1.5"].make(2, 1),
    "mochi": mochi,
    "hunyuanvideo": lambda: TINY_MODELS["hunyuanvideo"].make(2, 1),
    "qwen-image": lambda: TINY_MODELS["qwen-image"].make(2, 1),
    "qwen-image edit": lambda: TINY_MODELS["qwen-image edit"].make(2, 1),
    "sdxl": tiny_unet.of_files,
    "sdxl v": tiny_unet.of_files,
    "sdxl refiner": lambda: tiny_unet.of_files(tiny_unet.REFINER),
}
STD = {"pixart": 0.15, "hunyuandit": 0.15, "wan": 0.05}
"""Deviation of the weights, by the family; the others' models keep those that they have. Small queries and keys would
show the epsilon of Z-Image's norms, which ComfyUI has smaller."""

WEIGHTS = {
    "cogvideox 5b": partial(originals_of, COGVIDEOX),
    "cogvideox 1.5": partial(originals_of, COGVIDEOX15),
    "mochi": partial(originals_of, MOCHI),
    "hunyuanvideo": partial(originals_of, HUNYUANVIDEO),
    "qwen-image": dict,
    "qwen-image edit": dict,
    **dict.fromkeys(("sdxl", "sdxl v", "sdxl refiner"), tiny_unet.original_weights),
}
"""What makes the weights of a file, where that is not `original_weights`."""
MARKS = {"qwen-image edit": (REFERENCES_AT_ZERO,), "sdxl v": (V_PREDICTION, ZERO_TERMINAL)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A file of each case in the original layout, and what ComfyUI predicts with it."""
    place = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    for name, make in CASES.items():
        model = make()
        if std := next((std for family, std in STD.items() if name.partition("-")[0] == family), None):
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=std)
        weights = place / f"{name}.safetensors"
        tables = {"pos_embed": torch.zeros(1, 32 * 32, 96)} if "pixart" in name else {}
        weights_of = WEIGHTS.get(name, original_weights)
        marks = dict.fromkeys(MARKS.get(name, ()), torch.empty(0))
        save_file(weights_of(dict(model.state_dict())) | tables | marks, weights)
        loaded = load_transformer(weights, device="cpu")
        weights.with_suffix(".json").write_text(json.dumps({"family": loaded.family, "config": loaded.config}))
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    # Without assertions: ComfyUI's Mochi asserts that it is of the published width.
    command = [python, "-O", "-W", "ignore", str(Path(host.__file__)), str(place)]
    env = os.environ | {"PYTHONPATH": str(Path(host.__file__).parent / "shim")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.returncode == 0, f"ComfyUI's side failed:\n{done.stderr[-3000:]}"
    return place


@pytest.mark.parametrize("name", CASES)
def test_prediction_equals_the_hosts(name, folder):
    weights = folder / f"{name}.safetensors"
    family = build_family(load_transformer(weights, device="cpu"), weights)
    latent, tokens, entry = host.inputs(family.name)
    messages, tensors = to_message("positive", [[tokens, entry]], family.name, latent.shape)
    sampling = family.model_sampling(None)
    positive = entries_of_side(messages, "positive", Inputs(tensors, family, sampling, latent.shape))
    alone = Axis("alone", [0], None, Ledger())
    strategy = RowParallel if isinstance(family, PlainFamily) else SequenceParallel
    predict = strategy(family, alone, AttentionCore(alone, alone, KERNELS["sdpa"])).predict
    answer = folder / f"{name}.host.safetensors"
    if not answer.exists():
        pytest.skip("this ComfyUI is older than the family")
    native = load_file(answer)
    torch.testing.assert_close(sampling.sigma(torch.tensor(host.timestep(family.name))), native["sigma"][0])
    with torch.inference_mode():
        denoised = Guidance(one_by_one(predict), sampling, alone, positive, [], 1.0).denoised(
            latent, native["sigma"][0]
        )
    error = (denoised - native["denoised"]).norm() / (latent - native["denoised"]).norm()
    assert error <= 1e-4
