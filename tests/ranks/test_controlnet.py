"""ControlNets in the ranks give what diffusers' own give in one process, in every layout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from paralleldit.parallel_backend.adapters.controlnet.nets import FluxControlNet
from paralleldit.parallel_backend.engine.engine import Engine
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol.messages import ControlNetRef, ControlUse, ModelRef, Predict, Sample
from paralleldit.tests.ranks import controlnets
from paralleldit.tests.ranks.controlnets import (
    BATCH,
    CFG,
    HEADS,
    HEIGHT,
    NETS,
    ORIGINAL,
    STRENGTHS,
    WIDTH,
    inputs,
    modes_of,
)
from paralleldit.tests.ranks.stale_flux import relative_error, run_of
from paralleldit.tests.tiny_models import CPU, TINY_MODELS, entry_of, run_prompt_of, tensors_of

STEPS, SEED = 3, 42
LAYOUTS = [
    Layout(),
    Layout(ulysses_degree=2),
    Layout(cfg_degree=2),
    Layout(tensor_degree=2),
    Layout(pipefusion_degree=2, num_patches=1),
    Layout(pipefusion_degree=2, num_patches=3, warmup_steps=STEPS),
    Layout(ulysses_degree=2, data_degree=2, weights="sharded"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("controlnets")
    controlnets.write(place)
    return place


def sampled(world, layout, name, folder, controls, sigmas, pictures=None, device=CPU):
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
    return Engine(torch.device(device)).handle(request, tensors, run_of(request)[0])[1]["latent"]


def refusal_of(world, *args):
    try:
        sampled(world, *args)
    except UserError as error:
        return str(error)


def two_controls(name, folder):
    net = ControlNetRef(path=str(folder / name))
    return [ControlUse(net=net, strength=each, mode=mode) for each, mode in zip(STRENGTHS, modes_of(name), strict=True)]


@pytest.fixture(scope="module")
def expected(folders):
    """What plain diffusers predicts, once for each ControlNet."""
    answers = {}

    def of(name):
        if name not in answers:
            answers[name] = controlnets.guided(folders, name)
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
        for answer in ranks.once(layout.ranks, sampled, layout, name, folders, controls, sigmas):
            error = relative_error(answer, expected(name))
            assert error <= 1e-5, layout


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_makers_own_layout_is_read_as_that_of_diffusers(ranks, folders, expected, name):
    net = ControlNetRef(path=str(folders / f"{name} original" / "controlnet.safetensors"))
    controls = [control.model_copy(update={"net": net}) for control in two_controls(name, folders)]
    sigmas = [TINY_MODELS[NETS[name][0]].sigma, 0.0]
    (answer,) = ranks.run(1, sampled, Layout(), name, folders, controls, sigmas)
    (same,) = ranks.once(1, sampled, Layout(), name, folders, two_controls(name, folders), sigmas)
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
        (other,) = ranks.once(1, sampled, Layout(), "flux", folders, controls, SIGMAS)
        assert relative_error(other, answer) > 1e-4
    for layout in (
        Layout(pipefusion_degree=2, num_patches=3, warmup_steps=4),
        Layout(pipefusion_degree=2, num_patches=1),
    ):
        for piped in ranks.run(2, sampled, layout, "flux", folders, [within], SIGMAS):
            assert relative_error(piped, answer) <= 1e-5


def test_a_control_that_never_works_changes_no_bit(ranks, folders):
    (plain,) = ranks.once(1, sampled, Layout(), "flux", folders, [], SIGMAS)
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
    "no ControlNet": ("flux", "flux dev", {}, None, "is a diffusion model; a ControlNet was asked for"),
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
        run_conditions=dict(zip(keys, map(run_prompt_of, (positive, negative)), strict=True)),
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


def predicted_with_nets(world, layout, name, folder, controls):
    """Guided by two prompts of a step that a sampler of the client asks for, and of another for which nothing is told
    again."""
    model, engine, keys = NETS[name][0], Engine(CPU), ("a" * 32, "b" * 32)
    latent, pictures, *conditions = inputs(model, name == "flux pixels")
    family = TINY_MODELS[model].make_family(HEADS)
    sampling, sigma = family.model_sampling(None), torch.tensor(TINY_MODELS[model].sigma)
    x = sampling.noise_scaling(sigma, torch.zeros_like(latent), family.process_in(latent))
    both = torch.cat((x, x))
    entries = [run_prompt_of(each).model_copy(update={"controls": tuple(controls)}) for each in conditions]
    request = Predict(
        id=1,
        model=ModelRef(path=str(folder / model)),
        layout=layout,
        run="c" * 32,
        conditions=keys,
        run_conditions=dict(zip(keys, entries, strict=True)),
    )
    step = {
        "latent": sampling.calculate_input(sigma, both),
        "timestep": sampling.timestep(sigma).float().expand(len(both)),
    }
    told = {f"{key}.0.control.{number}": each for key in keys for number, each in enumerate(pictures)}
    for key, condition in zip(keys, conditions, strict=True):
        told |= {place.replace("told", key): each for place, each in tensors_of("told", condition).items()}
    answers = []
    for asked, tensors in ((request, step | told), (request.model_copy(update={"run_conditions": {}}), step)):
        output = engine.handle(asked, tensors, run_of(asked)[0])[1]["prediction"]
        yes, no = sampling.denoised(output, both, sigma).chunk(2)
        answers.append(family.process_out(no + CFG * (yes - no)))
    return answers


@pytest.mark.parametrize("name", NETS)
def test_a_step_of_the_clients_sampler_with_controlnets_equals_diffusers(ranks, folders, expected, name):
    layouts = [Layout(ulysses_degree=2), Layout(cfg_degree=2), Layout(data_degree=2), Layout(tensor_degree=2)]
    for layout in [Layout(), *(layouts if name in ("flux", "sd3", "hunyuandit") else ())]:
        for answers in ranks.run(layout.ranks, predicted_with_nets, layout, name, folders, two_controls(name, folders)):
            for answer in answers:
                assert relative_error(answer, expected(name)) <= 1e-5, layout


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
