"""A tiny Flux.1 of random weights, and its weights under the names of the original model."""

import torch
from diffusers import FluxTransformer2DModel
from paralleldit.parallel_backend.families.keys.shapes import rotary_axes
from torch import nn

HIDDEN, HEAD_DIM = 64, 32

# Original name of a module -> the diffusers modules whose rows it holds, in order. Written down apart from the
# product's table, by reading the two modules side by side.
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}


def tiny_flux(guidance: bool = True, hidden: int = HIDDEN) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=hidden // HEAD_DIM,
        joint_attention_dim=24,
        pooled_projection_dim=40,
        guidance_embeds=guidance,
        axes_dims_rope=rotary_axes(HEAD_DIM),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def original_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under their original names, fused as in the original model."""
    sources = {f"{name}.{{}}": [f"{target}.{{}}"] for name, target in TOP.items()}
    for stem, target_stem, table in (
        ("double_blocks", "transformer_blocks", DOUBLE),
        ("single_blocks", "single_transformer_blocks", SINGLE),
    ):
        count = len({key.split(".")[1] for key in weights if key.startswith(f"{target_stem}.")})
        for i in range(count):
            for name, targets in table.items():
                sources[f"{stem}.{i}.{name}.{{}}"] = [f"{target_stem}.{i}.{target}.{{}}" for target in targets.split()]
    original = {}
    for source, targets in sources.items():
        for suffix in ("weight", "bias"):
            parts = [weights[target.format(suffix)] for target in targets if target.format(suffix) in weights]
            if parts:
                norm = source.endswith("_norm.{}")
                original[source.format("scale" if norm else suffix)] = torch.cat(parts)
    for suffix in ("weight", "bias"):
        scale, shift = weights[f"norm_out.linear.{suffix}"].chunk(2)
        original[f"final_layer.adaLN_modulation.1.{suffix}"] = torch.cat([shift, scale])
    return original
