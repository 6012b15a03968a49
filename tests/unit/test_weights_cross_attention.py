"""PixArt, HunyuanDiT, Wan and Z-Image loaded from any kind of file have every parameter of diffusers, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paralleldit.parallel_backend.engine.model import build_family
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.files import detect, open_checkpoint
from paralleldit.parallel_backend.weights.load import load_transformer
from paralleldit.tests.tiny_models import TINY_MODELS
from paralleldit.tests.unit.cross_attention_original_layout import Weights, original_weights
from safetensors.torch import save_file

HEADS = {"wan": 32}
"""Files without a config are taken to have 16, those of Wan heads of 128 channels: as wide as 32 of the tiny ones."""


MODELS = {
    "pixart-alpha": "pixart alpha",
    "pixart-sigma": "pixart sigma",
    "hunyuandit 1.1": "hunyuandit 1.1",
    "hunyuandit 1.2": "hunyuandit 1.2",
    "wan": "wan 2.1",
    "zimage": "z-image",
}


def make(name: str) -> Any:
    model = TINY_MODELS[MODELS[name]].make(HEADS.get(name, 16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def saved(form: str, model: Any, folder: Path) -> Path:
    weights = dict(model.state_dict())
    path = folder / "model.safetensors"
    match form:
        case "pipeline":
            model.save_pretrained(folder / "transformer")
            return folder
        case "diffusers file":
            save_file(weights, path)
        case "original":
            save_file(original_weights(weights), path)
        case "ComfyUI":
            original = original_weights(weights)
            if "t_block.1.weight" in original:
                original |= {"pos_embed": torch.zeros(1, 64, 8), "y_embedder.y_embedding": torch.zeros(120, 20)}
            save_file({f"model.diffusion_model.{name}": weight for name, weight in original.items()}, path)
    return path


@pytest.mark.parametrize("form", ["pipeline", "diffusers file", "original", "ComfyUI"])
@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_is_the_diffusers_model_bit_for_bit(name, form, tmp_path):
    model = make(name)
    path = saved(form, model, tmp_path)
    loaded = load_transformer(path, device="cpu")
    assert loaded.family == name.split()[0]
    expected = model.state_dict()
    assert loaded.module.state_dict().keys() == expected.keys()
    for key, weight in loaded.module.state_dict().items():
        assert torch.equal(weight, expected[key]), key
    guessed = {"sample_size", "interpolation_scale", "mlp_ratio", "num_attention_heads", "attention_head_dim"}
    guessed = guessed if form != "pipeline" else {}
    for key, value in loaded.config.items():
        assert value == model.config[key] or key in guessed, key
    assert build_family(loaded, path).name == loaded.family


def test_table_of_positions_tells_the_side_that_they_are_spread_over(tmp_path):
    path = saved("ComfyUI", make("pixart-sigma"), tmp_path)
    assert detect(open_checkpoint(path)).config["sample_size"] == 16


def test_folder_of_an_older_diffusers_is_known(tmp_path):
    path = saved("pipeline", make("pixart-alpha"), tmp_path)
    config = path / "transformer" / "config.json"
    config.write_text(config.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    assert detect(open_checkpoint(path)).family == "pixart-alpha"


# Forwards of diffusers that compute the time in the dtype that the weights are stored in.
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("wan", "zimage")])
def test_model_in_fp8_computes_as_its_weights_cast(name, tmp_path):
    tiny, model = TINY_MODELS[MODELS[name]], make(name)
    loaded = load_transformer(saved("pipeline", model, tmp_path), device="cpu", weight_dtype="fp8_e4m3fn")
    assert any(weight.dtype == torch.float8_e4m3fn for weight in loaded.module.state_dict().values())
    cast = {key: weight.to(model.state_dict()[key].dtype) for key, weight in loaded.module.state_dict().items()}
    model.load_state_dict(cast)
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    latent, condition = tiny.latent(draw, 2, 6, 4), tiny.condition(draw, 2, 4)
    with torch.inference_mode():
        assert torch.equal(tiny.denoise(loaded.module, latent, condition), tiny.denoise(model, latent, condition))


DAMAGED = {
    "odd number of blocks": (
        "hunyuandit 1.2",
        lambda weights: {key: weight for key, weight in weights.items() if not key.startswith("blocks.5.")},
        "5 blocks",
    ),
    "heads that do not divide": ("pixart-sigma", lambda weights: {**weights, **narrow(weights)}, "380 is not a mult"),
    "tensor missing": (
        "pixart-alpha",
        lambda weights: {key: weight for key, weight in weights.items() if key != "t_embedder.mlp.2.bias"},
        "1 missing: adaln_single.emb.timestep_embedder.linear_2.bias",
    ),
}


def narrow(weights: Weights) -> Weights:
    return {"x_embedder.proj.weight": weights["x_embedder.proj.weight"][:380].clone()}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_files_that_do_not_fit_are_named(name, damage, message, tmp_path):
    weights = damage(original_weights(dict(make(name).state_dict())))
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    with pytest.raises(UserError, match=message):
        load_transformer(path, device="cpu")
