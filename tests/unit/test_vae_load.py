"""A VAE loads from every layout that users have, and anything else is named for what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.vae.files.header import read_header
from paralleldit.parallel_backend.vae.load import load_vae
from paralleldit.tests import tiny_vaes
from paralleldit.tests.unit.vae_original_layout import original_state
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTHS = (32, 32, 64, 64)

# widths, layers per block, latent channels, quantisation convolutions, attention, prefix in the file, dtype of the file
ORIGINALS = {
    "flux": (WIDTHS, 2, 16, False, True, "", torch.float32),
    "flux in a checkpoint": (WIDTHS, 1, 16, False, True, "vae.", torch.bfloat16),
    "sd": (WIDTHS, 1, 4, True, True, "", torch.float16),
    "sd in a checkpoint": (WIDTHS, 1, 4, True, True, "first_stage_model.", torch.float32),
    "upscaler": ((32, 64, 64), 2, 4, True, True, "", torch.float32),
    "no attention": (WIDTHS, 1, 4, False, False, "", torch.float32),
}


def new_vae(widths=WIDTHS, layers: int = 1, latent: int = 4, quant: bool = False, attention: bool = True, groups=32):
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=layers,
        latent_channels=latent,
        norm_num_groups=groups,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=attention,
    ).eval()


@torch.no_grad()
def assert_same(ours: AutoencoderKL, theirs: AutoencoderKL) -> None:
    latent = torch.randn(1, theirs.config.latent_channels, 3, 2, generator=torch.Generator().manual_seed(1))
    image = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ours.decode(latent).sample, theirs.decode(latent).sample)
    assert torch.equal(ours.encode(image).latent_dist.mode(), theirs.encode(image).latent_dist.mode())


@pytest.mark.parametrize("case", ORIGINALS.values(), ids=ORIGINALS)
def test_an_original_file_equals_the_conversion_of_diffusers(case, tmp_path):
    widths, layers, latent, quant, attention, prefix, dtype = case
    state = {name: tensor.to(dtype) for name, tensor in original_state(*case[:5]).items()}
    file = tmp_path / "ae.safetensors"
    others = {"model.diffusion_model.out.weight": torch.zeros(2)} if prefix else {"loss.logvar": torch.zeros(())}
    save_file({prefix + name: tensor for name, tensor in state.items()} | others, file)
    expected = new_vae(widths, layers, latent, quant, attention)
    converted = convert_ldm_vae_checkpoint(
        state, {key: expected.config[key] for key in ("down_block_types", "up_block_types")}
    )
    expected.load_state_dict({name: tensor.float() for name, tensor in converted.items()})

    vae = load_vae(file, device="cpu", dtype=torch.float32)

    assert vae.latent_channels == latent
    assert vae.scale == 2 ** (len(widths) - 1)
    assert_same(vae.module, expected)


def as_pipeline_folder(vae: AutoencoderKL, place: Path) -> Path:
    vae.save_pretrained(place / "vae")
    return place


def as_vae_folder(vae: AutoencoderKL, place: Path) -> Path:
    vae.save_pretrained(place)
    return place


def as_shards(vae: AutoencoderKL, place: Path) -> Path:
    vae.save_pretrained(place, max_shard_size="100KB")
    assert len(list(place.glob("*.safetensors"))) > 1
    return place


def as_half_precision_variant(vae: AutoencoderKL, place: Path) -> Path:
    vae.save_pretrained(place, variant="fp16")
    return place


def as_file(vae: AutoencoderKL, place: Path) -> Path:
    vae.save_pretrained(place)
    return place / "diffusion_pytorch_model.safetensors"


def as_file_of_old_diffusers(vae: AutoencoderKL, place: Path) -> Path:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = vae.state_dict()
    for new, name in old.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in state.items()}
    save_file(state, place / "old.safetensors")
    return place / "old.safetensors"


@pytest.mark.parametrize(
    ("save", "groups"),
    [
        (as_pipeline_folder, 8),
        (as_vae_folder, 8),
        (as_shards, 8),
        (as_half_precision_variant, 8),
        (as_file, 32),
        (as_file_of_old_diffusers, 32),
    ],
)
def test_what_diffusers_saved_loads_unchanged(save: Callable, groups: int, tmp_path):
    expected = new_vae(groups=groups, quant=True)
    vae = load_vae(save(expected, tmp_path), device="cpu", dtype=torch.float32)
    assert_same(vae.module, expected)
    assert not vae.module.training


def test_weights_take_the_dtype_asked_for(tmp_path):
    vae = load_vae(as_vae_folder(new_vae(), tmp_path), device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in vae.module.parameters()} == {torch.bfloat16} == {vae.dtype}


@pytest.mark.parametrize("case", [case for case in tiny_vaes.CASES if "AutoencoderKL " not in case])
def test_a_folder_of_any_class_loads_unchanged(case, tmp_path):
    expected = tiny_vaes.new_vae(case)
    expected.module.save_pretrained(tmp_path)
    vae = load_vae(tmp_path, device="cpu", dtype=torch.float32)
    assert type(vae.module) is type(expected.module)
    state = expected.module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in vae.module.state_dict().items())
    assert not any(tensor.is_meta for tensor in (*vae.module.parameters(), *vae.module.buffers()))
    header = read_header(tmp_path)
    assert (header.scale, header.frames) == (vae.scale, vae.frames)


def edited_file(place: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    file = as_file(new_vae(), place)
    state = load_file(file)
    edit(state)
    save_file(state, file)
    return file


def edited_config(place: Path, **changes: object) -> Path:
    as_vae_folder(new_vae(), place)
    config = place / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return place


def empty_folder(place: Path) -> Path:
    (place / "transformer").mkdir()
    return place


def truncated(place: Path) -> Path:
    file = as_file(new_vae(), place)
    file.write_bytes(file.read_bytes()[:-100])
    return file


def video_vae(place: Path) -> Path:
    return edited_file(place, lambda state: state.update({"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3, 3)}))


BROKEN = {
    "missing": (lambda place: place / "absent.safetensors", "absent.safetensors"),
    "folder without a VAE": (empty_folder, "neither vae/config.json nor config.json"),
    "pickle": (lambda place: _write(place / "vae.ckpt", b"\x80\x02}q\x00."), "pickle"),
    "truncated": (truncated, "truncated"),
    "another model": (
        lambda place: _save(place / "taesd.safetensors", {"decoder.1.weight": torch.zeros(64, 4, 3, 3)}),
        "taesd.safetensors is not an image VAE",
    ),
    "video": (video_vae, "5 dimensions"),
    "decoder alone": (
        lambda place: edited_file(place, lambda state: [state.pop(key) for key in list(state) if key[:2] == "en"]),
        "no encoder",
    ),
    "tensor missing": (
        lambda place: edited_file(place, lambda state: state.pop("decoder.conv_norm_out.bias")),
        "lacks 1 of the VAE's .* decoder.conv_norm_out.bias",
    ),
    "tensor foreign": (
        lambda place: edited_file(place, lambda state: state.update({"bn.running_mean": torch.zeros(4)})),
        "holds 1 tensors .* bn.running_mean",
    ),
    "shape": (
        lambda place: edited_file(place, lambda state: state.update({"decoder.conv_in.bias": torch.zeros(5)})),
        r"decoder.conv_in.bias has the shape \[5\], expected was \[64\]",
    ),
    "unknown groups": (lambda place: as_file(new_vae((8, 16), groups=4), place), "8 channels .* 32 normalisation"),
    "another class": (lambda place: edited_config(place, _class_name="AutoencoderTiny"), "AutoencoderTiny"),
    "nonsense config": (lambda place: edited_config(place, block_out_channels=3), "describes no VAE"),
}


def _write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def _save(file: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, file)
    return file


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_vae_is_named(make: Callable[[Path], Path], message: str, tmp_path):
    with pytest.raises(UserError, match=message):
        load_vae(make(tmp_path), device="cpu", dtype=torch.float32)
