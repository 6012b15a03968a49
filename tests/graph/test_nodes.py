"""The nodes without ComfyUI and without ranks: what they send, what they refuse, what they declare."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from paralleldit import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from paralleldit.launcher import devices, lifecycle
from paralleldit.launcher.client import NotBegun, SidecarError
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.nodes import host
from paralleldit.nodes.layout import ParallelDiTLayout
from paralleldit.nodes.layout_choice import LayoutChoice
from paralleldit.nodes.session import session
from paralleldit.parallel_backend.errors import Cancelled, UserError
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.rules import RunFacts
from paralleldit.parallel_backend.protocol import messages
from paralleldit.parallel_backend.protocol.errors import ProtocolError
from paralleldit.parallel_backend.sampling.names import SAMPLER_NAMES, SCHEDULER_NAMES
from paralleldit.parallel_backend.sampling.samplers import SAMPLERS
from paralleldit.parallel_backend.sampling.schedules import SCHEDULERS
from paralleldit.tests.fake_client import ANSWERS
from paralleldit.tests.graph.sampling import NAME, conditioning, load, node, sample

PACK = Path(__file__).resolve().parents[2]

# -- what the nodes declare ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_explains_every_input_and_fits_its_own_function(client, name):
    node_class = NODE_CLASS_MAPPINGS[name]
    groups = node_class.INPUT_TYPES()
    declared = {key: spec for group in ("required", "optional") for key, spec in groups.get(group, {}).items()}
    assert all(len(spec[1]["tooltip"]) > 10 for spec in declared.values())
    taken = inspect.signature(getattr(node_class, node_class.FUNCTION)).parameters
    if set(taken) == {"self", "inputs"}:
        assert set(declared) == set(inspect.signature(LayoutChoice).parameters), "all inputs go into a LayoutChoice"
    else:
        assert set(declared) == set(taken) - {"self"}
        optional = {key for key, parameter in taken.items() if parameter.default is not parameter.empty}
        assert optional == set(groups.get("optional", {}))
    if hasattr(node_class, "VALIDATE_INPUTS"):
        assert set(inspect.getfullargspec(node_class.VALIDATE_INPUTS).args[1:]) <= set(declared)
    assert node_class.CATEGORY == "ParallelDiT"
    assert NODE_DISPLAY_NAME_MAPPINGS[name].startswith("Parallel ")
    assert (PACK / "web" / "docs" / f"{name}.md").read_text().startswith(f"# {NODE_DISPLAY_NAME_MAPPINGS[name]}")


def test_the_menus_offer_what_the_ranks_can_sample():
    assert set(SAMPLER_NAMES) == set(SAMPLERS)
    assert set(SCHEDULER_NAMES) == set(SCHEDULERS)


def test_a_missing_package_is_named_with_what_to_do(tmp_path):
    code = f"""
import importlib.util, sys
sys.modules["pydantic"] = None
spec = importlib.util.spec_from_file_location("a-pack", {str(PACK / "__init__.py")!r})
spec.submodule_search_locations = [{str(PACK)!r}]
sys.modules["a-pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "'pydantic'" in last
    assert "-m pip install -r" in last


# -- layout --------------------------------------------------------------------------------------------------------

AUTO = LayoutChoice()


@pytest.mark.parametrize(
    ("choice", "ranks", "guided", "layout"),
    [
        (AUTO, 1, False, Layout()),
        (AUTO, 4, False, Layout(ulysses_degree=4)),
        (AUTO, 4, True, Layout(ulysses_degree=2, cfg_degree=2)),
        (AUTO, 3, True, Layout(ulysses_degree=3)),
        (LayoutChoice(ring_degree=2), 4, False, Layout(ulysses_degree=2, ring_degree=2)),
        (LayoutChoice(ulysses_degree=2), 8, True, Layout(ulysses_degree=2, ring_degree=2, cfg_degree=2)),
        (LayoutChoice(cfg_degree=1, ulysses_degree=1), 4, True, Layout(ring_degree=4)),
        (LayoutChoice(data_degree=2), 4, False, Layout(ulysses_degree=2, data_degree=2)),
        (LayoutChoice(attention="sdpa"), 2, False, Layout(ulysses_degree=2, attention="sdpa")),
        (LayoutChoice(ulysses_degree=2, ring_degree=1, cfg_degree=1, data_degree=1), 2, True, Layout(ulysses_degree=2)),
        (
            LayoutChoice(pipefusion_degree=2, num_patches=3, warmup_steps=4),
            8,
            True,
            Layout(pipefusion_degree=2, ulysses_degree=2, cfg_degree=2, num_patches=3, warmup_steps=4),
        ),
        (LayoutChoice(tensor_degree=2), 8, True, Layout(tensor_degree=2, ulysses_degree=2, cfg_degree=2)),
        (
            LayoutChoice(tensor_degree=2, weights="sharded"),
            4,
            False,
            Layout(tensor_degree=2, ulysses_degree=2, weights="sharded"),
        ),
        (
            LayoutChoice(distrifusion_degree=2, refresh="in_turn"),
            4,
            False,
            Layout(distrifusion_degree=2, ulysses_degree=2, refresh="in_turn"),
        ),
        (
            LayoutChoice(pipefusion_degree=2, warmup_steps=0, stage_blocks="5, 3"),
            2,
            False,
            Layout(pipefusion_degree=2, warmup_steps=0, stage_blocks=(5, 3)),
        ),
        (
            LayoutChoice(pipefusion_degree=2, stage_blocks=" even"),
            2,
            False,
            Layout(pipefusion_degree=2, stage_blocks="even"),
        ),
    ],
)
def test_degrees_of_zero_are_chosen_to_use_all_ranks(choice, ranks, guided, layout):
    assert choice.resolve(RunFacts(ranks=ranks, batch=4), guided=guided) == layout


def of(ranks, ulysses=0, ring=0, cfg=0, data=0, **optional):
    """The inputs of a Parallel Layout."""
    degrees = {"ulysses_degree": ulysses, "ring_degree": ring, "cfg_degree": cfg, "data_degree": data}
    return {"ranks": ranks, **degrees, "attention": "auto", **optional}


@pytest.mark.parametrize(
    ("inputs", "numbers"),
    [
        (of(2, 3, 1, 1, 1), ("3", "2 ranks")),
        (of(4, 3, 0, 0, 0), ("ulysses_degree=3", "4 ranks")),
        (of(2, 0, 0, 3, 0), ("cfg_degree=3", "2 halves")),
        (of(2, 1, 1, 1, 4), ("data_degree=4", "multiply to 4")),
        (of(-1), ("-1",)),
        (of(4, pipefusion_degree=3), ("pipefusion_degree=3", "4 ranks")),
        (of(4, 2, 1, 1, 1, pipefusion_degree=4), ("pipefusion_degree=4", "multiply to 8")),
        (of(4, pipefusion_degree=0), ("pipefusion_degree=0", "at least 1")),
        (of(4, warmup_steps=-1), ("warmup_steps=-1", "at least 0")),
        (of(4, tensor_degree=3), ("tensor_degree=3", "4 ranks")),
        (
            of(4, pipefusion_degree=2, tensor_degree=2, weights="sharded"),
            ("4 ranks", "tensor_degree=2", "8 ranks"),
        ),
        (of(4, weights="halved"), ("'halved'", "whole, sharded, offloaded")),
        (of(4, distrifusion_degree=3), ("distrifusion_degree=3", "4 ranks")),
        (of(4, distrifusion_degree=2, pipefusion_degree=2), ("distrifusion_degree=2", "pipefusion_degree=2")),
        (of(4, distrifusion_degree=2, refresh="never"), ("'never'", "all, in_turn")),
        (of(4, pipefusion_degree=2, stage_blocks="10,x"), ("'10,x'",)),
    ],
)
def test_a_layout_that_cannot_work_is_refused_before_anything_runs(client, inputs, numbers):
    with pytest.raises(UserError) as refused:
        NODE_CLASS_MAPPINGS["ParallelDiTLayout"].VALIDATE_INPUTS(**inputs)
    assert all(number in str(refused.value) for number in numbers), refused.value
    assert not client.specs


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("Layout", of(2, 3, 1, 1, 1)),
        ("Sampler", {"sampler_name": "none", "scheduler": "simple", "start_at_step": 0, "end_at_step": 3}),
        ("Sampler", {"sampler_name": "euler", "scheduler": "simple", "start_at_step": 5, "end_at_step": 3}),
        ("Loader", {"model": "none"}),
        ("Lora", {"lora": "none", "block_strengths": "1"}),
        ("ControlNetLoader", {"controlnet": "none"}),
        ("ControlNetApply", {"start_percent": 0.9, "end_percent": 0.1}),
        ("IPAdapter", {"ip_adapter": "none", "start_percent": 0.0, "end_percent": 1.0}),
        ("TextEncode", {"text_encoders": "none"}),
        ("VAELoader", {"vae": "none"}),
        ("VAEDecode", {"tile_size": 64, "overlap": 64}),
        ("VAEEncode", {"tile_size": 64, "overlap": 64}),
        ("VAEEncodeForInpaint", {"tile_size": -1, "overlap": 0}),
    ],
    ids=str,
)
def test_one_wrong_input_is_one_error_in_comfyui(client, name, inputs):
    """ComfyUI tells what is raised once, and a returned reason for each input that VALIDATE_INPUTS takes."""
    validate = NODE_CLASS_MAPPINGS[f"ParallelDiT{name}"].VALIDATE_INPUTS
    taken = inspect.getfullargspec(validate)
    try:
        reason = validate(**inputs)
    except UserError:
        return
    assert isinstance(reason, str)
    assert len(taken.args) == 2, "the class and one input"


@pytest.mark.parametrize("error", [UserError, SidecarError, NotBegun, ProtocolError, Cancelled])
def test_an_errors_type_is_shown_without_the_path_of_a_file(error):
    assert f"{error.__module__}.{error.__qualname__}" == f"ParallelDiT.{error.__name__}"


def test_a_linked_degree_is_checked_when_it_is_known(client):
    assert NODE_CLASS_MAPPINGS["ParallelDiTLayout"].VALIDATE_INPUTS(**of(2, None, 1, 1, 1)) is True
    with pytest.raises(UserError, match="multiply to 3"):
        node("Layout").build(**of(2, 3, 1, 1, 1))


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (LayoutChoice(ranks=4, pipefusion_degree=4), "it has 3 blocks"),
        (LayoutChoice(ranks=2, pipefusion_degree=2, num_patches=3), "it has 2 rows"),
        (LayoutChoice(ranks=2, data_degree=2), "holds 1"),
        (LayoutChoice(ranks=2, cfg_degree=2), "no negative conditioning"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_the_run_is_refused_before_it_is_sent(client, choice, words):
    with pytest.raises(UserError, match=words):
        sample(load(choice))
    assert not client.sent


def test_without_gpu_more_ranks_than_gpus_are_refused(client, monkeypatch):
    host.use(host.Host(spec=SidecarSpec(device="cuda")))
    monkeypatch.setattr("paralleldit.launcher.devices.gpu_count", lambda python: 1)
    with pytest.raises(UserError, match=r"4 ranks.*1"):
        NODE_CLASS_MAPPINGS["ParallelDiTLayout"].VALIDATE_INPUTS(**of(4))


# -- sampler -------------------------------------------------------------------------------------------------------


def test_the_sampler_sends_one_request_and_keeps_the_rest_of_the_latent(client):
    mask = torch.ones(1, 32, 32)
    latent = {"samples": torch.ones(2, 16, 4, 4), "noise_mask": mask, "batch_index": [3, 5], "other": "kept"}
    model = load(LayoutChoice(ranks=2))
    out = sample(model, cfg=3.0, positive=conditioning(guidance=2.0), negative=conditioning(), latent_image=latent)
    message, tensors = client.last(messages.Sample)
    assert message.model == messages.ModelRef(path=str(host.current().models / NAME))
    assert message.layout == Layout(cfg_degree=2)
    assert (message.seed, message.cfg, message.sampler, message.batch_index) == (7, 3.0, "euler", (3, 5))
    assert message.schedule == messages.Schedule(scheduler="simple", steps=3)
    assert [entry.guidance for entry in (*message.positive, *message.negative)] == [2.0, 3.5]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "latent": (2, 16, 4, 4),
        "noise_mask": (1, 1, 32, 32),
        "positive.0.tokens": (1, 4, 8),
        "positive.0.pooled": (1, 6),
        "negative.0.tokens": (1, 4, 8),
        "negative.0.pooled": (1, 6),
    }
    assert out["other"] == "kept"
    assert out["noise_mask"] is mask
    assert torch.equal(out["samples"], latent["samples"] + 1)
    assert torch.equal(latent["samples"], torch.ones(2, 16, 4, 4))


@pytest.mark.parametrize(
    ("inputs", "fields"),
    [
        ({}, (True, 0, 10_000, False)),
        ({"end_at_step": 2, "return_with_leftover_noise": "enable"}, (True, 0, 2, True)),
        ({"add_noise": "disable", "start_at_step": 2}, (False, 2, 10_000, False)),
    ],
    ids=["the whole run", "the first of two samplers", "the second"],
)
def test_a_part_of_the_steps_travels(client, inputs, fields):
    sample(**inputs)
    message, _ = client.last(messages.Sample)
    assert (message.add_noise, message.start_step, message.end_step, message.leftover_noise) == fields


def test_a_part_of_the_steps_that_ends_before_it_starts_is_refused_before_anything_runs(client):
    with pytest.raises(UserError, match="from step 5 to step 3"):
        NODE_CLASS_MAPPINGS["ParallelDiTSampler"].VALIDATE_INPUTS("euler", "simple", 5, 3)
    assert NODE_CLASS_MAPPINGS["ParallelDiTSampler"].VALIDATE_INPUTS("euler", "simple") is True
    with pytest.raises(UserError, match="from step 5 to step 3"):
        sample(start_at_step=5, end_at_step=3)
    assert not client.sent


def test_at_cfg_1_the_negative_prompt_does_not_travel(client):
    sample(negative=conditioning())
    message, tensors = client.last(messages.Sample)
    assert message.negative == ()
    assert not [name for name in tensors if name.startswith("negative")]


def test_disabled_guidance_travels_as_none(client):
    sample(positive=conditioning(guidance=None))
    assert client.last(messages.Sample)[0].positive[0].guidance is None


def test_an_empty_latent_of_another_model_gets_the_right_channels(client):
    sample(latent_image={"samples": torch.zeros(1, 4, 6, 8)})
    assert client.last(messages.Sample)[1]["latent"].shape == (1, 16, 6, 8)


NAN = torch.full((1, 16, 4, 4), float("nan"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_image": {"samples": torch.zeros(0, 16, 4, 4)}}, ("empty", "[0, 16, 4, 4]")),
        ({"latent_image": {"samples": torch.zeros(1, 16, 0, 4)}}, ("empty",)),
        ({"latent_image": {"samples": torch.ones(1, 4, 4, 4)}}, ("4 channels", "16")),
        ({"latent_image": {"samples": NAN}}, ("256 of 256", "NaN")),
        ({"latent_image": {"samples": torch.zeros(1, 16, 1, 4, 4)}}, ("5 dims", "4")),
        ({"sampler_name": "magic"}, ("Unknown sampler 'magic'", "euler", "KSampler")),
        ({"sampler_name": "euler_cfg_pp"}, ("euler_cfg_pp", "negative", "or use euler.")),
        ({"scheduler": "magic"}, ("Unknown scheduler 'magic'", "karras")),
        ({"cfg": 3.0}, ("cfg=3", "negative")),
        ({"positive": []}, ("positive conditioning has no entries",)),
        ({"positive": conditioning(area=(4, 4, 4, 0))}, ("area of 4 x 4 cells at 0, 4", "4 x 4")),
        ({"positive": conditioning(control=object())}, ("ControlNet of ComfyUI's own",)),
        ({"positive": conditioning(hooks=object())}, ("carries hooks",)),
        ({"positive": conditioning(default=True)}, ("carries default", "KSampler")),
        (
            {"positive": conditioning(reference_latents=[torch.zeros(1, 16, 4, 4)], reference_latents_method="far")},
            ("reference_latents_method=far", "offset"),
        ),
        ({"positive": conditioning(pooled_output=None)}, ("no pooled_output", "CLIP-L")),
        ({"model": object()}, ("not loaded by Parallel Loader",)),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name_and_nothing_is_sent(client, changes, words):
    with pytest.raises(UserError) as error:
        sample(**changes)
    assert all(word in str(error.value) for word in words), error.value
    assert error.value.hint
    assert not client.sent


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        (LayoutChoice(ranks=2, cfg_degree=2), {}, ("cfg_degree=2",)),
        (LayoutChoice(ranks=2, data_degree=2), {}, ("data_degree=2", "1")),
    ],
)
def test_a_layout_that_would_leave_ranks_idle_is_refused(client, layout, changes, words):
    with pytest.raises(UserError) as error:
        sample(load(layout), **changes)
    assert all(word in str(error.value) for word in words)
    assert not client.sent


# -- the other nodes -----------------------------------------------------------------------------------------------


def test_text_encode_makes_conditioning(client):
    out = node("TextEncode").encode(NAME, "a cat", 2.5, 0)[0]
    message, _ = client.last(messages.EncodeText)
    assert (message.prompt, message.prompt_2, message.max_length) == ("a cat", None, None)
    assert out[0][0].shape == (1, 4, 8)
    assert out[0][1]["pooled_output"].shape == (1, 6)
    assert out[0][1]["guidance"] == 2.5
    node("TextEncode").encode(NAME, "a cat", 2.5, 77, "a long cat")
    message, _ = client.last(messages.EncodeText)
    assert (message.prompt_2, message.max_length) == ("a long cat", 77)


@pytest.mark.parametrize(
    ("name", "inputs"), [("Loader", ("nothing",)), ("TextEncode", ("nothing",)), ("VAELoader", ("nothing",))]
)
def test_a_model_that_is_not_there_is_named_with_what_is(client, name, inputs):
    answer = NODE_CLASS_MAPPINGS[f"ParallelDiT{name}"].VALIDATE_INPUTS(*inputs)
    assert "'nothing'" in answer
    assert NAME in answer


def test_a_path_beside_the_pack_is_found_from_any_folder(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert node("Loader").load(str(host.current().models / NAME), "auto")[0].family == "flux"
    assert NODE_CLASS_MAPPINGS["ParallelDiTLoader"].VALIDATE_INPUTS("parallel_backend/layout/layout.py") is True


def test_inside_comfyui_only_listed_models_are_taken(client, monkeypatch):
    monkeypatch.setattr(host.Host, "takes_paths", False)
    absolute = str(host.current().models / NAME)
    assert "was not found" in NODE_CLASS_MAPPINGS["ParallelDiTLoader"].VALIDATE_INPUTS(absolute)


def test_models_behind_links_to_other_folders_are_listed(client, tmp_path):
    (tmp_path / "models" / "diffusers").mkdir(parents=True)
    (tmp_path / "models" / "diffusers" / "linked").symlink_to(host.current().models / NAME)
    host.use(host.Host(models=tmp_path / "models"))
    assert "diffusers/linked" in NODE_CLASS_MAPPINGS["ParallelDiTLoader"].INPUT_TYPES()["required"]["model"][0]


@pytest.mark.parametrize("name", ["Status", "Unload"])
def test_status_and_unload_do_not_start_a_sidecar(client, name):
    shown = getattr(node(name), node(name).FUNCTION)()
    assert shown["ui"]["text"] == ["The sidecar is not running."]
    assert not client.specs


STATUS = """4 ranks on cpu, up for 61 s
model /models/flux: 24.00 GB
rank 1 on node: 12.0 GB used, 5.0 GB free
sent in layout cfg2: cfg all_gather 2.0 MB in 4 messages"""


@pytest.mark.parametrize(("name", "text"), [("Status", STATUS), ("Unload", "Freed 1.00 GB, 2.00 GB (rank by rank).")])
def test_status_and_unload_ask_the_sidecar_that_runs(client, monkeypatch, name, text):
    client.welcome = client.welcome.model_copy(update={"ranks": 4})
    own = host.current().spec
    monkeypatch.setattr(lifecycle, "visit", lambda spec: client if spec == own else None)
    shown = getattr(node(name), node(name).FUNCTION)("passed on")
    assert shown["ui"]["text"] == [text]
    assert not client.specs, "nothing is started"


def test_unload_passes_its_input_on(client):
    assert node("Unload").unload("passed on")["result"] == ("passed on",)


# -- progress, cancel, restart -------------------------------------------------------------------------------------


class Watching(host.Host):
    steps: ClassVar[list[tuple[str, int, int]]] = []
    cancel_at = 0

    def progress(self, model: Any = None) -> host.OnProgress:
        return lambda phase, step, total, preview: self.steps.append((phase, step, total))

    def cancelled(self) -> bool:
        return len(self.steps) == self.cancel_at

    def leave_cancelled(self, error):
        raise InterruptedError from error


def test_steps_are_shown_and_a_cancel_ends_the_node_as_the_host_wants(client, models):
    watching = Watching(models=models, spec=host.current().spec)
    watching.steps.clear()
    host.use(watching)
    watching.cancel_at = -1
    sample()
    assert watching.steps == [("sample", step, 3) for step in (1, 2, 3)]
    watching.cancel_at = 5
    with pytest.raises(InterruptedError):
        sample()


def test_a_cancel_while_the_sidecar_starts_ends_the_node(client, models):
    watching = Watching(models=models, spec=host.current().spec)
    watching.steps.clear()
    host.use(watching)
    with pytest.raises(InterruptedError):
        sample()
    assert not client.specs


def test_a_cached_model_is_used_again_in_a_new_sidecar(client):
    model = load(LayoutChoice(ranks=2))
    sample(model)
    client.fault = lifecycle.SidecarError("Rank 1 died.")
    with pytest.raises(lifecycle.SidecarError, match="Rank 1"):
        sample(model)
    sample(model)
    requests = [message for message, _ in client.sent]
    assert len(requests) == 3
    assert requests[0] == requests[2]
    assert {spec.ranks for spec in client.specs} == {2}


def studied(message, tensors):
    """What the ranks measure of a run of four evaluations: every change is a tenth."""
    changes = torch.full((3, 3, 6, 2), 0.1)
    return {
        "latent": tensors["latent"],
        "study.levels": torch.tensor([1.0, 0.75, 0.5, 0.25]),
        "study.changes": changes,
    } | {"study.whole": torch.full((3, 3, 2), 0.1)}


def test_a_study_of_a_model_is_the_schedule_of_its_cache(client, monkeypatch):
    monkeypatch.setitem(ANSWERS, messages.Sample, studied)
    cached = node("Cache").add(load(), "first block", 0.2)[0]
    inputs = {"positive": conditioning(), "latent_image": {"samples": torch.zeros(1, 16, 4, 4)}, "seed": 1, "steps": 4}
    settings = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "save": True, "positive_2": conditioning()}
    picture, study, report = node("Redundancy").measure(cached, **inputs, **settings)["result"]
    assert [(message.study, message.cache) for message, _ in client.sent] == [(True, None)] * 2
    assert picture.shape[0] == 4, "changes and cosines of two prompts"
    assert study.rates == pytest.approx([0.4] * 20)
    assert "Written to" in report
    for given in ({"study": study}, {}):
        (model,) = node("Cache").add(load(), "schedule", 0.3, **given)
        assert model.cache.rates == pytest.approx(study.rates), "from the link, and from beside the model"
    assert node("Cache").add(load(), "teacache", 0.3)[0].cache.coefficients == ()
    assert node("Cache").add(load(), "teacache", 0.3, study=study)[0].cache.coefficients == study.coefficients


def test_a_sidecar_that_was_lost_before_it_began_is_replaced_and_asked_again(client, monkeypatch):
    monkeypatch.setattr(lifecycle, "spec_of", lambda lost: client.specs[-1])
    model = load(LayoutChoice(ranks=2))
    client.fault = NotBegun("Rank 1 died.")
    sample(model)
    lost, again = (message for message, _ in client.sent)
    assert lost == again
    assert [spec.ranks for spec in client.specs] == [2, 2]
    client.sent.clear()
    monkeypatch.setattr(lifecycle, "spec_of", lambda lost: None)
    client.fault = NotBegun("The sidecar of somebody else is gone.")
    with pytest.raises(NotBegun):
        sample(model)
    assert len(client.sent) == 1


class Numbered(host.Host):
    number = 1

    def prompt(self) -> object:
        return self.number


def test_two_numbers_of_ranks_in_one_workflow_are_refused(client, models):
    here = Numbered(models=models, spec=host.current().spec)
    host.use(here)
    one, two = LayoutChoice(ranks=1), LayoutChoice(ranks=2)
    session.client_for(two)
    session.client_for(two)
    with pytest.raises(UserError, match="asks for 1 ranks, another one of this workflow has asked for 2"):
        session.client_for(one)
    here.number = 2
    session.client_for(one)
    with pytest.raises(UserError, match="own_ranks of Parallel VAE Loader"):
        session.client_for(two)
    host.use(host.Host(models=models, spec=here.spec))
    for layout in (one, two, one):
        session.client_for(layout)


FOUR_GPUS = [
    (LayoutChoice(), 4, ()),
    (LayoutChoice(ranks=2), 2, ()),
    (LayoutChoice(devices="1, 3"), 2, (1, 3)),
    (LayoutChoice(devices="3,0"), 2, (3, 0)),
    (LayoutChoice(ranks=1, devices="2"), 1, (2,)),
]


@pytest.mark.parametrize(("layout", "ranks", "gpus"), FOUR_GPUS)
def test_devices_of_the_layout_are_the_gpus_of_the_sidecar(client, models, monkeypatch, layout, ranks, gpus):
    monkeypatch.setattr(devices, "gpu_count", lambda python: 4)
    host.use(host.Host(models=models))
    session.client_for(layout)
    assert (client.specs[-1].ranks, client.specs[-1].gpus) == (ranks, gpus)


@pytest.mark.parametrize(
    ("layout", "own", "gpus"),
    [
        (LayoutChoice(ranks=2), 2, (2, 3)),
        (LayoutChoice(ranks=2), 1, (3,)),
        (LayoutChoice(devices="2,3"), 1, (1,)),
        (LayoutChoice(devices="1,3"), 2, (0, 2)),
    ],
)
def test_a_vae_with_ranks_of_its_own_takes_gpus_that_the_layout_leaves(client, models, monkeypatch, layout, own, gpus):
    monkeypatch.setattr(devices, "gpu_count", lambda python: 4)
    host.use(host.Host(models=models))
    session.vae_client(own, layout)
    assert client.specs[-1].gpus == gpus


@pytest.mark.parametrize(
    ("given", "count", "reason", "remedy"),
    [
        ({"devices": "0,4"}, 4, "names GPU 4, but torch sees 4: 0, 1, 2, 3", "Name some of these"),
        ({"devices": "0,1", "ranks": 3}, 4, "3 ranks do not fit devices=0,1, which names 2", "Set ranks to 0"),
        ({"devices": "0,0"}, 4, "'0,0' is no list of GPUs", "each once"),
        ({"devices": "0;1"}, 4, "'0;1' is no list of GPUs", "as in 0,1"),
        ({"devices": "-1"}, 4, "'-1' is no list of GPUs", "as in 0,1"),
        ({"devices": "0"}, 0, "devices=0 names GPUs, but torch sees no GPU on this machine", "Leave devices empty"),
        ({"devices": "0,1,2", "ulysses_degree": 2, "cfg_degree": 1}, 4, "cannot be completed to 3 ranks", "divides 3"),
    ],
)
def test_devices_that_are_not_there_are_refused_before_the_run(
    client, models, monkeypatch, given, count, reason, remedy
):
    monkeypatch.setattr(devices, "gpu_count", lambda python: count)
    host.use(host.Host(models=models))
    with pytest.raises(UserError, match=reason) as refused:
        ParallelDiTLayout().build(**given)
    assert remedy in refused.value.hint
    assert client.specs == []


def test_devices_cannot_be_chosen_for_a_sidecar_elsewhere(client, models):
    host.use(host.Host(models=models, spec=SidecarSpec(remote=True, address="tcp://there:1", token_file=models / "t")))
    with pytest.raises(UserError, match="devices=0,1 cannot be chosen for the sidecar at tcp://there:1"):
        ParallelDiTLayout().build(devices="0,1")
