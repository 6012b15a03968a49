"""Writes a tiny Stable Diffusion 3 pipeline with random weights, and its transformer as the original single file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from .tiny_flux import CLIP_WIDTH, clip_config, clip_tokenizer, t5_config, t5_tokenizer, write_vae

TEXT_WIDTH, POOLED_WIDTH = 72, 2 * CLIP_WIDTH
PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
HEAD_DIM = 64
TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
"""Original name of a module -> the diffusers modules whose rows it holds, in order. Written down apart from the
product's table, by reading the two modules side by side."""


def tiny_transformer(
    heads: int = 3,
    head_dim: int = HEAD_DIM,
    layers: int = 3,
    dual: tuple[int, ...] = (),
    qk_norm: str | None = None,
    side: int = 12,
) -> SD3Transformer2DModel:
    """Three blocks by default, the last of which gives no text; `side`: rows and columns that have positions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SD3Transformer2DModel(
            sample_size=16,
            num_layers=layers,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=heads * head_dim,
            pooled_projection_dim=POOLED_WIDTH,
            pos_embed_max_size=side,
            dual_attention_layers=dual,
            qk_norm=qk_norm,
        )
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=float(".norm_" in name), std=0.05)
    return model.eval().requires_grad_(False)


def original_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under their original names, fused as in the original model."""
    layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks."))
    sources = TOP | {
        f"joint_blocks.{i}.{name}": " ".join(f"transformer_blocks.{i}.{target}" for target in targets.split())
        for i in range(layers)
        for name, targets in BLOCK.items()
    }
    original = {"pos_embed": weights["pos_embed.pos_embed"]}
    for source, targets in sources.items():
        for suffix in ("weight", "bias"):
            parts = [weights[key] for target in targets.split() if (key := f"{target}.{suffix}") in weights]
            if parts:
                original[f"{source}.{suffix}"] = torch.cat(parts)
    last = f"joint_blocks.{layers - 1}.context_block.adaLN_modulation.1"
    for source, target in (("final_layer.adaLN_modulation.1", "norm_out.linear"), (last, None)):
        for suffix in ("weight", "bias"):
            key = f"{source}.{suffix}"
            scale, shift = (weights[f"{target}.{suffix}"] if target else original[key]).chunk(2)
            original[key] = torch.cat([shift, scale])
    return original


def write_original(file: Path, model: SD3Transformer2DModel) -> Path:
    """As the published single files: with a prefix, and beside parts of a text encoder and a VAE."""
    named = {f"model.diffusion_model.{key}": value for key, value in original_layout(model.state_dict()).items()}
    named["text_encoders.clip_l.transformer.text_model.final_layer_norm.weight"] = torch.ones(8)
    named["first_stage_model.decoder.conv_in.bias"] = torch.ones(8)
    save_file({key: value.contiguous() for key, value in named.items()}, file)
    return file


def write_pipeline(folder: Path, transformer: SD3Transformer2DModel) -> Path:
    """A diffusers folder for `ParallelDiTLoader`, `ParallelDiTTextEncode` and `ParallelDiTVAELoader`."""
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for suffix in ("", "_2"):
        clip.save_pretrained(folder / f"tokenizer{suffix}")
        CLIPTextModelWithProjection(clip_config(len(clip))).save_pretrained(folder / f"text_encoder{suffix}")
    t5.save_pretrained(folder / "tokenizer_3")
    T5EncoderModel(t5_config(len(t5), TEXT_WIDTH)).save_pretrained(folder / "text_encoder_3")
    transformer.save_pretrained(folder / "transformer")
    write_vae(folder, scaling_factor=1.5305, shift_factor=0.0609)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.30.0", **PARTS}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
