"""One rank on a CUDA device gives what the CPU gives, and plain diffusers: every family, kind of weights, and part."""

from __future__ import annotations

import pytest
import torch
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.sampling.driver import SamplingJob
from paralleldit.parallel_backend.sampling.driver import run as run_sampler
from paralleldit.parallel_backend.sampling.model_sampling import EpsPrediction, FluxFlow
from paralleldit.parallel_backend.sampling.samplers import SAMPLERS, NoiseKind
from paralleldit.parallel_backend.sampling.schedules import sigmas_for
from paralleldit.parallel_backend.text.encoders import load_text_encoders
from paralleldit.tests import tiny_flux
from paralleldit.tests.ranks import (
    controlnets,
    stale_families,
    test_controlnet,
    test_exact_layouts,
    test_ip_adapter,
    test_lora,
    test_vae_ranks,
)
from paralleldit.tests.ranks.stale_flux import relative_error
from paralleldit.tests.tiny_models import TINY_MODELS
from paralleldit.tests.tiny_vaes import CASES as VAES

pytestmark = pytest.mark.gpu

TOLERANCE = 3e-5
"""Relative, of a prediction in fp32, and ten times that of a run or a VAE: other kernels add up in other orders."""
SHAPE = test_exact_layouts.SHAPES[1]
MODELS = test_exact_layouts.WHOLE_RUNS
KINDS = [Layout(), Layout(weights="offloaded")]
DRAWS_NOISE = "AutoencoderKLLTXVideo (timestep)"
"""Its decoder draws noise where it computes, and a GPU draws other numbers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for model, tiny in TINY_MODELS.items():
        tiny.make(SHAPE[0]).save_pretrained(place / model)
    return place


def predicted(world, layout, cases, paths, dtype, device):
    torch.backends.cudnn.allow_tf32 = False
    return test_exact_layouts.guided_by_part(world, layout, cases, paths, dtype, device)


def plain(model):
    """What the stock diffusers forward predicts."""
    _, height, width, text, batch = SHAPE
    tiny = TINY_MODELS[model]
    latent, positive, negative = test_exact_layouts.make_inputs(model, height, width, text, batch)
    with torch.inference_mode():
        yes, no = (tiny.denoise(tiny.make(SHAPE[0]), latent, condition) for condition in (positive, negative))
    return no + test_exact_layouts.CFG * (yes - no)


@pytest.mark.parametrize("layout", KINDS, ids=str)
def test_a_prediction_equals_plain_diffusers(ranks, device, folder, layout):
    cases, paths = [(model, SHAPE) for model in TINY_MODELS], [folder / model for model in TINY_MODELS]
    (answers,) = ranks.run(1, predicted, layout, cases, paths, "auto", device)
    errors = {case[0]: relative_error(answer, plain(case[0])) for case, answer in answers.items()}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn"])
def test_rounded_weights_are_as_near_as_on_the_cpu(ranks, device, folder, dtype):
    cases, paths = [(model, SHAPE) for model in TINY_MODELS], [folder / model for model in TINY_MODELS]
    (exact,) = ranks.once(1, predicted, Layout(), cases, paths, "auto", "cpu")
    (on_cpu,) = ranks.run(1, predicted, Layout(), cases, paths, dtype, "cpu")
    answers = [ranks.run(1, predicted, layout, cases, paths, dtype, device)[0] for layout in KINDS]
    # The CPU computes with fp8 weights in fp32.
    more = 2e-2 if dtype == "fp8_e4m3fn" else 0.0
    limits = {case: 3 * relative_error(on_cpu[case], exact[case]) + more for case in cases}
    for answer in answers:
        errors = {case[0]: (relative_error(answer[case], exact[case]), limits[case]) for case in cases}
        assert all(error <= limit for error, limit in errors.values()), errors


WIDE = ("flux dev", (32, 32, 32, 16, 1))
"""With blocks that take a while to arrive from host memory."""


def test_blocks_have_arrived_when_they_are_used(ranks, device, tmp_path):
    TINY_MODELS["flux dev"].make(WIDE[1][0], depth=4).save_pretrained(tmp_path)
    resident, offloaded = (ranks.run(1, predicted, layout, [WIDE], [tmp_path], "bf16", device)[0] for layout in KINDS)
    assert relative_error(offloaded[WIDE], resident[WIDE]) <= 1e-2


@pytest.mark.parametrize("model", MODELS)
def test_a_run_equals_that_on_the_cpu(ranks, device, folder, model):
    (expected,) = ranks.run(1, stale_families.sampled, model, Layout(), folder / model)
    (latent,) = ranks.run(1, stale_families.sampled, model, Layout(), folder / model, device)
    assert relative_error(latent, expected) <= 10 * TOLERANCE


def stepped(world, device):
    """Each sampler over a model that is known exactly, with noise drawn on the CPU."""
    results = {}
    for sampling in (FluxFlow(), EpsPrediction()):
        for name, sampler in SAMPLERS.items():
            generator = torch.Generator().manual_seed(3)
            noise = torch.randn(2, 4, 6, 6, generator=generator).to(device)

            def draw(sigma, sigma_next, generator=generator):
                return torch.randn(2, 4, 6, 6, generator=generator).to(device)

            job = SamplingJob(
                sampler=name,
                model_sampling=sampling,
                sigmas=sigmas_for(sampling, "simple", 5, 1.0, name),
                noise=noise,
                latent=torch.zeros_like(noise),
                seed=3,
                mask=torch.ones(1, 1, 6, 6),
                noise_source=draw if sampler.noise is NoiseKind.GAUSSIAN else None,
            )
            denoised = run_sampler(lambda x, sigma, step: x / (1 + sigma.to(x.device) ** 2), job)
            results[type(sampling).__name__, name] = denoised.cpu()
    return results


def test_every_sampler_equals_itself_on_the_cpu(ranks, device):
    (expected,), (found,) = ranks.run(1, stepped, "cpu"), ranks.run(1, stepped, device)
    errors = {name: relative_error(found[name], latent) for name, latent in expected.items()}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("layout", KINDS, ids=str)
def test_a_lora_equals_merged_weights_and_leaves_no_trace(ranks, device, tmp_path_factory, layout):
    files = test_lora.Files(tmp_path_factory.mktemp("lora"))
    formats = [("flux dev", "diffusers", format) for format in test_lora.FORMATS]
    cases = [*formats, *((model, "diffusers", "kohya") for model in MODELS[1:])]
    merged = [(case[0], files.lora(*case)[1], ()) for case in cases]
    (expected,) = ranks.run(1, test_lora.predicted, Layout(), merged)
    beside = [(case[0], files.base(case[0]), (test_lora.LoraRef(path=str(files.lora(*case)[0])),)) for case in cases]
    if layout.weights != "whole":
        # What is no linear layer cannot be changed in a block that is sharded.
        beside, expected = beside[:1], expected[:1]
    (answers,) = ranks.run(1, test_lora.predicted, layout, beside, device)
    for case, (latent, _), (answer, is_as_before) in zip(cases, expected, answers, strict=False):
        assert relative_error(answer, latent) <= 2 * TOLERANCE, case
        assert is_as_before, case


@pytest.mark.parametrize("name", ["flux", "flux union", "flux pixels", "sd3", "sd3 image", "hunyuandit"])
def test_a_controlnet_equals_diffusers(ranks, device, tmp_path_factory, name):
    place = tmp_path_factory.getbasetemp() / "controlnets"
    if not place.exists():
        controlnets.write(place)
    controls = test_controlnet.two_controls(name, place)
    sigmas = [TINY_MODELS[controlnets.NETS[name][0]].sigma, 0.0]
    (answer,) = ranks.run(1, test_controlnet.sampled, Layout(), name, place, controls, sigmas, None, device)
    assert relative_error(answer, controlnets.guided(place, name)) <= 2 * TOLERANCE


@pytest.mark.parametrize("model", ["flux dev", "sd3.5 medium"])
def test_an_ip_adapter_equals_that_on_the_cpu(ranks, device, tmp_path, model):
    test_ip_adapter.write(tmp_path, model)
    given = (model, tmp_path, test_ip_adapter.prompts_of(model, tmp_path), [TINY_MODELS[model].sigma, 0.0])
    (expected,) = ranks.run(1, test_ip_adapter.sampled, Layout(), *given)
    (answer,) = ranks.run(1, test_ip_adapter.sampled, Layout(), *given, None, device)
    assert relative_error(answer, expected) <= TOLERANCE


def decoded(world, cases, device):
    torch.backends.cudnn.allow_tf32 = False
    return {case: test_vae_ranks.results(world, case, device) for case in cases}


def test_every_vae_equals_itself_on_the_cpu(ranks, device):
    (expected,), (found,) = ranks.run(1, decoded, list(VAES), "cpu"), ranks.run(1, decoded, list(VAES), device)
    errors = {
        (case, number): [
            relative_error(mine, truth)
            for mine, truth in [*zip(each, wanted, strict=True)][case == DRAWS_NOISE and device != "cpu" :]
        ]
        for case in VAES
        for number, (each, wanted) in enumerate(zip(found[case], expected[case], strict=True))
    }
    assert max(max(each) for each in errors.values()) <= 10 * TOLERANCE, errors


def encoded(world, folder, device):
    encoders = load_text_encoders(folder, device=device, dtype=torch.float32)
    return encoders.encode("A red circle beside a blue square.").tensors()


def test_a_prompt_is_encoded_as_on_the_cpu(ranks, device, tmp_path):
    tiny_flux.write_pipeline(tmp_path)
    (expected,), (found,) = ranks.run(1, encoded, tmp_path, "cpu"), ranks.run(1, encoded, tmp_path, device)
    assert {
        name: relative_error(found[name], tensor) <= TOLERANCE for name, tensor in expected.items()
    } == dict.fromkeys(expected, True)
