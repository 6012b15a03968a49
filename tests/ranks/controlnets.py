"""Tiny ControlNets of every kind, and what plain diffusers predicts with them in one process."""

from __future__ import annotations

import json

import torch
from diffusers import FluxControlNetModel, HunyuanDiT2DControlNetModel, SD3ControlNetModel
from paralleldit.parallel_backend.families.spec import joined
from paralleldit.parallel_backend.files.controlnet import STABILITY_RULES, TENCENT_RULES, XLABS_RULES
from paralleldit.tests.ranks.stale_flux import relative_error
from paralleldit.tests.tiny_models import TINY_MODELS
from safetensors.torch import save_file
from torch import nn

HEADS, HEIGHT, WIDTH, TEXT, BATCH = 4, 8, 6, 5, 2
CFG = 3.0
STRENGTHS = 0.8, -0.5
"""Of the two control pictures."""
FLUX = {
    "in_channels": 64,
    "attention_head_dim": 16,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}
NETS = {
    # model, ControlNet
    "flux": ("flux dev", lambda: FluxControlNetModel(num_layers=1, num_single_layers=1, **FLUX)),
    "flux double": ("flux schnell", lambda: FluxControlNetModel(num_layers=2, num_single_layers=0, **FLUX)),
    "flux union": (
        "flux dev",
        lambda: FluxControlNetModel(num_layers=1, num_single_layers=2, num_mode=4, guidance_embeds=True, **FLUX),
    ),
    "flux pixels": (
        "flux dev",
        lambda: FluxControlNetModel(
            num_layers=1,
            num_single_layers=0,
            patch_size=2,
            conditioning_embedding_channels=16,
            guidance_embeds=True,
            **FLUX,
        ),
    ),
    "sd3": ("sd3.5 medium", lambda: sd3_controlnet(zeros=True)),
    "sd3 image": (
        "sd3.5 medium",
        lambda: sd3_controlnet(
            zeros=False,
            joint_attention_dim=None,
            dual_attention_layers=(),
            qk_norm=None,
            pos_embed_type=None,
            use_pos_embed=False,
        ),
    ),
    "sd3 pooled": ("sd3.5 medium", lambda: sd3_controlnet(zeros=False)),
    "hunyuandit": (
        "hunyuandit 1.1",
        lambda: HunyuanDiT2DControlNetModel(
            num_attention_heads=HEADS,
            attention_head_dim=16,
            in_channels=4,
            patch_size=2,
            hidden_size=HEADS * 16,
            transformer_num_layers=6,
            mlp_ratio=2.0,
            cross_attention_dim=24,
            cross_attention_dim_t5=40,
            pooled_projection_dim=12,
            text_len=5,
            text_len_t5=7,
        ),
    ),
}
ORIGINAL = {
    "flux pixels": XLABS_RULES,
    "sd3 image": STABILITY_RULES,
    "hunyuandit": TENCENT_RULES,
}
"""ControlNets that are written in their makers' layout as well."""
UNUSED = {
    "sd3 image": {
        "pos_embed.proj.weight": torch.ones(HEADS * 16, 16, 2, 2),
        "pos_embed.proj.bias": torch.ones(HEADS * 16),
    }
}
"""An embedder of its own: Stability's code gives the network the tokens of the model's instead."""


def sd3_controlnet(zeros, **changes):
    config = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 24,
        "caption_projection_dim": HEADS * 16,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 9,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
        "force_zeros_for_pooled_projection": zeros,
    }
    return SD3ControlNetModel(**(config | changes))


def write(place):
    """Folders of the models and of the ControlNets, whose last layers are not zero as before a training."""
    for name, (model, build) in NETS.items():
        if not (place / model).exists():
            TINY_MODELS[model].make(HEADS).save_pretrained(place / model)
        with torch.random.fork_rng():
            torch.manual_seed(17)
            net = build()
            for key, parameter in net.named_parameters():
                if "controlnet_" in key or key.startswith(("input_block", "pos_embed_input")):
                    nn.init.normal_(parameter, std=0.2)
        net.save_pretrained(place / name)
        if name in ORIGINAL:
            write_original(net, ORIGINAL[name], place / f"{name} original", UNUSED.get(name, {}))


def write_original(net, rules, folder, unused):
    """The weights under their makers' names, and `unused` ones, with what they do not tell in a config."""
    folder.mkdir()
    weights, tensors = net.state_dict(), dict(unused)
    for rule in rules:
        for number in range(8) if "{i}" in rule.source else [0]:
            for suffix, own in rule.suffixes.items():
                keys = [joined(target, own).replace("{i}", str(number)) for target in rule.targets]
                if "{last}" not in rule.source and all(key in weights for key in keys):
                    fused = torch.cat([weights.pop(key) for key in keys])
                    tensors[joined(rule.source, suffix).replace("{i}", str(number))] = fused
    save_file(tensors | weights, folder / "controlnet.safetensors")
    (folder / "config.json").write_text(json.dumps({"attention_head_dim": 16}))


def inputs(model, pixels=False):
    """A latent, two control pictures (of `pixels`, or their latents), a positive and a negative condition."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tiny = TINY_MODELS[model]
    size = (tiny.spec.latents[0].channels, HEIGHT, WIDTH)
    pictures = draw(1, *size), draw(BATCH, *size)
    if pixels:
        pictures = tuple(torch.rand(rows, 3, HEIGHT * 8, WIDTH * 8, generator=generator) for rows in (1, BATCH))
    return draw(BATCH, *size), pictures, tiny.condition(draw, 1, TEXT), tiny.condition(draw, BATCH, TEXT + 3)


def modes_of(name):
    return (1, 3) if name == "flux union" else (None, None)


class Controlled:
    """A diffusers transformer that is called with the residuals of a diffusers ControlNet, as its pipelines do."""

    def __init__(self, transformer, net, family, pictures):
        self.transformer, self.net, self.family, self.pictures = transformer, net, family, pictures

    def __call__(self, *args, **kwargs):
        ran = [self.residuals(number, *args, **kwargs) for number in range(len(self.pictures))]
        if getattr(self.net, "context_embedder", self) is None:
            return self.with_last(ran, *args, **kwargs)
        added = {
            key: [sum(each) for each in zip(*(one[key] for one in ran), strict=True)] for key in ran[0] if ran[0][key]
        }
        return self.transformer(*args, **kwargs, **added)

    def with_last(self, ran, *args, **kwargs):
        """As Stability's own code: behind every block, also the last one, which diffusers leaves out."""
        added = [sum(each) for each in zip(*(one["block_controlnet_hidden_states"] for one in ran), strict=True)]
        last = self.transformer.transformer_blocks[-1]
        hook = last.register_forward_hook(lambda block, given, output: (output[0], output[1] + added[-1]))
        try:
            return self.transformer(*args, **kwargs, block_controlnet_hidden_states=added)
        finally:
            hook.remove()

    def residuals(self, number, *args, **kwargs):
        picture, strength = self.pictures[number], STRENGTHS[number]
        batch = BATCH
        told = {"conditioning_scale": strength, "return_dict": False}
        if self.family.spec.name == "flux":
            guided = self.net.config.guidance_embeds
            if self.net.input_hint_block is not None:
                told |= {"controlnet_cond": picture.expand(batch, -1, -1, -1)}
            else:
                tokens = picture.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
                told |= {"controlnet_cond": tokens.expand(batch, -1, -1)}
            mode = modes_of("flux union" if self.net.union else "flux")[number]
            double, single = self.net(
                **{**kwargs, "guidance": kwargs["guidance"] if guided else None},
                **told,
                controlnet_mode=None if mode is None else torch.full((batch, 1), mode),
            )
            return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        picture = picture.expand(batch, -1, -1, -1)
        if self.family.spec.name == "sd3":
            zeros = self.net.config.force_zeros_for_pooled_projection
            pooled = kwargs["pooled_projections"]
            own = kwargs | {"pooled_projections": torch.zeros_like(pooled) if zeros else pooled}
            if self.net.context_embedder is None:
                own |= {
                    "encoder_hidden_states": None,
                    "hidden_states": self.transformer.pos_embed(own["hidden_states"]),
                }
            return {"block_controlnet_hidden_states": self.net(**own, **told, controlnet_cond=picture)[0]}
        return {"controlnet_block_samples": self.net(*args, **kwargs, **told, controlnet_cond=picture)[0]}


def guided(folders, name):
    """What plain diffusers predicts with both control pictures, under both prompts."""
    model, _ = NETS[name]
    tiny = TINY_MODELS[model]
    latent, pictures, positive, negative = inputs(model, name == "flux pixels")
    transformer = tiny.make(HEADS)
    net = type(NETS[name][1]()).from_pretrained(folders / name)
    family = tiny.make_family(HEADS)
    shift, scale = 0.0 if name == "sd3" else family.latent.shift, family.latent.scale
    if name == "flux pixels":
        shift, scale = 0.5, 2.0
    seen = [(picture - shift) * scale for picture in pictures]
    controlled = Controlled(transformer, net, tiny.family, seen)
    sigma, sampling = torch.tensor(tiny.sigma), family.model_sampling(None)
    x = sampling.noise_scaling(sigma, torch.zeros_like(latent), family.process_in(latent))
    with torch.inference_mode():
        yes, no = (tiny.denoise(controlled, x, condition) for condition in (positive, negative))
        plain = tiny.denoise(transformer, x, positive)
    assert relative_error(yes, plain) > 0.02, "the ControlNet must matter"
    return family.process_out(no + CFG * (yes - no))
