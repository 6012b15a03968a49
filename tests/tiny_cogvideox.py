"""Writes a tiny CogVideoX 1.5 pipeline with random weights, and its transformer as ComfyUI's single file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from paralleldit.parallel_backend.families.keys.cogvideox import COGVIDEOX15
from safetensors.torch import save_file
from torch import nn
from transformers import T5EncoderModel

from .original_layout import originals_of
from .tiny_flux import T5_WIDTH, t5_config, t5_tokenizer, write_vae


def tiny_transformer() -> CogVideoXTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=64,  # ComfyUI's loader takes it for given
            time_embed_dim=32,
            text_embed_dim=T5_WIDTH,
            num_layers=2,
            patch_size_t=2,
            use_rotary_positional_embeddings=True,
        )
        for name, parameter in model.named_parameters():
            if "attn1.norm" in name:
                nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    return model.eval().requires_grad_(False)


def write_original(file: Path, model: CogVideoXTransformer3DModel) -> Path:
    save_file(originals_of(COGVIDEOX15, model.state_dict()), file)
    return file


def write_pipeline(folder: Path, transformer: CogVideoXTransformer3DModel) -> Path:
    """A diffusers folder for `ParallelDiTLoader` and `ParallelDiTTextEncode`, with the VAE of a picture."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    T5EncoderModel(t5_config(len(tokenizer))).save_pretrained(folder / "text_encoder")
    transformer.save_pretrained(folder / "transformer")
    # By the width of the model, which is not that of 1.5's, ComfyUI takes the scale for that of 2B.
    write_vae(folder, scaling_factor=1.15258426)
    index = {
        "_class_name": "CogVideoXPipeline",
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
