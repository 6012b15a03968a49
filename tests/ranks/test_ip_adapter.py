"""IP-Adapters in the ranks give what diffusers' own give in one process, in every layout."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from paralleldit.parallel_backend.engine.engine import Engine
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol.messages import ImagePromptUse, IPAdapterRef, ModelRef, Predict, Sample
from paralleldit.tests.ranks.stale_flux import relative_error, run_of
from paralleldit.tests.tiny_models import CPU, TINY_MODELS, entry_of, run_prompt_of, tensors_of
from safetensors.torch import save_file

HEADS, HEIGHT, WIDTH, TEXT, BATCH = 4, 8, 6, 5, 2
HIDDEN = HEADS * 16
CFG, SEED, WEIGHT = 3.0, 42, 0.8
PICTURES = {"flux": (20,), "sd3": (7, 28)}
"""Shapes of a picture's embedding."""
SD3_NAMES = {
    r"layers\.(\d+)\.ln0": r"layers.\1.0.norm1",
    r"layers\.(\d+)\.ln1": r"layers.\1.0.norm2",
    r"layers\.(\d+)\.attn\.to_out\.0": r"layers.\1.0.to_out",
    r"layers\.(\d+)\.attn\.": r"layers.\1.0.",
    r"layers\.(\d+)\.adaln_norm": r"layers.\1.1.0",
    r"layers\.(\d+)\.ff\.net\.0\.proj": r"layers.\1.1.1",
    r"layers\.(\d+)\.ff\.net\.2": r"layers.\1.1.3",
    r"layers\.(\d+)\.adaln_proj": r"layers.\1.2.1",
}
"""From diffusers' names to those in InstantX' file."""
MODELS = {"flux dev": "flux", "sd3.5 medium": "sd3", "sd3 medium": "sd3"}
LAYOUTS = [
    Layout(),
    Layout(ulysses_degree=2),
    Layout(ring_degree=2),
    Layout(tensor_degree=2),
    Layout(cfg_degree=2),
    Layout(pipefusion_degree=2, num_patches=3, warmup_steps=1),
    Layout(distrifusion_degree=2, warmup_steps=1),
    Layout(ulysses_degree=2, data_degree=2, weights="sharded"),
]


def flux_adapter(sites, seed, hidden=HIDDEN):
    """As diffusers takes it apart, of random weights."""
    draw = drawer(seed)
    return {
        "image_proj": {
            "proj.weight": draw(4 * 24, 20),
            "proj.bias": draw(4 * 24),
            "norm.weight": draw(24),
            "norm.bias": draw(24),
        },
        "ip_adapter": {
            f"{site}.to_{part}_ip.{leaf}": draw(*shape)
            for site in range(sites)
            for part in "kv"
            for leaf, shape in (("weight", (hidden, 24)), ("bias", (hidden,)))
        },
    }


def sd3_adapter(sites, seed, hidden=HIDDEN, head_dim=16):
    draw = drawer(seed)
    projection = IPAdapterTimeImageProjection(28, hidden, 32, heads=1, num_queries=6, timestep_in_dim=16)
    site = SD3IPAdapterJointAttnProcessor2_0(hidden, hidden, head_dim, timesteps_emb_dim=32)
    image_proj = {}
    for name, tensor in projection.state_dict().items():
        for ours, theirs in SD3_NAMES.items():
            name = re.sub(ours, theirs, name)
        image_proj[name] = draw(*tensor.shape)
    shapes = {f"{number}.{name}": each.shape for number in range(sites) for name, each in site.state_dict().items()}
    return {"image_proj": image_proj, "ip_adapter": {name: draw(*shape) for name, shape in shapes.items()}}


def drawer(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)


def xlabs_names(parts):
    """The file of XLabs' own, from which diffusers reads the same."""
    tensors = {f"ip_adapter_proj_model.{name}": tensor for name, tensor in parts["image_proj"].items()}
    for name, tensor in parts["ip_adapter"].items():
        site, layer, leaf = name.split(".")
        tensors[f"double_blocks.{site}.processor.ip_adapter_double_stream_{layer[3]}_proj.{leaf}"] = tensor
    return tensors


def adapters_of(model):
    """Two for Flux, of which one is named as XLabs does; one for SD3, as diffusers takes one."""
    tiny = TINY_MODELS[model].make_family(HEADS)
    if MODELS[model] == "sd3":
        return [sd3_adapter(len(tiny.prompt_sites), 1)]
    return [flux_adapter(2, seed) for seed in (2, 3)]


def write(place, model):
    """A model and its IP-Adapters."""
    TINY_MODELS[model].make(HEADS).save_pretrained(place / model)
    for number, parts in enumerate(adapters_of(model)):
        tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        save_file(xlabs_names(parts) if number else tensors, place / f"{model} {number}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the models and their IP-Adapters."""
    place = tmp_path_factory.mktemp("ip_adapters")
    for model in MODELS:
        write(place, model)
    return place


def inputs(model):
    """A latent, a picture for all and one for each, a positive and a negative condition."""
    draw, tiny = drawer(5), TINY_MODELS[model]
    shape = PICTURES[MODELS[model]]
    pictures = [3 * draw(1, *shape), 3 * draw(BATCH, *shape)][: len(adapters_of(model))]
    latent = draw(BATCH, tiny.spec.latents[0].channels, HEIGHT, WIDTH)
    return latent, pictures, tiny.condition(draw, 1, TEXT), tiny.condition(draw, BATCH, TEXT + 3)


def prompts_of(model, folder, **changes):
    refs = [
        IPAdapterRef(path=str(folder / f"{model} {number}.safetensors")) for number in range(len(adapters_of(model)))
    ]
    return tuple(ImagePromptUse(adapter=ref, weight=WEIGHT - number, **changes) for number, ref in enumerate(refs))


def sampled(world, layout, model, folder, prompts, sigmas, pictures=None, device=CPU):
    """A guided run: from the tiny model's one noise level to none, or over `sigmas`."""
    latent, drawn, positive, negative = inputs(model)
    pictures = drawn if pictures is None else pictures
    request = Sample(
        id=1,
        model=ModelRef(path=str(folder / model)),
        layout=layout,
        positive=(entry_of(positive).model_copy(update={"image_prompts": prompts}),),
        negative=(entry_of(negative).model_copy(update={"image_prompts": prompts}),),
        cfg=CFG,
        sampler="euler",
        schedule=None,
        seed=SEED,
        add_noise=False,
    )
    tensors = {"latent": latent, "sigmas": torch.tensor(sigmas), **tensors_of("positive", positive)}
    tensors |= tensors_of("negative", negative)
    for number, picture in enumerate(pictures[: len(prompts)]):
        tensors |= {f"positive.0.image.{number}": picture, f"negative.0.image.{number}": torch.zeros_like(picture)}
    return Engine(torch.device(device)).handle(request, tensors, run_of(request)[0])[1]["latent"]


def shown_to_diffusers(model):
    """The plain transformer with its IP-Adapters, called with pictures as diffusers' pipelines do."""
    transformer, adapters = TINY_MODELS[model].make(HEADS), adapters_of(model)
    transformer._load_ip_adapter_weights(adapters if MODELS[model] == "flux" else adapters[0], low_cpu_mem_usage=False)
    for processor in transformer.attn_processors.values():
        weights = [WEIGHT - number for number in range(len(adapters))]
        processor.scale = weights if MODELS[model] == "flux" else weights[0]

    def with_pictures(pictures):
        def call(*args, **kwargs):
            rows = [picture.expand(BATCH, *picture.shape[1:]) for picture in pictures]
            shown = [each.unsqueeze(1) for each in rows] if MODELS[model] == "flux" else rows[0]
            return transformer(*args, **kwargs, joint_attention_kwargs={"ip_adapter_image_embeds": shown})

        return call

    return with_pictures


def predictions(model):
    """What plain diffusers predicts under both prompts."""
    tiny, with_pictures = TINY_MODELS[model], shown_to_diffusers(model)
    latent, pictures, positive, negative = inputs(model)
    family = tiny.make_family(HEADS)
    sigma = torch.tensor(tiny.sigma)
    x = family.model_sampling(None).noise_scaling(sigma, torch.zeros_like(latent), family.process_in(latent))
    with torch.inference_mode():
        yes = tiny.denoise(with_pictures(pictures), x, positive)
        no = tiny.denoise(with_pictures([torch.zeros_like(each) for each in pictures]), x, negative)
        plain = tiny.denoise(tiny.make(HEADS), x, positive)
    assert relative_error(yes, plain) > 0.02, "the picture must matter"
    return x, yes, no


@pytest.mark.parametrize("model", MODELS)
def test_an_ip_adapter_equals_diffusers(ranks, folder, model):
    _, yes, no = predictions(model)
    expected = TINY_MODELS[model].make_family(HEADS).process_out(no + CFG * (yes - no))
    prompts, sigmas = prompts_of(model, folder), [TINY_MODELS[model].sigma, 0.0]
    for layout in LAYOUTS if model != "sd3 medium" else LAYOUTS[:1]:
        for answer in ranks.run(layout.ranks, sampled, layout, model, folder, prompts, sigmas):
            assert relative_error(answer, expected) <= 1e-5, layout


def predicted(world, layout, model, folder, x, prompts):
    """A step that a sampler of the client asks for, and another one for which nothing is told again."""
    _, pictures, positive, negative = inputs(model)
    keys, engine = ("a" * 32, "b" * 32), Engine(CPU)
    sampling, sigma = TINY_MODELS[model].make_family(HEADS).model_sampling(None), torch.tensor(TINY_MODELS[model].sigma)
    entries = [run_prompt_of(each).model_copy(update={"image_prompts": prompts}) for each in (positive, negative)]
    request = Predict(
        id=1,
        model=ModelRef(path=str(folder / model)),
        layout=layout,
        run="c" * 32,
        conditions=keys,
        run_conditions=dict(zip(keys, entries, strict=True)),
    )
    both = torch.cat((x, x))
    step = {
        "latent": sampling.calculate_input(sigma, both),
        "timestep": sampling.timestep(sigma).float().expand(len(both)),
    }
    told = {}
    for key, condition, factor in zip(keys, (positive, negative), (1, 0), strict=True):
        told |= {name.replace("told", key): each for name, each in tensors_of("told", condition).items()}
        told |= {f"{key}.0.image.{number}": factor * picture for number, picture in enumerate(pictures)}
    for asked, tensors in ((request, step | told), (request.model_copy(update={"run_conditions": {}}), step)):
        output = engine.handle(asked, tensors, run_of(asked)[0])[1]["prediction"]
    return sampling.denoised(output, both, sigma)


@pytest.mark.parametrize("model", ["flux dev", "sd3.5 medium"])
def test_a_step_of_comfyuis_own_samplers_sees_the_pictures(ranks, folder, model):
    x, yes, no = predictions(model)
    for layout in (Layout(cfg_degree=2), Layout(tensor_degree=2)):
        for answer in ranks.run(2, predicted, layout, model, folder, x, prompts_of(model, folder)):
            assert relative_error(answer, torch.cat((yes, no))) <= 1e-5, layout


SIGMAS = [0.95, 0.8, 0.5, 0.2, 0.0]


@pytest.mark.parametrize("model", ["flux dev", "sd3.5 medium"])
def test_an_ip_adapter_works_in_its_part_of_the_run_alone(ranks, folder, model):
    prompts = prompts_of(model, folder, start=0.4, end=0.6)
    (answer,) = ranks.run(1, sampled, Layout(), model, folder, prompts, SIGMAS)
    for others in (prompts_of(model, folder), ()):
        (other,) = ranks.run(1, sampled, Layout(), model, folder, others, SIGMAS)
        assert relative_error(other, answer) > 1e-4
    layout = Layout(pipefusion_degree=2, num_patches=1)
    for piped in ranks.run(2, sampled, layout, model, folder, prompts, SIGMAS):
        assert relative_error(piped, answer) <= 1e-5


def test_a_picture_without_weight_changes_no_bit(ranks, folder):
    (plain,) = ranks.run(1, sampled, Layout(), "flux dev", folder, (), SIGMAS)
    prompts = tuple(each.model_copy(update={"weight": 0.0}) for each in prompts_of("flux dev", folder))
    (answer,) = ranks.run(1, sampled, Layout(), "flux dev", folder, prompts, SIGMAS)
    assert torch.equal(answer, plain)


def refusal_of(world, *args):
    try:
        sampled(world, *args)
    except UserError as error:
        return str(error)


def test_what_does_not_fit_is_refused_by_name(ranks, folder):
    (prompt,) = prompts_of("sd3.5 medium", folder)
    other = prompt.model_copy(update={"adapter": IPAdapterRef(path=str(folder / "flux dev"))})
    for model, asked, picture, words in (
        ("flux dev", prompt, torch.zeros(1, 20), "an IP-Adapter for sd3 models"),
        ("sd3.5 medium", other, torch.zeros(1, 7, 28), "is a diffusion model; an IP-Adapter was asked for"),
        ("sd3.5 medium", prompt, torch.zeros(1, 28), "of the shape [1, 28]"),
        ("sd3.5 medium", prompt, torch.zeros(1, 7, 27), "width 28"),
    ):
        (text,) = ranks.run(1, refusal_of, Layout(), model, folder, (asked,), SIGMAS, [picture])
        assert words in (text or "")
