"""Writes a tiny HunyuanVideo pipeline with random weights, and its transformer as ComfyUI's single file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel
from paralleldit.parallel_backend.families.keys.hunyuanvideo import HUNYUANVIDEO
from paralleldit.parallel_backend.text.recipes import HUNYUANVIDEO_ASKED, HUNYUANVIDEO_BEFORE, HUNYUANVIDEO_SYSTEM
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from .original_layout import originals_of
from .tiny_flux import clip_config, clip_tokenizer, write_vae

HEAD_DIM, POOLED_WIDTH = 128, 768
"""ComfyUI's loader takes them for given."""
TEXT_WIDTH, CLIP_LENGTH = 20, 77
SPECIAL = ("<pad>", "<unk>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def tiny_transformer() -> HunyuanVideoTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HunyuanVideoTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=HEAD_DIM,
            num_layers=1,
            num_single_layers=1,
            text_embed_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
        )
        for name, parameter in model.named_parameters():
            if "attn.norm" in name:
                nn.init.normal_(parameter, 1.0, 0.2)
    return model.eval().requires_grad_(False)


def write_original(file: Path, model: HunyuanVideoTransformer3DModel) -> Path:
    save_file(originals_of(HUNYUANVIDEO, model.state_dict()), file)
    return file


def write_pipeline(folder: Path, transformer: HunyuanVideoTransformer3DModel) -> Path:
    """A diffusers folder for `ParallelDiTLoader` and `ParallelDiTTextEncode`, with the VAE of a picture."""
    write_text_encoders(folder)
    transformer.save_pretrained(folder / "transformer")
    write_vae(folder, scaling_factor=0.476986)
    index = {
        "_class_name": "HunyuanVideoPipeline",
        "text_encoder": ["transformers", "LlamaModel"],
        "text_encoder_2": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "LlamaTokenizerFast"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_text_encoders(folder: Path) -> None:
    torch.manual_seed(0)
    llama, clip = llama_tokenizer(), clip_tokenizer()
    clip.model_max_length = CLIP_LENGTH
    llama.save_pretrained(folder / "tokenizer")
    clip.save_pretrained(folder / "tokenizer_2")
    LlamaModel(
        LlamaConfig(
            vocab_size=len(llama),
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).save_pretrained(folder / "text_encoder")
    config = clip_config(len(clip))
    config.hidden_size = config.projection_dim = POOLED_WIDTH
    config.max_position_embeddings = CLIP_LENGTH
    CLIPTextModel(config).save_pretrained(folder / "text_encoder_2")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Word by word. Before the prompt are as many as Llama 3 has, some of which stand in for what it cuts in two."""
    asked = HUNYUANVIDEO_ASKED.format(HUNYUANVIDEO_SYSTEM, "a red fox in snow!")
    pieces = dict.fromkeys((*SPECIAL, *re.findall(r"\w+|[^\w\s]+", asked)))
    words = {word: index for index, word in enumerate(pieces)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:])})
    before = HUNYUANVIDEO_ASKED.format(HUNYUANVIDEO_SYSTEM, "").removesuffix(SPECIAL[-1])
    missing, begin = HUNYUANVIDEO_BEFORE - len(fast(before).input_ids), SPECIAL[2]
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([begin] * missing + ["$A"]), special_tokens=[(begin, words[begin])]
    )
    return fast
