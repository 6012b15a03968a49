"""A file that a loader cannot take is called what it is, with the node that takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.files import detect, open_checkpoint
from paralleldit.parallel_backend.files.controlnet import read_controlnet
from paralleldit.parallel_backend.files.ip_adapter import read_ip_adapter
from paralleldit.parallel_backend.vae.files.header import read_header
from safetensors.torch import save_file

MODEL, LORA, VAE = "a diffusion model", "Parallel LoRA", "Parallel VAE Loader"
FILES = {
    "kohya LoRA": (("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",), "a LoRA", LORA),
    "PEFT LoRA": (("transformer.transformer_blocks.0.attn.to_q.lora_A.weight",), "a LoRA", LORA),
    "XLabs LoRA": (("double_blocks.0.processor.proj_lora1.down.weight",), "a LoRA", LORA),
    "LoKr": (("lycoris_transformer_blocks_0_attn_to_q.lokr_w1",), "a LoRA", LORA),
    "IP-Adapter": (("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "an IP-Adapter", "Parallel IP-Adapter"),
    "ControlNet": (
        ("controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"),
        "a ControlNet",
        "ControlNet",
    ),
    "ControlNet of SDXL": (("control_model.input_blocks.0.0.weight",), "a ControlNet", "ControlNet"),
    "SDXL": (
        ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"),
        "Stable Diffusion XL",
        "ComfyUI's own loader",
    ),
    "SD 1.5": (
        ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.bias"),
        "Stable Diffusion 1",
        "ComfyUI's own loader",
    ),
    "Qwen-Image": (("txt_norm.weight", "img_in.weight"), "Qwen-Image", "ComfyUI's own loader"),
    "Flux.2": (("double_stream_modulation_img.lin.weight",), "Flux.2", "ComfyUI's own loader"),
    "Z-Image": (("model.diffusion_model.cap_embedder.1.weight",), "Z-Image", "ComfyUI's own loader"),
    "LTX-Video": (("adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight"), "LTX-Video", "own"),
    "T5": (("encoder.block.0.layer.0.SelfAttention.q.weight",), "a T5 text encoder", "Load CLIP"),
    "CLIP": (("text_model.encoder.layers.0.self_attn.q_proj.weight",), "a CLIP text encoder", "Load CLIP"),
    "CLIP vision": (
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight",),
        "a CLIP vision model",
        "Load CLIP Vision",
    ),
    "Qwen 2.5": (
        ("model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"),
        "a language model",
        "Load CLIP",
    ),
    "VAE": (("decoder.up.0.block.0.conv1.weight", "decoder.mid.attn_1.q.weight"), "a VAE", VAE),
    "VAE of Wan": (("decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"), "a VAE", VAE),
    "ESRGAN": (("body.0.rdb1.conv1.weight",), "an upscale model", "Load Upscale Model"),
}
"""Some of a file's keys, what it is called, and a word of what to do."""
LOADERS: dict[str, Callable[[Path], object]] = {
    MODEL: lambda path: detect(open_checkpoint(path)),
    "a VAE": read_header,
    "a ControlNet": read_controlnet,
    "an IP-Adapter": read_ip_adapter,
}


@pytest.mark.parametrize("wanted", LOADERS)
@pytest.mark.parametrize(("keys", "title", "remedy"), FILES.values(), ids=FILES)
def test_a_wrong_file_is_called_what_it_is(keys, title: str, remedy: str, wanted: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "file.safetensors")
    with pytest.raises(UserError) as refused:
        LOADERS[wanted](tmp_path / "file.safetensors")
    if wanted != title:
        assert title in refused.value.message
        assert wanted in refused.value.message
        assert remedy in refused.value.hint


def test_a_model_in_the_wrong_loader_is_one() -> None:
    """Whatever of the known families it is."""
    from paralleldit.parallel_backend.families.registry import FAMILIES
    from paralleldit.parallel_backend.files.recognise import kind_of

    for spec in FAMILIES.values():
        for landmarks in spec.landmarks.values():
            kind = kind_of([key for key in landmarks.values()])
            assert kind is None or "model" in kind.title, spec.name
