"""ControlNets in the ranks give what diffusers' own give in one process, in every layout."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxControlNetModel, HunyuanDiT2DControlNetModel, SD3ControlNetModel
from paralleldit.parallel_backend.adapters.controlnet import FluxControlNet
from paralleldit.parallel_backend.engine import Engine
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout import Layout
from paralleldit.parallel_backend.protocol.messages import Control, ControlNetRef, ModelRef, Predict, Sample
from paralleldit.parallel_backend.weights.controlnet import STABILITY_RULES, TENCENT_RULES, XLABS_RULES
from paralleldit.parallel_backend.weights.keymap import joined
from paralleldit.tests.ranks.stale_flux import relative_error, run_of
from paralleldit.tests.tiny_models import CPU, TINY_MODELS, entry_of, tensors_of
from safetensors.torch import save_file
from torch import nn

HEADS, HEIGHT, WIDTH, TEXT, BATCH = 4, 8, 6, 5, 2
CFG, STEPS, SEED, STRENGTH = 3.0, 3, 42, 0.8
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
LAYOUTS = [
    Layout(),
    Layout(ulysses_degree=2),
    Layout(cfg_degree=2),
    Layout(tensor_degree=2),
    Layout(pipefusion_degree=2, num_patches=1),
    Layout(pipefusion_degree=2, num_patches=3, warmup_steps=STEPS),
    Layout(ulysses_degree=2, data_degree=2, weights="sharded"),
]


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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of the models and the ControlNets, whose last layers are not zero as before a training."""
    place = tmp_path_factory.mktemp("controlnets")
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
            write_original(net, ORIGINAL[name], place / f"{name} original")
    return place


def write_original(net, rules, folder):
    """The weights under their makers' names, with what they do not tell in a config."""
    folder.mkdir()
    weights, tensors = net.state_dict(), {}
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
    size = (tiny.family.latent_channels, HEIGHT, WIDTH)
    pictures = draw(1, *size), draw(BATCH, *size)
    if pixels:
        pictures = tuple(torch.rand(rows, 3, HEIGHT * 8, WIDTH * 8, generator=generator) for rows in (1, BATCH))
    return draw(BATCH, *size), pictures, tiny.condition(draw, 1, TEXT), tiny.condition(draw, BATCH, TEXT + 3)


def sampled(world, layout, name, folder, controls, sigmas, pictures=None):
    """A guided run through the engine: from the tiny model's one noise level to none, or over `sigmas`."""
    model, _ = NETS[name]
    latent, drawn, positive, negative = inputs(model, name == "flux pixels")
    used = tuple(range(len(controls)))
    request = Sample(
        id=1,
        model=ModelRef(path=str(folder / model)),
        layout=layout,
        positive=(entry_of(positive).model_copy(update={"controls": used}),),
        negative=(entry_of(negative).model_copy(update={"controls": used}),),
        cfg=CFG,
        sampler="euler",
        schedule=None,
        seed=SEED,
        add_noise=False,
        controls=tuple(controls),
    )
    tensors = {"latent": latent, "sigmas": torch.tensor(sigmas), **tensors_of("positive", positive)}
    tensors |= tensors_of("negative", negative)
    tensors |= {f"control.{index}": picture for index, picture in enumerate(pictures or drawn)}
    return Engine(CPU).handle(request, tensors, run_of(request)[0])[1]["latent"]


def refusal_of(world, *args):
    try:
        sampled(world, *args)
    except UserError as error:
        return str(error)


def modes_of(name):
    return (1, 3) if name == "flux union" else (None, None)


def two_controls(name, folder):
    net = ControlNetRef(path=str(folder / name))
    strengths = (STRENGTH, -0.5)
    return [Control(net=net, strength=each, mode=mode) for each, mode in zip(strengths, modes_of(name), strict=True)]


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
        picture, strength = self.pictures[number], (STRENGTH, -0.5)[number]
        batch = BATCH
        told = {"conditioning_scale": strength, "return_dict": False}
        if self.family.name == "flux":
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
        if self.family.name == "sd3":
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


@pytest.fixture(scope="module")
def expected(folders):
    """What plain diffusers predicts with both control pictures, once for each ControlNet."""
    answers = {}

    def of(name):
        if name not in answers:
            model, _ = NETS[name]
            tiny = TINY_MODELS[model]
            latent, pictures, positive, negative = inputs(model, name == "flux pixels")
            transformer = tiny.make(HEADS)
            net = type(NETS[name][1]()).from_pretrained(folders / name)
            family = tiny.make_family(HEADS)
            shift, scale = 0.0 if name == "sd3" else family.latent_shift, family.latent_scale
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
            answers[name] = family.process_out(no + CFG * (yes - no))
        return answers[name]

    return of


@pytest.mark.parametrize("name", NETS)
def test_a_controlnet_equals_diffusers(ranks, folders, expected, name):
    layouts = LAYOUTS if name in ("flux", "flux union", "hunyuandit") else LAYOUTS[:3]
    if name in ("flux pixels", "sd3 image"):
        # What they begin with is made on the first stage alone.
        layouts = [LAYOUTS[0], LAYOUTS[1], LAYOUTS[4]]
    controls, sigmas = two_controls(name, folders), [TINY_MODELS[NETS[name][0]].sigma, 0.0]
    for layout in layouts:
        for answer in ranks.run(layout.ranks, sampled, layout, name, folders, controls, sigmas):
            error = relative_error(answer, expected(name))
            assert error <= 1e-5, layout


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_makers_own_layout_is_read_as_that_of_diffusers(ranks, folders, expected, name):
    net = ControlNetRef(path=str(folders / f"{name} original" / "controlnet.safetensors"))
    controls = [control.model_copy(update={"net": net}) for control in two_controls(name, folders)]
    sigmas = [TINY_MODELS[NETS[name][0]].sigma, 0.0]
    (answer,) = ranks.run(1, sampled, Layout(), name, folders, controls, sigmas)
    (same,) = ranks.run(1, sampled, Layout(), name, folders, two_controls(name, folders), sigmas)
    assert torch.equal(answer, same)
    assert relative_error(answer, expected(name)) <= 1e-5


@pytest.mark.parametrize(("pixels", "expected_double"), [(True, [0, 1, 0, 1, 0]), (False, [0, 0, 0, 1, 1])])
def test_residuals_of_xlabs_take_turns(pixels, expected_double):
    net = SimpleNamespace(
        module=SimpleNamespace(controlnet_blocks=[0] * 2, controlnet_single_blocks=[]),
        info=SimpleNamespace(takes_pixels=pixels),
    )
    family = SimpleNamespace(transformer=SimpleNamespace(transformer_blocks=[0] * 5, single_transformer_blocks=[0]))
    assert FluxControlNet.targets(net, family) == dict(enumerate(expected_double))


WINDOWS = [(0.0, 0.5), (0.3, 1.0), (0.4, 0.6)]
SIGMAS = [0.95, 0.8, 0.5, 0.2, 0.0]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_controlnet_works_in_its_part_of_the_run_alone(ranks, folders, window):
    (control,) = two_controls("flux", folders)[:1]
    start, end = window
    within = control.model_copy(update={"start": start, "end": end})
    (answer,) = ranks.run(1, sampled, Layout(), "flux", folders, [within], SIGMAS)
    for controls in ([control], []):
        (other,) = ranks.run(1, sampled, Layout(), "flux", folders, controls, SIGMAS)
        assert relative_error(other, answer) > 1e-4
    for layout in (
        Layout(pipefusion_degree=2, num_patches=3, warmup_steps=4),
        Layout(pipefusion_degree=2, num_patches=1),
    ):
        for piped in ranks.run(2, sampled, layout, "flux", folders, [within], SIGMAS):
            assert relative_error(piped, answer) <= 1e-5


def test_a_control_that_never_works_changes_no_bit(ranks, folders):
    (plain,) = ranks.run(1, sampled, Layout(), "flux", folders, [], SIGMAS)
    (control,) = two_controls("flux", folders)[:1]
    for changes in ({"strength": 0.0}, {"start": 1.0}, {"end": 0.0}):
        (answer,) = ranks.run(1, sampled, Layout(), "flux", folders, [control.model_copy(update=changes)], SIGMAS)
        assert torch.equal(answer, plain), changes


def test_patches_see_the_control_with_keys_of_the_step_before(ranks, folders):
    """Close to the exact run and not equal to it: what is old differs by one step."""
    controls = two_controls("flux", folders)
    sigmas = torch.linspace(0.9, 0.0, 9).tolist()
    (exact,) = ranks.run(1, sampled, Layout(), "flux", folders, controls, sigmas)
    layout = Layout(pipefusion_degree=2, num_patches=2, warmup_steps=2)
    one, other = ranks.run(2, sampled, layout, "flux", folders, controls, sigmas)
    assert torch.equal(one, other)
    assert 1e-6 < relative_error(one, exact) < 0.1


REFUSED = {
    "of another family": ("flux", "sd3", {}, None, "a ControlNet for sd3 models"),
    "union without a mode": ("flux union", "flux union", {"mode": None}, None, "4 kinds"),
    "mode beyond": ("flux union", "flux union", {"mode": 4}, None, "the mode is 4"),
    "mode of no union": ("flux", "flux", {"mode": 1}, None, "no union"),
    "no ControlNet": ("flux", "flux dev", {}, None, "no ControlNet that is known"),
    "latent instead of pixels": ("flux", "flux pixels", {}, [torch.zeros(1, 16, HEIGHT, WIDTH)], "[2, 3, 64, 48]"),
    "picture of another size": ("flux", "flux", {}, [torch.zeros(1, 16, 2, 2)], "[1, 16, 2, 2]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(ranks, folders, case):
    name, file, changes, pictures, words = REFUSED[case]
    control = two_controls(name, folders)[0].model_copy(
        update={"net": ControlNetRef(path=str(folders / file)), **changes}
    )
    (text,) = ranks.run(1, refusal_of, Layout(), name, folders, [control], SIGMAS, pictures)
    assert words in (text or "")


def predicted(world, layout, model, path, residuals, tensors):
    """A step that a sampler of the client asks for, under two prompts at once."""
    latent, _, positive, negative = inputs(model)
    keys = ("a" * 32, "b" * 32)
    tiny = TINY_MODELS[model]
    sampling, sigma = tiny.make_family(HEADS).model_sampling(None), torch.tensor(tiny.sigma)
    request = Predict(
        id=1,
        model=ModelRef(path=str(path)),
        layout=layout,
        run="c" * 32,
        conditions=keys,
        told=dict(zip(keys, map(entry_of, (positive, negative)), strict=True)),
        residuals=residuals,
    )
    both = torch.cat((latent, latent))
    sent = {
        "latent": sampling.calculate_input(sigma, both),
        "timestep": sampling.timestep(sigma).float().expand(len(both)),
        **{f"residual.{number}": tensor for number, tensor in enumerate(tensors)},
    }
    for key, condition in zip(keys, (positive, negative), strict=True):
        sent |= {name.replace("told", key): each for name, each in tensors_of("told", condition).items()}
    output = Engine(CPU).handle(request, sent, run_of(request)[0])[1]["prediction"]
    return sampling.denoised(output, both, sigma)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(ulysses_degree=2), Layout(cfg_degree=2), Layout(data_degree=2)], ids=str
)
def test_residuals_of_the_clients_controlnets_are_added_where_comfyui_adds_them(ranks, folders, layout):
    generator = torch.Generator().manual_seed(8)
    tokens = HEIGHT * WIDTH // 4
    own, shared = (torch.randn(rows, tokens, HEADS * 16, generator=generator) for rows in (2 * BATCH, 1))
    for model, residuals, added in (
        (
            "flux dev",
            {"input": (0, 0), "output": (None, 1)},
            (("controlnet_block_samples", "dd"), ("controlnet_single_block_samples", "0s")),
        ),
        ("sd3.5 medium", {"output": (0, 1, 0)}, (("block_controlnet_hidden_states", "dsd0"),)),
        ("hunyuandit 1.1", {"output": (1, 0)}, (("controlnet_block_samples", "sd"),)),
    ):
        latent, _, *conditions = inputs(model)
        tiny = TINY_MODELS[model]
        transformer = tiny.make(HEADS)
        answers = ranks.run(layout.ranks, predicted, layout, model, folders / model, residuals, [own, shared])
        for number, condition in enumerate(conditions):
            rows = slice(number * BATCH, (number + 1) * BATCH)
            kinds = {"d": own[rows], "s": shared, "0": torch.zeros_like(shared)}

            def call(*args, kinds=kinds, added=added, transformer=transformer, **kwargs):
                given = {name: [kinds[kind] for kind in places] for name, places in added}
                return transformer(*args, **kwargs, **given)

            with torch.inference_mode():
                wanted = tiny.denoise(call, latent, condition)
            for answer in answers:
                assert relative_error(answer[rows], wanted) <= 1e-5, (model, number)


def test_old_keys_and_a_controlnet_are_refused(ranks, folders):
    controls = two_controls("flux", folders)
    for text in ranks.run(2, refusal_of, Layout(distrifusion_degree=2), "flux", folders, controls, SIGMAS):
        assert "distrifusion_degree=2" in text
