"""Writes a tiny Z-Image pipeline with random weights, and its transformer as ComfyUI's single file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from .tiny_flux import write_vae
from .unit.cross_attention_original_layout import original_weights

HEADS, HEAD_DIM, TEXT_WIDTH = 11, 96, 20
"""ComfyUI's network has the layers of diffusers' at hidden sizes that are multiples of 96 and 1024 at least."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\\n{{ message.content }}<|im_end|>\\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)


def tiny_transformer() -> ZImageTransformer2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZImageTransformer2DModel(
            dim=HEADS * HEAD_DIM,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=HEADS,
            n_kv_heads=HEADS,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=(24, 36, 36),
            axes_lens=(1024, 512, 512),
        )
        for name, parameter in model.named_parameters():
            if "norm" in name or "pad" in name:
                nn.init.normal_(parameter, float("norm" in name), 0.2)
    return model.eval().requires_grad_(False)


def write_original(file: Path, model: ZImageTransformer2DModel) -> Path:
    weights = original_weights(dict(model.state_dict()))
    save_file({key: value.contiguous() for key, value in weights.items()}, file)
    return file


def write_pipeline(folder: Path, transformer: ZImageTransformer2DModel) -> Path:
    """A diffusers folder for `ParallelDiTLoader`, `ParallelDiTTextEncode` and `ParallelDiTVAELoader`."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    Qwen3Model(qwen_config(len(tokenizer))).save_pretrained(folder / "text_encoder")
    transformer.save_pretrained(folder / "transformer")
    write_vae(folder, scaling_factor=0.3611, shift_factor=0.1159)
    index = {
        "_class_name": "ZImagePipeline",
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def qwen_config(tokens: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=tokens,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Letter by letter."""
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
