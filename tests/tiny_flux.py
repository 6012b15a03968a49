"""Writes a tiny Flux pipeline with random weights: every part of a real one, seconds to make, a few megabytes."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

HEADS, HEAD_DIM = 6, 32
CLIP_WIDTH, T5_WIDTH = 32, 48
LENGTH = 16
PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def write_pipeline(folder: Path, *, guidance_embeds: bool = False) -> Path:
    """A diffusers folder for `ParallelDiTLoader`, `ParallelDiTTextEncode` and `ParallelDiTVAELoader`."""
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    clip.save_pretrained(folder / "tokenizer")
    t5.save_pretrained(folder / "tokenizer_2")
    CLIPTextModel(clip_config(len(clip))).save_pretrained(folder / "text_encoder")
    T5EncoderModel(t5_config(len(t5))).save_pretrained(folder / "text_encoder_2")
    FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
    ).save_pretrained(folder / "transformer")
    write_vae(folder, scaling_factor=0.3611, shift_factor=0.1159)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0", **PARTS}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_vae(folder: Path, latent_channels: int = 16, **scale: float) -> None:
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **scale,
    ).save_pretrained(folder / "vae")


def clip_config(tokens: int) -> CLIPTextConfig:
    """Of a text encoder for the `tokens` of `clip_tokenizer`: its special ones are the last two."""
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )


def t5_config(tokens: int, width: int = T5_WIDTH) -> T5Config:
    return T5Config(vocab_size=tokens, d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=2)


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0), *((letter, -10.0) for letter in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


if __name__ == "__main__":
    write_pipeline(Path(sys.argv[1]))
