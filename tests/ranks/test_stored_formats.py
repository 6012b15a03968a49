"""Weights in every format, in every way to hold them, under every kind of LoRA: what their decoded numbers predict."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from paralleldit.parallel_backend.engine.engine import Engine
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol.messages import Adapters, LoraRef, ModelRef, Sample, Schedule
from paralleldit.tests.covering import covering, pairs
from paralleldit.tests.lora_files import FORMATS as LORAS
from paralleldit.tests.lora_files import merged
from paralleldit.tests.ranks.stale_flux import run_of
from paralleldit.tests.ranks.test_exact_layouts import make_inputs, relative_error
from paralleldit.tests.tiny_models import CPU, TINY_MODELS, entry_of, tensors_of
from safetensors.torch import save_file

MODEL, HEADS, SHAPE = "flux dev", 4, (8, 8, 5, 1)
"""Latent height and width, text tokens, batch."""
LAYOUTS = {
    "whole": Layout(),
    "staged": Layout(pipefusion_degree=2, num_patches=1),
    "sharded": Layout(ulysses_degree=2, weights="sharded"),
    "tensor-cut": Layout(tensor_degree=2),
    "tensor-cut and sharded": Layout(tensor_degree=2, ulysses_degree=2, weights="sharded"),
}
STRENGTH = 0.1
"""Of the LoRAs: what they would do at 1 to random weights is too much for half precision."""
ADAPTERS = (None, "kohya", "difference", "dora_of_inputs", "dora_of_outputs")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2}


def plain(dtype):
    def store(name, weight):
        return {name: weight.to(dtype)}, weight.to(dtype).float()

    return dtype, store


def fp8(dtype, scaled):
    def store(name, weight):
        if weight.ndim != 2:
            return {name: weight}, weight
        scale = weight.abs().max() / torch.finfo(dtype).max if scaled else torch.ones(())
        stored = {name: (weight / scale).to(dtype)}
        return stored | ({f"{name}_scale": scale} if scaled else {}), stored[name].float() * scale

    return torch.float32, store


STORED = {
    "fp32": plain(torch.float32),
    "fp16": plain(torch.float16),
    "bf16": plain(torch.bfloat16),
    "fp8_e4m3fn": fp8(torch.float8_e4m3fn, scaled=False),
    "fp8_e4m3fn scaled": fp8(torch.float8_e4m3fn, scaled=True),
    "fp8_e5m2 scaled": fp8(torch.float8_e5m2, scaled=True),
}
"""By format: what ranks on a CPU compute in, and `store(name, weight)`: tensors of a file, and their decoded weight."""


CASES = covering(product(LAYOUTS.values(), STORED, [kind for kind in ADAPTERS if kind]), pairs)
"""Which formats meet which kinds of LoRA in which layouts. Every format is predicted without a LoRA in every layout."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """By format and kind of LoRA: the model's folder, the LoRA's file, and a folder with both in plain fp32."""
    folder, made = tmp_path_factory.mktemp("formats"), {}
    transformer = TINY_MODELS[MODEL].make(HEADS, depth=1)
    for format, (_, store) in STORED.items():
        stored, decoded = {}, {}
        for name, weight in transformer.state_dict().items():
            tensors, decoded[name] = store(name, weight)
            stored |= tensors
        base = _write(transformer, stored, folder / format)
        layers = {key: f"transformer.{key.removesuffix('.weight')}" for key in decoded if decoded[key].ndim == 2}
        for kind in ADAPTERS:
            lora, changed = None, decoded
            if kind:
                torch.manual_seed(3)
                tensors, changed = merged(decoded, layers, LORAS[kind], STRENGTH)
                lora = folder / f"{format} {kind}.safetensors"
                save_file(tensors, lora)
            made[format, kind] = base, lora, _write(transformer, changed, folder / f"{format} with {kind}")
    return made


def _write(transformer, weights, folder):
    transformer.save_config(folder)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def predicted(world, layout, cases):
    """The latent after one step with each (model, LoRA), by one engine, which keeps a model from one to the next."""
    engine, answers = Engine(CPU), []
    latent, positive, _ = make_inputs(MODEL, *SHAPE)
    for path, lora in cases:
        request = Sample(
            id=1,
            model=ModelRef(path=str(path)),
            layout=layout,
            positive=(entry_of(positive),),
            sampler="euler",
            schedule=Schedule(scheduler="simple", steps=1),
            seed=42,
            adapters=Adapters(files=(LoraRef(path=str(lora), strength=STRENGTH),) if lora else ()),
        )
        tensors = {"latent": latent, **tensors_of("positive", positive)}
        answers.append(engine.handle(request, tensors, run_of(request)[0])[1]["latent"])
    return answers


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_stored_weights_predict_what_their_decoded_numbers_do(ranks, files, layout):
    (expected,) = ranks.once(1, predicted, Layout(), [(decoded, None) for _, _, decoded in files.values()])
    cases = []
    for format in STORED:
        kinds = [None, *(kind for kind in ADAPTERS if kind and (layout, format, kind) in CASES), None]
        for kind in kinds if len(kinds) > 2 else [None]:
            base, lora, _ = files[format, kind]
            cases.append((format, kind, base, lora))
    wanted = dict(zip(files, expected, strict=True))
    for answers in ranks.run(layout.ranks, predicted, layout, [case[2:] for case in cases]):
        plain = {}
        for (format, kind, *_), answer in zip(cases, answers, strict=True):
            error = relative_error(answer, wanted[format, kind])
            assert error <= TOLERANCES[STORED[format][0]], (format, kind, error)
            if kind is None:
                assert torch.equal(answer, plain.setdefault(format, answer)), f"{format} keeps a trace of a LoRA"
            else:
                assert not torch.equal(answer, plain[format]), (format, kind)
