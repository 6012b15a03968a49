"""Tiny tokenizers and text encoders of the kinds Flux.1 uses: CLIP for the pooled vector, T5 for the sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Whitespace
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from .scenes import BACKGROUNDS, COLOURS, FILLS, NUMBERS, PATTERNS, POSITIONS, RELATIONS, SHAPES, SIZES, plural

CLIP_LENGTH = 32
T5_LENGTH = 24
WIDTH = 128
LAYERS = 2
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Every word a caption can hold, sorted."""
    said = [*SIZES, *FILLS, *COLOURS, *SHAPES, *map(plural, SHAPES), *NUMBERS.values(), *RELATIONS, *POSITIONS]
    said += ["an", "on", "background", *BACKGROUNDS, *PATTERNS]
    return sorted({word for phrase in said for word in phrase.split()})


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges make one token of each caption word; other text falls into pieces.

    The trainer numbers equally frequent pieces in another order in every process: weights go with the tokenizer that is
    saved beside them (`kept_clip_tokenizer`).
    """
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = Sequence([Whitespace(), ByteLevel(add_prefix_space=False)])
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        initial_alphabet=sorted(alphabet),
        special_tokens=[START, END],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator([" ".join(words())] * 4, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for letter in sorted(alphabet):
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    merges: Any = [tuple(merge) for merge in model["merges"]]  # annotated as text, taken as pairs
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def kept_clip_tokenizer(model: Path) -> CLIPTokenizer:
    """The tokenizer of the diffusers folder `model`; a new one where there is none yet."""
    folder = model / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder) if folder.is_dir() else clip_tokenizer()


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: the caption words, then single letters for everything else."""
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -2.0) for word in words()]
    known = {piece for piece, _ in pieces}
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?-'"
    pieces += [(letter, -10.0) for letter in letters if letter not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=cast(int, tokenizer.bos_token_id),
            eos_token_id=cast(int, tokenizer.eos_token_id),
            pad_token_id=cast(int, tokenizer.pad_token_id),
        )
    )


def new_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // 4,
            d_ff=2 * WIDTH,
            num_layers=LAYERS,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def token_ids(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int) -> torch.Tensor:
    """Ids `[B, length]`, padded as the Flux pipeline pads them."""
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
