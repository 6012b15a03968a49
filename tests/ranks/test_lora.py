"""LoRAs beside a model's layers give what a model gives that has them merged into its weights, in every layout."""

from __future__ import annotations

import json
from itertools import groupby

import pytest
import torch
from paralleldit.parallel_backend.adapters.lora.store import AdapterStore
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine.engine import Engine
from paralleldit.parallel_backend.engine.model import Transformer
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.files.states import FileStates
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.model_part import ModelPart
from paralleldit.parallel_backend.protocol.messages import Adapters, LoraRef, ModelRef, Predict, Sample, Schedule
from paralleldit.tests import tiny_sd3
from paralleldit.tests.covering import covering, pairs_of
from paralleldit.tests.lora_files import FORMATS, merged
from paralleldit.tests.ranks.stale_flux import run_of
from paralleldit.tests.ranks.test_exact_layouts import QuietRun, guided_by, make_inputs, relative_error
from paralleldit.tests.tiny_models import CPU, TINY_MODELS, entry_of, run_prompt_of, tensors_of
from paralleldit.tests.unit.cross_attention_original_layout import original_weights
from paralleldit.tests.unit.flux_original_layout import original_layout
from safetensors.torch import load_file, save_file

ORIGINAL = {
    "flux dev": original_layout,
    "sd3.5 medium": tiny_sd3.original_layout,
    "pixart alpha": original_weights,
    "hunyuandit 1.1": original_weights,
    "wan 2.1": original_weights,
    "z-image": original_weights,
}
HEADS = {"pixart alpha": 16, "wan 2.1": 32}
"""Of a model whose single file does not tell their number: of Wan's, it makes 3 of 128 channels."""
LAYOUTS = [
    Layout(),
    Layout(ulysses_degree=2),
    Layout(tensor_degree=2),
    Layout(tensor_degree=3),
    Layout(weights="offloaded"),
    Layout(tensor_degree=2, ulysses_degree=2, weights="sharded"),
]
THOROUGH = (LAYOUTS[0], LAYOUTS[2])
UNDERSCORED = "lora_unet_"
FUSED = ("qkv", "linear1", "kv_")
"""In the names of modules that are several in the ranks: lengths of their inputs would be those of all of them."""


def shape_of(model):
    return (HEADS.get(model, 4), 8, 8, 5, 2)


def in_original_names(model, weights):
    """The weights under their original names, and how a kohya file calls each matrix."""
    original = ORIGINAL[model](dict(weights))
    matrices = [key for key, weight in original.items() if weight.ndim in (2, 4) and key.endswith(".weight")]
    return original, {key: UNDERSCORED + key.removesuffix(".weight").replace(".", "_") for key in matrices}


def in_diffusers_names(model, weights):
    """The weights, and how a PEFT file calls each matrix."""
    matrices = [key for key, weight in weights.items() if weight.ndim in (2, 4) and key.endswith(".weight")]
    return dict(weights), {key: f"transformer.{key.removesuffix('.weight')}" for key in matrices}


NAMING = {"original": in_original_names, "diffusers": in_diffusers_names}


class Files:
    """A model without a LoRA, LoRAs for it, and the model with a LoRA merged into its weights."""

    def __init__(self, folder):
        self.folder = folder

    def base(self, model, naming="diffusers"):
        """A folder of diffusers', or a single file."""
        path = self.folder / f"{model} {naming}"
        if not path.exists():
            transformer = TINY_MODELS[model].make(shape_of(model)[0])
            if naming == "diffusers":
                transformer.save_pretrained(path)
            else:
                write_weights(ORIGINAL[model](transformer.state_dict()), path)
        return path

    def lora(self, model, naming, format, strength=1.0):
        """The path of the LoRA, and of the model with it."""
        path = self.folder / f"{model} {naming} {format} {strength}.safetensors"
        with_it = path.with_suffix(".merged.safetensors")
        if not path.exists():
            weights, names = NAMING[naming](model, TINY_MODELS[model].make(shape_of(model)[0]).state_dict())
            if format == "dora_of_inputs":
                names = {key: name for key, name in names.items() if not any(each in name for each in FUSED)}
            if format == "lokr":
                names = {key: name for key, name in names.items() if len(weights[key]) % 4 == 0}
            with torch.random.fork_rng():
                torch.manual_seed(3)
                tensors, changed = merged(weights, names, FORMATS[format], strength)
            save_file(tensors, path)
            if naming == "diffusers":
                transformer = TINY_MODELS[model].make(shape_of(model)[0])
                transformer.load_state_dict(changed)
                transformer.save_pretrained(with_it)
            else:
                write_weights(changed, with_it)
        return path, with_it


def write_weights(weights, path):
    save_file({key: weight.contiguous() for key, weight in weights.items()}, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("lora"))


def predicted(world, layout, cases, device=CPU):
    """For each case (model, its path, LoRA files): the prediction with them, and whether the one after is as before.

    Cases of one model file follow each other, and are one model's LoRAs in turn.
    """
    mesh = Mesh(layout)
    answers = []
    for (model, path), own in groupby(cases, key=lambda case: case[:2]):
        transformer, store = (
            Transformer(path, torch.device(device), part=ModelPart.of(layout, mesh)),
            AdapterStore(FileStates()),
        )

        def predict(loras, transformer=transformer, store=store, model=model):
            family = transformer.on(mesh)
            store.adapt(transformer, Adapters(files=tuple(loras)), QuietRun())
            return guided_by(family, mesh, model, shape_of(model))

        before = predict(())
        for _, _, loras in own:
            answers.append((predict(loras), torch.equal(before, predict(()))) if loras else (before, True))
    return answers


CASES = [
    *(("flux dev", "original", format) for format in FORMATS),
    *(("flux dev", "diffusers", format) for format in FORMATS),
    *((model, naming, format) for model in list(ORIGINAL)[1:] for naming in NAMING for format in ("kohya", "lokr")),
]


TABLE = [
    (layout, *case)
    for layout in LAYOUTS
    for case in CASES
    if layout in THOROUGH or case[2] in ("kohya", "dora_of_outputs")
]
COVERING = covering(TABLE, lambda row: pairs_of(*row), lambda row: row[0].ranks)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_lora_equals_merged_weights_and_leaves_no_trace(ranks, files, layout):
    cases = [case for of_layout, *case in COVERING if of_layout == layout]
    (expected,) = ranks.run(1, predicted, Layout(), [(case[0], files.lora(*case)[1], ()) for case in cases])
    adapted = [(case[0], files.base(*case[:2]), [LoraRef(path=str(files.lora(*case)[0]))]) for case in cases]
    for answers in ranks.run(layout.ranks, predicted, layout, adapted):
        for case, (answer, is_restored), (wanted, _) in zip(cases, answers, expected, strict=True):
            error = relative_error(answer, wanted)
            assert error <= 1e-5, case
            assert is_restored, case


def test_a_lora_changes_the_prediction(ranks, files):
    cases = [(model, files.base(model, "original"), ()) for model in ORIGINAL]
    (plain,) = ranks.run(1, predicted, Layout(), cases)
    with_lora = [(model, files.lora(model, "original", "kohya")[1], ()) for model in ORIGINAL]
    (changed,) = ranks.run(1, predicted, Layout(), with_lora)
    for model, (one, _), (other, _) in zip(ORIGINAL, plain, changed, strict=True):
        assert relative_error(one, other) > 0.05, model


def sampled(world, layout, path, loras, dtype="auto"):
    """A whole run of a Flux through the engine, from a file of the model and LoRA files."""
    (_, height, width, text, batch), model = shape_of("flux dev"), "flux dev"
    latent, positive, _ = make_inputs(model, height, width, text, batch)
    request = Sample(
        id=1,
        model=ModelRef(path=str(path), weight_dtype=dtype),
        layout=layout,
        positive=(entry_of(positive),),
        sampler="euler",
        schedule=Schedule(scheduler="simple", steps=3),
        seed=42,
        adapters=Adapters(files=tuple(loras)),
    )
    run, _ = run_of(request)
    return Engine(CPU).handle(request, {"latent": latent, **tensors_of("positive", positive)}, run)[1]["latent"]


def predicted_in_turn(world, layout, model, path, loras):
    """A prediction under each of the LoRAs, for one condition of one run of a client's sampler."""
    engine, key = Engine(CPU), "a" * 32
    latent, condition, _ = make_inputs(model, *shape_of(model)[1:])
    request = Predict(
        id=1,
        model=ModelRef(path=str(path)),
        layout=layout,
        run="c" * 32,
        conditions=(key,),
        run_conditions={key: run_prompt_of(condition)},
    )
    told = {name.replace("told", key): tensor for name, tensor in tensors_of("told", condition).items()}
    tensors = {"latent": latent, "timestep": torch.full((len(latent),), 500.0), **told}
    answers = []
    for files in loras:
        asked = request.model_copy(update={"adapters": Adapters(files=files)})
        answers.append(engine.handle(asked, tensors, run_of(asked)[0])[1]["prediction"])
        request, tensors = request.model_copy(update={"run_conditions": {}}), {name: tensors[name] for name in STEP}
    return answers


STEP = ("latent", "timestep")
"""What a sampler sends each time."""


@pytest.mark.parametrize("model", ORIGINAL)
def test_a_prompt_is_seen_with_the_lora_of_the_step(ranks, files, model):
    """As ComfyUI's hooks have it, whose LoRAs come and go within a run."""
    lora = (LoraRef(path=str(files.lora(model, "diffusers", "kohya")[0])),)
    args = Layout(), model, files.base(model)
    ((plain, adapted, after),) = ranks.run(1, predicted_in_turn, *args, [(), lora, ()])
    ((expected,),) = ranks.run(1, predicted_in_turn, *args, [lora])
    assert torch.equal(adapted, expected)
    assert torch.equal(after, plain)


STAGED = [
    Layout(pipefusion_degree=2, num_patches=1),
    Layout(pipefusion_degree=2, ulysses_degree=2, num_patches=1, weights="sharded"),
]


@pytest.mark.parametrize("layout", STAGED, ids=str)
def test_stages_hold_the_lora_of_their_blocks(ranks, files, layout):
    lora, with_it = files.lora("flux dev", "original", "kohya")
    (expected,) = ranks.once(1, sampled, Layout(), with_it, ())
    base = files.base("flux dev")
    for answer in ranks.run(layout.ranks, sampled, layout, base, [LoraRef(path=str(lora))]):
        assert relative_error(answer, expected) <= 1e-5


def test_stale_keys_are_the_same_with_a_lora_and_with_merged_weights(ranks, files):
    layout = Layout(pipefusion_degree=2, num_patches=3)
    lora, with_it = files.lora("flux dev", "original", "kohya")
    expected, _ = ranks.run(2, sampled, layout, with_it, ())
    answer, _ = ranks.run(2, sampled, layout, files.base("flux dev"), [LoraRef(path=str(lora))])
    assert relative_error(answer, expected) <= 1e-5


def answers_of_one_rank(world, cases):
    """For each case (model, path, dtype, list of LoRA files after each other): predictions, and what was logged."""
    mesh, results = Mesh(Layout()), []
    for model, path, dtype, steps in cases:
        transformer, store, run = Transformer(path, CPU, dtype), AdapterStore(FileStates()), LoggingRun()
        answers = []
        for loras in steps:
            family = transformer.on(mesh)
            try:
                store.adapt(transformer, Adapters(files=tuple(loras)), run)
                answers.append(guided_by(family, mesh, model, shape_of(model)))
            except UserError as error:
                answers.append(str(error))
        results.append((answers, run.lines))
    return results


class LoggingRun(QuietRun):
    def __init__(self):
        self.lines = []

    def log(self, level, text):
        self.lines.append(text)


def asked(ranks, *steps, path, model="flux dev", dtype="auto"):
    ((answers, lines),) = ranks.run(1, answers_of_one_rank, [(model, path, dtype, steps)])[0]
    return answers, lines


def test_strengths_add_up_and_may_be_negative(ranks, files):
    lora, _ = files.lora("flux dev", "original", "kohya")
    other, _ = files.lora("flux dev", "diffusers", "loha")
    half, double, none, both, opposite = (
        [LoraRef(path=str(lora), strength=0.5)] * 2,
        [LoraRef(path=str(lora), strength=0.25), LoraRef(path=str(lora), strength=0.75)],
        [LoraRef(path=str(lora), strength=0.0)],
        [LoraRef(path=str(lora)), LoraRef(path=str(other), strength=-2.0), LoraRef(path=str(other), strength=2.0)],
        [LoraRef(path=str(lora), strength=-0.3), LoraRef(path=str(lora), strength=1.3)],
    )
    answers, _ = asked(
        ranks, [LoraRef(path=str(lora))], half, double, both, opposite, none, [], path=files.base("flux dev")
    )
    for answer in answers[1:5]:
        assert relative_error(answer, answers[0]) <= 1e-5
    assert torch.equal(answers[5], answers[6])
    assert relative_error(answers[0], answers[6]) > 0.05


def test_a_dora_goes_as_far_as_its_strength(ranks, files):
    lora, with_it = files.lora("flux dev", "diffusers", "peft_dora", 0.4)
    (answer,), _ = asked(ranks, [LoraRef(path=str(lora), strength=0.4)], path=files.base("flux dev"))
    (expected,), _ = asked(ranks, [], path=with_it)
    assert relative_error(answer, expected) <= 1e-5


def test_strengths_of_blocks_are_those_of_the_blocks_own_loras(ranks, files, tmp_path):
    lora, _ = files.lora("flux dev", "diffusers", "peft")
    kept = {
        key: tensor
        for key, tensor in load_file(lora).items()
        if ".single_transformer_blocks.1." in key or "blocks" not in key
    }
    save_file(kept, tmp_path / "part.safetensors")
    by_block = LoraRef(path=str(lora), block_strengths=(0.0, 0.0, 0.0, 1.0))
    part = LoraRef(path=str(tmp_path / "part.safetensors"))
    short = LoraRef(path=str(lora), block_strengths=(1.0, 1.0))
    (one, other, refusal), _ = asked(ranks, [by_block], [part], [short], path=files.base("flux dev"))
    assert relative_error(one, other) <= 1e-6
    assert "2 block strengths" in refusal
    assert "4 blocks" in refusal


def test_fp8_weights_stay_as_they_are_under_a_lora(ranks, files):
    """Against the rounded weights with the LoRA merged into them in fp32."""
    for format in ("kohya", "loha"):
        lora, _ = files.lora("flux dev", "diffusers", format)
        base = files.base("flux dev")
        (before, answer, after), _ = asked(ranks, [], [LoraRef(path=str(lora))], [], path=base, dtype="fp8_e4m3fn")
        rounded = TINY_MODELS["flux dev"].make(shape_of("flux dev")[0])
        for _, module in rounded.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.to(torch.float8_e4m3fn).float()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            weights, names = in_diffusers_names("flux dev", rounded.state_dict())
            _, changed = merged(weights, names, FORMATS[format])
        rounded.load_state_dict(changed)
        rounded.save_pretrained(base.parent / f"rounded {format}")
        (expected,), _ = asked(ranks, [], path=base.parent / f"rounded {format}")
        assert relative_error(answer, expected) <= 1e-5
        assert torch.equal(before, after)


def test_keys_without_a_place_are_told_and_a_file_of_nothing_else_is_refused(ranks, files, tmp_path):
    lora, _ = files.lora("flux dev", "diffusers", "peft")
    strange = {"lora_unet_input_blocks_1_1.lora_up.weight": torch.ones(2, 2), "lora_te1_x.alpha": torch.ones(())}
    save_file({**load_file(lora), **strange}, tmp_path / "some.safetensors")
    save_file(strange, tmp_path / "none.safetensors")
    wrong = {
        "transformer.proj_out.lora_A.weight": torch.ones(2, 5),
        "transformer.proj_out.lora_B.weight": torch.ones(64, 2),
    }
    save_file(wrong, tmp_path / "wrong.safetensors")
    steps = [
        [LoraRef(path=str(path))]
        for path in (lora, *(tmp_path / f"{n}.safetensors" for n in ("some", "none", "wrong")))
    ]
    answers, lines = asked(ranks, *steps, [], steps[0], path=files.base("flux dev"))
    assert torch.equal(answers[0], answers[1])
    assert any("keys are of nothing in this flux model: lora_unet_input_blocks_1_1" in line for line in lines)
    assert any("keys of text encoders" in line for line in lines)
    assert "changes nothing in this model" in answers[2]
    assert "5 columns of proj_out.weight, which has 64" in answers[3]
    assert torch.equal(answers[5], answers[0]), "after a refusal the model is whole"


def test_how_peft_scaled_a_lora_is_read_from_what_diffusers_writes(ranks, files, tmp_path):
    lora, _ = files.lora("flux dev", "diffusers", "peft")
    told = {"transformer.lora_alpha": 6, "transformer.r": 3, "transformer.alpha_pattern": {"proj_out": 3}}
    tensors = load_file(lora)
    save_file(tensors, tmp_path / "told.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    stronger = {
        key: tensor * (2 if "lora_B" in key and "proj_out" not in key else 1) for key, tensor in tensors.items()
    }
    save_file(stronger, tmp_path / "stronger.safetensors")
    steps = [[LoraRef(path=str(tmp_path / f"{name}.safetensors"))] for name in ("told", "stronger")]
    (one, other), _ = asked(ranks, *steps, path=files.base("flux dev"))
    assert relative_error(one, other) <= 1e-6
