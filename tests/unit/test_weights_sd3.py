"""Stable Diffusion 3 loaded from any kind of file has, bit for bit, the weights that diffusers' own loaders give it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.weights.load import load_transformer
from paralleldit.tests.tiny_sd3 import original_layout, tiny_transformer, write_original
from safetensors.torch import load_file, save_file

PREFIX = "model.diffusion_model."
VERSIONS: dict[str, dict[str, Any]] = {
    "3-medium": {},
    "3.5-large": {"qk_norm": "rms_norm"},
    "3.5-medium": {"dual": (0, 1), "qk_norm": "rms_norm"},
    "other heads": {"head_dim": 32, "qk_norm": "rms_norm"},
}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", PREFIX])
@pytest.mark.parametrize("version", VERSIONS)
def test_single_file_equals_diffusers_own_conversion(version: str, prefix: str, tmp_path: Path) -> None:
    file = write_original(tmp_path / "sd3.safetensors", tiny_transformer(**VERSIONS[version]))
    original = {key.removeprefix(PREFIX): value for key, value in load_file(file).items() if key.startswith(PREFIX)}
    if prefix != PREFIX:
        save_file({prefix + key: value for key, value in original.items()}, file)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    loaded = load_transformer(file, device="cpu")
    weights = loaded.module.state_dict()
    assert loaded.family == "sd3"
    assert weights.keys() == converted.keys()
    assert [name for name, value in converted.items() if not torch.equal(weights[name], value)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_folder_equals_from_pretrained(version: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_transformer(**VERSIONS[version]).to(dtype).save_pretrained(tmp_path / "transformer")
    stock: Any = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer", torch_dtype=dtype)
    loaded = load_transformer(tmp_path, device="cpu")
    weights = loaded.module.state_dict()
    assert loaded.weight_dtype == dtype
    assert weights.keys() == stock.state_dict().keys()
    assert [name for name, value in stock.state_dict().items() if not torch.equal(weights[name], value)] == []
    # Everything that shapes tell agrees with the configuration that the folder declares.
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in loaded.config.items()}
    declared = {name: list(value) if isinstance(value, tuple) else value for name, value in stock.config.items()}
    assert {name: declared[name] for name in told} == told


def test_positions_are_read_and_not_computed(tmp_path: Path) -> None:
    """Those of 3.5-medium would take gigabytes to compute, in every rank."""
    model = tiny_transformer()
    model.pos_embed.pos_embed.fill_(0.5)
    loaded = load_transformer(write_original(tmp_path / "sd3.safetensors", model), device="cpu")
    assert loaded.module.pos_embed.pos_embed.eq(0.5).all()
    swapped = sum(
        value.nbytes
        for name, value in model.state_dict().items()
        if name.startswith(("norm_out.", "transformer_blocks.2.norm1_context."))
    )
    assert loaded.bytes - loaded.shared_bytes == swapped


def without_last(weights: dict[str, torch.Tensor]) -> None:
    weights.pop("joint_blocks.2.context_block.adaLN_modulation.1.bias")


def without_middle(weights: dict[str, torch.Tensor]) -> None:
    for key in [key for key in weights if key.startswith("joint_blocks.1.")]:
        weights.pop(key)


def with_text_out(weights: dict[str, torch.Tensor]) -> None:
    weights["joint_blocks.2.context_block.mlp.fc1.bias"] = torch.ones(768)


def oblong(weights: dict[str, torch.Tensor]) -> None:
    weights["pos_embed"] = weights["pos_embed"][:, :-1].clone()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_last, "1 missing: transformer_blocks.2.norm1_context.linear.bias"),
        (without_middle, "Block joint_blocks.1 is missing"),
        (with_text_out, "1 unexpected: joint_blocks.2.context_block.mlp.fc1.bias"),
        (oblong, "143 positions are no square"),
    ],
)
def test_incomplete_file_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    weights = original_layout(tiny_transformer().state_dict())
    damage(weights)
    save_file(weights, tmp_path / "sd3.safetensors")
    with pytest.raises(UserError, match=message):
        load_transformer(tmp_path / "sd3.safetensors", device="cpu")
