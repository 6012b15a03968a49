"""Writes a tiny Wan 2.1 pipeline with random weights, and its transformer as ComfyUI's single file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from .tiny_flux import t5_tokenizer
from .tiny_vaes import WAN
from .unit.cross_attention_original_layout import original_weights

HEAD_DIM, TEXT_WIDTH = 128, 4096
"""ComfyUI's loader takes them for given."""


def tiny_transformer(heads: int = 2, text_width: int = TEXT_WIDTH) -> WanTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=HEAD_DIM,
            text_dim=text_width,
            ffn_dim=96,
            num_layers=2,
        )
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
            elif name.endswith("scale_shift_table"):
                parameter.data *= 4  # gates that let the attention through
    return model.eval().requires_grad_(False)


def write_original(file: Path, model: WanTransformer3DModel) -> Path:
    weights = original_weights(dict(model.state_dict()))
    save_file({f"model.diffusion_model.{key}": value.contiguous() for key, value in weights.items()}, file)
    return file


def write_pipeline(folder: Path, transformer: WanTransformer3DModel) -> Path:
    """A diffusers folder for `ParallelDiTLoader`, `ParallelDiTTextEncode` and `ParallelDiTVAELoader`."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    umt5 = UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(umt5).save_pretrained(folder / "text_encoder")
    transformer.save_pretrained(folder / "transformer")
    AutoencoderKLWan(**WAN | {"z_dim": 16}).save_pretrained(folder / "vae")
    index = {
        "_class_name": "WanPipeline",
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
