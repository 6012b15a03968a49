"""Writes a tiny Qwen-Image pipeline with random weights, and its transformer as ComfyUI's single file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from paralleldit.parallel_backend.families.keys.qwen_image import REFERENCES_AT_ZERO
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .tiny_vaes import WAN
from .tiny_zimage import qwen_tokenizer

HEADS, HEAD_DIM, TEXT_WIDTH = 2, 128, 24


def tiny_transformer(edits: bool = False) -> QwenImageTransformer2DModel:
    """With the rotary axes of the published models. `edits`: of Edit 2511, whose references are at time 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT_WIDTH,
            zero_cond_t=edits,
        )
        for name, parameter in model.named_parameters():
            if "norm_" in name and parameter.ndim == 1:
                nn.init.normal_(parameter, 1.0, 0.2)
    return model.eval().requires_grad_(False)


def single_file(model: QwenImageTransformer2DModel) -> dict[str, torch.Tensor]:
    """Its tensors as ComfyUI has them: with a mark of Edit 2511."""
    marks = {REFERENCES_AT_ZERO: torch.empty(0)} if model.config["zero_cond_t"] else {}
    return {**{key: value.contiguous() for key, value in model.state_dict().items()}, **marks}


def write_original(file: Path, model: QwenImageTransformer2DModel) -> Path:
    save_file(single_file(model), file)
    return file


def write_text_encoder(folder: Path) -> None:
    """Of a Qwen2.5-VL whose vision is next to nothing, and a tokenizer."""
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    rotary = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": rotary,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [0],
        },
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "text_encoder")


def write_vae(folder: Path) -> None:
    AutoencoderKLQwenImage(**WAN | {"z_dim": 16}).save_pretrained(folder / "vae")


def write_pipeline(folder: Path, transformer: QwenImageTransformer2DModel) -> Path:
    """A diffusers folder for `ParallelDiTLoader`, `ParallelDiTTextEncode` and `ParallelDiTVAELoader`."""
    torch.manual_seed(0)
    write_text_encoder(folder)
    transformer.save_pretrained(folder / "transformer")
    write_vae(folder)
    index = {
        "_class_name": "QwenImagePipeline",
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
