"""A video VAE in one file, in its original layout or that of diffusers, loads as diffusers has it."""

from __future__ import annotations

import re
from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers, convert_wan_vae_to_diffusers
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.vae.decode import decode
from paralleldit.parallel_backend.vae.encode import encode
from paralleldit.parallel_backend.vae.files.header import read_header
from paralleldit.parallel_backend.vae.load import load_vae
from safetensors.torch import save_file
from torch import Tensor, nn

ALONE = Axis("alone", [0], None, Ledger())
WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
WIDE = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "latent_channels": 4}
LTX_091 = {
    "latent_channels": 8,
    "block_out_channels": (8, 16, 32, 32),
    "decoder_block_out_channels": (16, 32, 64),
    "layers_per_block": (2, 1, 1, 1, 2),
    "decoder_layers_per_block": (2, 1, 3, 1),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (True, True, True, False),
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}
CONFIGS = {
    "Wan 2.1": ("AutoencoderKLWan", WAN),
    "Wan 2.2": (
        "AutoencoderKLWan",
        WAN
        | {
            "decoder_base_dim": 12,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        },
    ),
    "LTX-Video 0.9": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": (8, 16, 32, 32),
            "decoder_block_out_channels": (8, 16, 32, 32),
            "layers_per_block": (2, 1, 1, 1, 2),
            "decoder_layers_per_block": (2, 1, 1, 1, 2),
        },
    ),
    "LTX-Video 0.9.1": ("AutoencoderKLLTXVideo", LTX_091),
    "LTX-Video 0.9.5": (
        "AutoencoderKLLTXVideo",
        LTX_091
        | {
            "block_out_channels": (8, 16, 32, 64, 64),
            "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "spatio_temporal_scaling": (True,) * 4,
            "decoder_inject_noise": (False,) * 4,
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
    ),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", WIDE),
    "CogVideoX": (
        "AutoencoderKLCogVideoX",
        WIDE | {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4},
    ),
    "Mochi": (
        "AutoencoderKLMochi",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (32, 32, 64, 64),
            "decoder_block_out_channels": (32, 64, 64, 96),
            "layers_per_block": (2, 1, 1, 2, 1),
        },
    ),
}


def new_module(case: str) -> nn.Module:
    torch.manual_seed(3)
    name, config = CONFIGS[case]
    return getattr(diffusers, name)(**config).eval()


# -- the original layouts, written down independently of what loads them ---------------------------------------------

WAN_PARTS = {
    "norm1.": "residual.0.",
    "conv1.": "residual.2.",
    "norm2.": "residual.3.",
    "conv2.": "residual.6.",
    "conv_shortcut.": "shortcut.",
}
WAN_ENDS = {
    "quant_conv.": "conv1.",
    "post_quant_conv.": "conv2.",
    "encoder.conv_in.": "encoder.conv1.",
    "decoder.conv_in.": "decoder.conv1.",
}


def wan(name: str, nested: bool) -> str:
    for new, old in WAN_ENDS.items():
        if name.startswith(new):
            return name.replace(new, old)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"middle.{2 * int(match[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle.1")
    name = name.replace("norm_out", "head.0").replace("conv_out", "head.2")
    if match := re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.*)", name):
        side, way, level, rest = match[1], match[2], int(match[3]), match[4]
        last = 2 if side == "encoder" else 3
        rest = re.sub(r"^resnets\.", "", re.sub(r"^(up|down)sampler(s\.0)?\.", f"{last}.", rest))
        if nested:
            name = f"{side}.{way}samples.{level}.{way}samples.{rest}"
        elif side == "decoder":
            number, rest = rest.split(".", 1)
            name = f"decoder.upsamples.{4 * level + int(number)}.{rest}"
        else:
            name = f"encoder.downsamples.{level}.{rest}"
    if "resnets" in name or "samples" in name or "middle" in name:
        for new, old in WAN_PARTS.items():
            name = re.sub(rf"(?<=\d\.){re.escape(new)}", old, name)
    return name


LTX_09_ENCODER = (
    *("0", "0.downsamplers.0", "0.conv_out", "1", "1.downsamplers.0", "1.conv_out"),
    *("2", "2.downsamplers.0", "3", "mid"),
)
LTX_091_DECODER = ("mid", "0.upsamplers.0", "0", "1.upsamplers.0", "1", "2.upsamplers.0", "2")
LTX_BLOCKS = {
    "LTX-Video 0.9": (
        LTX_09_ENCODER,
        ("mid", "0", "1.upsamplers.0", "1", "2.conv_in", "2.upsamplers.0", "2", "3.conv_in", "3.upsamplers.0", "3"),
    ),
    "LTX-Video 0.9.1": (LTX_09_ENCODER, LTX_091_DECODER),
    "LTX-Video 0.9.5": (
        ("0", "0.downsamplers.0", "1", "1.downsamplers.0", "2", "2.downsamplers.0", "3", "3.downsamplers.0", "mid"),
        LTX_091_DECODER,
    ),
}


def ltx(name: str, case: str) -> str:
    ends = {"latents_mean": "mean-of-means", "latents_std": "std-of-means"}
    if name in ends:
        return f"per_channel_statistics.{ends[name]}"
    for side, blocks, order in zip(("encoder", "decoder"), ("down_blocks", "up_blocks"), LTX_BLOCKS[case], strict=True):
        for number, place in sorted(enumerate(order), key=lambda each: -len(each[1])):
            start = f"{side}.mid_block." if place == "mid" else f"{side}.{blocks}.{place}."
            if name.startswith(start):
                name = f"{side}.{blocks}.{number}.{name.removeprefix(start)}"
                name = name.replace("resnets", "res_blocks").replace("norm3", "norm3.norm")
                return name.replace("conv_shortcut.conv", "conv_shortcut")
    name = name.replace("decoder.time_embedder", "decoder.last_time_embedder")
    return name.replace("decoder.scale_shift_table", "decoder.last_scale_shift_table")


def ldm(name: str) -> str:
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{3 - int(match[1])}", name.replace("down_blocks", "down"))
    name = re.sub(r"(?<!mid_block)\.resnets\.", ".block.", name)
    name = re.sub(r"(up|down)samplers\.0", r"\1sample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
    name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
    name = re.sub(r"mid_block\.attentions\.0\.to_", "mid.attn_1.", name)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


MOCHI_ENDS = {
    "encoder.proj_in.": "encoder.layers.0.",
    "encoder.norm_out.norm_layer.": "encoder.output_norm.",
    "encoder.proj_out.": "encoder.output_proj.",
    "decoder.conv_in.": "decoder.blocks.0.0.",
    "decoder.proj_out.": "decoder.output_proj.",
}
MOCHI_BLOCKS = {
    "encoder.block_in.": ("encoder.layers.", 1),
    "encoder.down_blocks.0.": ("encoder.layers.3.layers.", 1),
    "encoder.down_blocks.1.": ("encoder.layers.4.layers.", 1),
    "encoder.down_blocks.2.": ("encoder.layers.5.layers.", 1),
    "encoder.block_out.": ("encoder.layers.", 6),
    "decoder.block_in.": ("decoder.blocks.0.", 1),
    "decoder.up_blocks.0.": ("decoder.blocks.1.blocks.", 0),
    "decoder.up_blocks.1.": ("decoder.blocks.2.blocks.", 0),
    "decoder.up_blocks.2.": ("decoder.blocks.3.blocks.", 0),
    "decoder.block_out.": ("decoder.blocks.4.", 0),
}
"""With 2, 1, 1, 2 and 1 layers per block: where its layers lie, and the number of the first."""
MOCHI_PARTS = {
    "norm1.norm_layer.": "stack.0.",
    "conv1.conv.": "stack.2.",
    "norm2.norm_layer.": "stack.3.",
    "conv2.conv.": "stack.5.",
    "norm_layer.": "attn_block.norm.",
    "to_out.0.": "attn_block.attn.out.",
    "to_": "attn_block.attn.",
}


def mochi(name: str) -> str:
    for new, old in MOCHI_ENDS.items():
        if name.startswith(new):
            return name.replace(new, old)
    block, (place, first) = next(each for each in MOCHI_BLOCKS.items() if name.startswith(each[0]))
    kind, rest = name.removeprefix(block).split(".", 1)
    if kind == "proj":
        return f"{place.removesuffix('blocks.')}proj.{rest}"
    if kind == "conv_in":
        return f"{place}0.{rest.removeprefix('conv.')}"
    number, rest = rest.split(".", 1)
    part = next(part for part in MOCHI_PARTS if rest.startswith(part))
    return f"{place}{first + int(number)}.{rest.replace(part, MOCHI_PARTS[part], 1)}"


def fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values in one."""
    whole = {name.replace(".attn.q.", ".attn.qkv."): tensor for name, tensor in state.items()}
    for name in [name for name in whole if ".attn.qkv." in name]:
        parts = [whole.pop(name.replace("qkv", part)) for part in ("k", "v")]
        whole[name] = torch.cat([whole[name], *parts])
    return whole


def original(case: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if case.startswith("Wan"):
        return {wan(name, "2.2" in case): tensor for name, tensor in state.items()}
    if case.startswith("LTX"):
        extra = {"per_channel_statistics.channel": torch.zeros(8), "per_channel_statistics.mean-of-stds": torch.ones(8)}
        return {ltx(name, case): tensor for name, tensor in state.items()} | extra
    if case == "Mochi":
        return fused({mochi(name): tensor for name, tensor in state.items()})
    return {
        ldm(name): tensor[..., None, None, None] if ".to_" in name and name.endswith("weight") else tensor
        for name, tensor in state.items()
    }


CONVERTERS: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "Wan 2.1": ("", convert_wan_vae_to_diffusers),
    "LTX-Video 0.9": ("vae.", convert_ltx_vae_checkpoint_to_diffusers),
    "LTX-Video 0.9.1": ("vae.", convert_ltx_vae_checkpoint_to_diffusers),
}


@pytest.mark.parametrize("case", CONVERTERS)
def test_these_are_the_layouts_that_diffusers_converts(case):
    state = new_module(case).state_dict()
    prefix, convert = CONVERTERS[case]
    converted = convert({prefix + name: tensor for name, tensor in original(case, state).items()})
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("case", CONFIGS)
@torch.no_grad()
def test_a_file_gives_the_module_that_it_holds(case, layout, tmp_path):
    module = new_module(case)
    state = module.state_dict()
    state = original(case, state) if layout == "original" else state
    prefix = "vae." if case.startswith("LTX") and layout == "original" else ""
    others = {"model.diffusion_model.patchify_proj.weight": torch.zeros(2)} if prefix else {}
    file = tmp_path / "vae.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()} | others, file)

    vae = load_vae(file, device="cpu", dtype=torch.float32)

    assert type(vae.module) is type(module)
    header = read_header(file)
    assert (header.scale, header.frames) == (vae.kind.scale(module.config), vae.kind.frames(module.config))
    loaded = vae.module.state_dict()
    assert loaded.keys() == module.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in module.state_dict().items())
    latent = torch.randn(1, vae.latent_channels, 2, 2, 2)
    video = torch.rand(1, vae.image_channels, 1 + vae.frames, vae.scale, vae.scale)
    more = [torch.full((1,), 0.05)] if vae.takes_timestep else []
    pictures = []
    for each in (vae.module, module):
        torch.manual_seed(0)  # of added noise
        pictures.append(each.decode(latent, *more).sample)
    # Where weights lie in memory changes the last bits of what is computed with them.
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-5)
    modes = [each.encode(video).latent_dist.mode() for each in (vae.module, module)]
    torch.testing.assert_close(*modes, rtol=0, atol=1e-5)


@torch.no_grad()
def test_qwen_images_single_file_is_read_as_the_wan_vae_that_it_is(tmp_path):
    torch.manual_seed(5)
    module = diffusers.AutoencoderKLQwenImage(**WAN).eval()
    file = tmp_path / "qwen_image_vae.safetensors"
    save_file({key: each.contiguous() for key, each in original("Wan 2.1", module.state_dict()).items()}, file)
    vae = load_vae(file, device="cpu", dtype=torch.float32)
    latent, picture = torch.randn(1, 4, 1, 3, 4), torch.rand(1, 3, 1, 24, 32) * 2 - 1
    found, encoded = vae.decode(latent), vae.encode(picture)
    torch.testing.assert_close(found, module.decode(latent).sample, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoded, module.encode(picture).latent_dist.mode(), rtol=0, atol=1e-6)


def test_a_file_that_lacks_blocks_is_named(tmp_path):
    state = original("Wan 2.1", new_module("Wan 2.1").state_dict())
    file = tmp_path / "vae.safetensors"
    save_file({name: tensor for name, tensor in state.items() if not name.startswith("encoder")}, file)
    with pytest.raises(UserError, match=r"looks like an AutoencoderKLWan, .*encoder\.conv_in\.weight"):
        read_header(file)


@pytest.mark.parametrize("named", [True, False], ids=["named", "bare"])
@pytest.mark.parametrize("side", ["decoder", "encoder"])
@torch.no_grad()
def test_a_file_with_one_side_works_in_its_direction(side, named, tmp_path):
    module, file = new_module("Mochi"), tmp_path / "vae.safetensors"
    state = original("Mochi", module.state_dict())
    bare = 0 if named else len(f"{side}.")
    save_file({name[bare:]: tensor.contiguous() for name, tensor in state.items() if name.startswith(side)}, file)

    vae = load_vae(file, device="cpu", dtype=torch.float32)

    header = read_header(file)
    assert header.sides == vae.sides == vae.on_meta().sides
    assert (header.scale, header.frames, vae.latent_channels, vae.image_channels) == (8, 6, 4, 3)
    latent, video = torch.randn(1, 4, 2, 2, 2), torch.rand(1, 7, 16, 16, 3)
    if side == "decoder":
        picture = module.decode(latent).sample.movedim(1, -1).add(1).div(2).clamp(0, 1)
        torch.testing.assert_close(decode(vae, latent, ALONE), picture, rtol=0, atol=1e-5)
        with pytest.raises(UserError, match=r"vae\.safetensors cannot encode: it holds no encoder"):
            encode(vae, video, ALONE)
    else:
        mode = module.encode(video.movedim(-1, 1) * 2 - 1).latent_dist.mode()
        torch.testing.assert_close(encode(vae, video, ALONE), mode, rtol=0, atol=1e-5)
        with pytest.raises(UserError, match=r"vae\.safetensors cannot decode: it holds no decoder"):
            decode(vae, latent, ALONE)
