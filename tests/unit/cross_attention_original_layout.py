"""The weights of diffusers' PixArt, HunyuanDiT, Wan and Z-Image under their original names, apart from the product's
tables."""

from __future__ import annotations

import re

import torch

Weights = dict[str, torch.Tensor]


def pixart_original(name: str) -> str:
    for pattern, source in (
        (r"pos_embed\.proj\.(\w+)", r"x_embedder.proj.\1"),
        (r"caption_projection\.linear_(\d)\.(\w+)", r"y_embedder.y_proj.fc\1.\2"),
        (r"adaln_single\.linear\.(\w+)", r"t_block.1.\1"),
        (r"adaln_single\.emb\.timestep_embedder\.linear_(\d)\.(\w+)", r"t_embedder.mlp.\1.\2"),
        (r"adaln_single\.emb\.resolution_embedder\.linear_(\d)\.(\w+)", r"csize_embedder.mlp.\1.\2"),
        (r"adaln_single\.emb\.aspect_ratio_embedder\.linear_(\d)\.(\w+)", r"ar_embedder.mlp.\1.\2"),
        (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
        (r"scale_shift_table", r"final_layer.scale_shift_table"),
        (r"transformer_blocks\.(\d+)\.scale_shift_table", r"blocks.\1.scale_shift_table"),
        (r"transformer_blocks\.(\d+)\.attn1\.to_[qkv]\.(\w+)", r"blocks.\1.attn.qkv.\2"),
        (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (r"transformer_blocks\.(\d+)\.attn2\.to_q\.(\w+)", r"blocks.\1.cross_attn.q_linear.\2"),
        (r"transformer_blocks\.(\d+)\.attn2\.to_[kv]\.(\w+)", r"blocks.\1.cross_attn.kv_linear.\2"),
        (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0\.(\w+)", r"blocks.\1.cross_attn.proj.\2"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    ):
        if re.fullmatch(pattern, name):
            source = re.sub(pattern, source, name)
            return re.sub(r"(_embedder\.mlp)\.(\d)", lambda found: f"{found[1]}.{2 * int(found[2]) - 2}", source)
    raise AssertionError(name)


def hunyuandit_original(name: str) -> str:
    name = name.removeprefix("time_extra_emb.")
    for pattern, source in (
        (r"pos_embed\.proj", "x_embedder.proj"),
        (r"text_embedder\.linear_1", "mlp_t5.0"),
        (r"text_embedder\.linear_2", "mlp_t5.2"),
        (r"timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"extra_embedder\.linear_1", "extra_embedder.0"),
        (r"extra_embedder\.linear_2", "extra_embedder.2"),
        (r"norm1\.linear", "default_modulation.1"),
        (r"norm1\.norm", "norm1"),
        (r"attn1\.to_[qkv]\.", "attn1.Wqkv."),
        (r"attn2\.to_[kv]\.", "attn2.kv_proj."),
        (r"attn2\.to_q\.", "attn2.q_proj."),
        (r"to_out\.0", "out_proj"),
        (r"norm_([qk])\.", r"\1_norm."),
        (r"ff\.net\.0\.proj", "mlp.fc1"),
        (r"ff\.net\.2", "mlp.fc2"),
        (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"^proj_out", "final_layer.linear"),
    ):
        name = re.sub(pattern, source, name)
    return re.sub(r"\.norm([23])\.", lambda found: f".norm{5 - int(found[1])}.", name)


def wan_original(name: str) -> str:
    for pattern, source in (
        (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"^condition_embedder\.time_proj", "time_projection.1"),
        (r"^proj_out", "head.head"),
        (r"^scale_shift_table", "head.modulation"),
        (r"scale_shift_table$", "modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"\.norm2\.", ".norm3."),
    ):
        name = re.sub(pattern, source, name)
    return name


def zimage_original(name: str) -> str:
    name = re.sub(r"^all_(x_embedder|final_layer)\.2-1\.", r"\1.", name)
    name = re.sub(r"\.to_[qkv]\.", ".qkv.", name).replace(".to_out.0.", ".out.")
    return re.sub(r"\.norm_([qk])\.", r".\1_norm.", name)


def original_weights(weights: Weights) -> Weights:
    """Fused in the order q, k, v."""
    marks = {
        "adaln_single.linear.weight": pixart_original,
        "condition_embedder.time_proj.weight": wan_original,
        "cap_pad_token": zimage_original,
    }
    of = next((names for mark, names in marks.items() if mark in weights), hunyuandit_original)
    original: Weights = {}
    for name, weight in weights.items():
        source = of(name)
        if name.startswith("norm_out.linear"):
            weight = torch.cat(weight.chunk(2)[::-1])
        original[source] = torch.cat([original[source], weight]) if source in original else weight
    return original
