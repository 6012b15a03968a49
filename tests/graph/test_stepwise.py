"""A sampler that runs in the host asks for one step at a time: what is sent, how often, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paralleldit.nodes import layout_choice
from paralleldit.nodes.comfyui.stepwise import StepwiseModel
from paralleldit.nodes.handles import EncodedPicture, ModelHandle
from paralleldit.nodes.layout_choice import LayoutChoice
from paralleldit.nodes.request.controls import PendingControl, PendingControls
from paralleldit.nodes.request.network_inputs import one_time
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.families.spec import LatentSpec
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol import messages

REF = messages.ModelRef(path="/models/one")
LATENT, TIMESTEP = torch.zeros(4, 4, 6, 6), torch.ones(4)
PROMPTS = torch.randn(2, 5, 8)
VIDEO_AND_SOUND = (LatentSpec(4, name="video", dims=3), LatentSpec(8, name="sound"))
MISSING: list[list[str]] = []
"""Conditions that the ranks say to miss, request by request."""


@pytest.fixture
def ask(client, monkeypatch) -> Any:
    """The stand-in, which answers a prediction with the latent plus one."""

    def request(message: Any, tensors: Any = None, on_event: Any = None, cancelled: Any = None, **_: Any) -> Any:
        tensors = dict(tensors or {})
        client.sent.append((message, tensors))
        missing = MISSING.pop(0) if MISSING and isinstance(message, messages.Predict) else []
        latents = {} if missing else {name: tensor for name, tensor in tensors.items() if name.startswith("latent")}
        body = {name.replace("latent", "prediction"): tensor + 1 for name, tensor in latents.items()}
        return messages.Result(id=0, data={"missing": missing} if missing else {}), body

    monkeypatch.setattr(client, "request", request)
    client.alive = True
    return client


def handle(family: str = "flux") -> ModelHandle:
    return ModelHandle(REF, LayoutChoice(ranks=2), family, next(iter(FAMILIES[family].published.values())))


def percent_to_sigma(percent: float) -> float:
    return 1.0 - percent


def running(family: str = "flux") -> StepwiseModel:
    stepwise = StepwiseModel()
    stepwise.begin(handle(family), (), percent_to_sigma)
    return stepwise


def inputs(**changes: Any) -> dict[str, Any]:
    """Of two conditions for a batch of two, one after the other."""
    given = {"context": PROMPTS.repeat_interleave(2, 0), "y": torch.ones(4, 6), "guidance": torch.full((4,), 2.5)}
    return given | changes


@pytest.mark.parametrize("takes_next_time", [True, False])
def test_videos_travel_with_a_time_for_each_frame_and_with_that_of_the_next_level_if_the_model_takes_it(
    ask, monkeypatch, takes_next_time
):
    monkeypatch.setitem(FAMILIES, "flux", replace(FAMILIES["flux"], takes_next_time=takes_next_time))
    video, times = torch.zeros(4, 4, 3, 6, 6), torch.rand(4, 3)
    (found,) = running().predict([video], times, inputs(), (0, 1), 0.5, torch.full((4,), 0.25))
    _, tensors = ask.last(messages.Predict)
    assert torch.equal(found, video + 1)
    assert torch.equal(tensors["timestep"], times)
    assert ("next_timestep" in tensors) == takes_next_time
    if takes_next_time:
        assert tensors["next_timestep"].tolist() == [0.25] * 4


def test_several_latents_travel_by_name_and_come_back_in_order(ask, monkeypatch):
    monkeypatch.setitem(FAMILIES, "flux", replace(FAMILIES["flux"], latents=VIDEO_AND_SOUND))
    video, sound = torch.zeros(4, 4, 3, 6, 6), torch.ones(4, 8, 7, 2)
    found = running().predict([video, sound], TIMESTEP, inputs(), (0, 1))
    assert [torch.equal(one, other + 1) for one, other in zip(found, (video, sound), strict=True)] == [True, True]
    assert {"latent.video", "latent.sound"} <= set(ask.last(messages.Predict)[1])
    with pytest.raises(UserError, match="one latent, but flux samples 2 latents: video, sound"):
        running().predict([video], TIMESTEP, inputs(), (0, 1))


def test_times_of_several_latents_are_one_or_refused():
    assert one_time(TIMESTEP) is TIMESTEP
    assert one_time((TIMESTEP, TIMESTEP.clone())) is TIMESTEP
    with pytest.raises(UserError, match="times of their own"):
        one_time((TIMESTEP, torch.zeros(4, 3)))


def test_conditions_are_told_once_and_one_row_of_each(ask):
    stepwise = running()
    for _ in range(3):
        assert torch.equal(stepwise.predict([LATENT], TIMESTEP, inputs(), (0, 1))[0], LATENT + 1)
    stepwise.end()
    first, second, third, end = ask.sent
    assert first[0].layout == Layout(cfg_degree=2)
    assert first[0].conditions == second[0].conditions == third[0].conditions
    assert set(first[0].run_conditions) == set(first[0].conditions)
    assert [first[1][f"{key}.0.tokens"].shape for key in first[0].conditions] == [(1, 5, 8), (1, 5, 8)]
    assert all(entry.guidance == 2.5 for entry in first[0].run_conditions.values())
    assert (second[0].run_conditions, set(second[1])) == ({}, {"latent", "timestep"})
    assert end[0] == messages.EndRun(id=0, run=first[0].run)


def test_what_the_ranks_have_lost_is_told_again(ask):
    stepwise = running()
    stepwise.predict([LATENT], TIMESTEP, inputs(), (0, 1))
    lost = [ask.sent[0][0].conditions[1]]
    MISSING.append(lost)
    assert torch.equal(stepwise.predict([LATENT], TIMESTEP, inputs(), (0, 1))[0], LATENT + 1)
    assert [list(message.run_conditions) for message, _ in ask.sent[1:]] == [[], lost]


def test_texts_of_single_pictures_stay_apart(ask):
    stepwise = running()
    stepwise.predict([LATENT[:2]], TIMESTEP[:2], inputs(context=PROMPTS), (0,))
    (message, tensors), key = ask.last(messages.Predict), ask.sent[0][0].conditions[0]
    assert tensors[f"{key}.0.tokens"].shape == (2, 5, 8)
    assert message.layout == Layout(ulysses_degree=2)


def test_a_new_run_is_told_all_again(ask):
    stepwise = running()
    for _ in range(2):
        stepwise.begin(handle(), (), percent_to_sigma)
        stepwise.predict([LATENT], TIMESTEP, inputs(), (0, 1))
    first, _, second = (message for message, _ in ask.sent)
    assert first.run != second.run
    assert len(second.run_conditions) == 2


@pytest.mark.parametrize(
    ("family", "given", "entry"),
    [
        ("pixart-alpha", {"c_size": torch.tensor([[480.0, 640.0]])}, {"size": (480, 640)}),
        (
            "hunyuandit",
            {"image_meta_size": torch.tensor([[480.0, 640.0, 96.0, 64.0, 0.0, 0.0]])},
            {"size": (480, 640), "target_size": (96, 64)},
        ),
        ("flux", {"guidance": None}, {"guidance": None}),
    ],
)
def test_what_a_network_is_told_beside_tensors_travels(ask, family, given, entry):
    running(family).predict([LATENT[:1]], TIMESTEP[:1], {"context": PROMPTS[:1], **given}, (0,))
    told = ask.last(messages.Predict)[0].run_conditions
    assert list(told.values()) == [messages.RunPrompt(**entry)]


def test_reference_latents_are_told_with_their_prompt(ask):
    references = [torch.ones(4, 16, 6, 8), torch.arange(2.0).repeat_interleave(2).view(4, 1, 1, 1).expand(4, 16, 2, 2)]
    stepwise = running()
    for _ in range(2):
        given = inputs(ref_latents=references, ref_latents_method="uxo")
        stepwise.predict([LATENT], TIMESTEP, given, (0, 1))
    (first, tensors), (second, _) = ask.sent
    assert second.run_conditions == {}
    assert [(each.references, each.reference_places) for each in first.run_conditions.values()] == [(2, "uxo")] * 2
    seen = [tensors[f"{key}.0.reference.1"] for key in first.conditions]
    assert [tuple(each.shape) for each in seen] == [(1, 16, 2, 2)] * 2
    assert [float(each.mean()) for each in seen] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ref_latents": [LATENT], "ref_latents_method": "far"}, "reference_latents_method=far"),
        ({"attention_mask": LATENT}, "attention mask"),
        ({"time_dim_concat": LATENT}, "latents behind its own frames"),
        ({"context_latents": [LATENT]}, "latents to look at"),
        ({"c_size": torch.tensor([[8.0, 8.0]] * 4), "c_ar": torch.full((4, 1), 2.0)}, "aspect_ratio=2"),
        ({"image_meta_size": torch.tensor([[8.0, 8.0, 8.0, 8.0, 1.0, 0.0]] * 4)}, "a crop at 0, 1"),
        ({"guidance": torch.arange(4.0)}, "different sizes or guidance"),
    ],
)
def test_inputs_that_the_ranks_do_not_take_are_refused_by_name(ask, changes, words):
    with pytest.raises(UserError, match=words):
        running().predict([LATENT], TIMESTEP, inputs(**changes), (0, 1))
    assert not ask.sent


def test_residuals_of_comfyuis_controlnets_travel_once_each(ask):
    one, other = torch.ones(4, 8, 6), torch.zeros(1, 8, 6)
    running().predict(
        [LATENT], TIMESTEP, inputs(control={"input": [one, None, one], "middle": [], "output": [other]}), (0, 1)
    )
    message, tensors = ask.last(messages.Predict)
    assert message.residuals == {"input": (0, None, 0), "output": (1,)}
    assert torch.equal(tensors["residual.0"], one)
    assert torch.equal(tensors["residual.1"], other)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (LayoutChoice(ranks=2, pipefusion_degree=2), "pipefusion_degree=2 goes on from the step before"),
        (LayoutChoice(ranks=2, distrifusion_degree=2), "distrifusion_degree=2 goes on from the step before"),
        (LayoutChoice(ranks=2, ulysses_degree=2, cfg_degree=2), "cannot be completed to 2 ranks"),
        (LayoutChoice(ranks=5, ulysses_degree=5, attention="yunchang"), "the model has 24"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_refused_when_the_sampler_starts(ask, choice, words):
    with pytest.raises(UserError, match=words):
        StepwiseModel().begin(replace(handle(), layout=choice), (), percent_to_sigma)
    assert not ask.sent


def test_a_layout_is_judged_once_for_each_kind_of_step(ask, monkeypatch):
    asks = []
    monkeypatch.setattr(layout_choice, "check_layout", lambda *args: asks.append(args))
    stepwise = running()
    for _ in range(3):
        stepwise.predict([LATENT], TIMESTEP, inputs(), (0, 1))
    assert [work.batch for _, work in asks] == [None, 2]


def test_residuals_for_a_model_that_takes_none_are_refused(ask):
    with pytest.raises(UserError, match="residuals of a ControlNet"):
        running("pixart-sigma").predict([LATENT], TIMESTEP, inputs(control={"output": [LATENT]}), (0, 1))
    assert not ask.sent


def shown(**changes: Any) -> EncodedPicture:
    message = messages.ImagePromptUse(adapter=messages.IPAdapterRef(path="/models/picture"), **changes)
    return EncodedPicture(message, (torch.ones(1, 8), torch.zeros(1, 8)))


def test_a_picture_of_a_part_of_the_run_needs_the_noise_level(ask):
    stepwise = StepwiseModel()
    stepwise.begin(replace(handle(), pictures=(shown(),)), (), percent_to_sigma)
    stepwise.predict([LATENT], TIMESTEP, inputs(), (0, 1))
    assert all(len(entry.image_prompts) == 1 for entry in ask.sent[0][0].run_conditions.values())
    stepwise.begin(replace(handle(), pictures=(shown(end=0.5),)), (), percent_to_sigma)
    with pytest.raises(UserError, match=r"from 0 to 0\.5 of the run"):
        stepwise.predict([LATENT], TIMESTEP, inputs(), (0, 1))


def test_pictures_are_told_with_the_prompts_while_they_work(ask):
    stepwise = StepwiseModel()
    always, early = shown(weight=0.5), shown(end=0.5)
    stepwise.begin(replace(handle(), pictures=(always, early, shown(weight=0.0))), (), percent_to_sigma)
    for sigma in (0.9, 0.7, 0.3, 0.1):
        stepwise.predict([LATENT], TIMESTEP, inputs(), (0, 1), sigma)
    told = [message.run_conditions for message, _ in ask.sent]
    assert [len(each) for each in told] == [2, 0, 2, 0]
    assert [entry.image_prompts for entry in told[0].values()] == [(always.message, early.message)] * 2
    assert [entry.image_prompts for entry in told[2].values()] == [(always.message,)] * 2
    first, tensors = ask.sent[0]
    means = [tensors[f"{key}.0.image.1"].mean() for key in first.conditions]
    assert means == [1.0, 0.0], "the negative prompt sees zeros"


# -- ControlNets that the ranks evaluate ---------------------------------------------------------------------------


class Vae:
    """Remembers the sizes of what it encodes."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(pixels.shape[:3]))
        return pixels.mean(-1)[:, None, ::8, ::8].repeat(1, 16, 1, 1)


def pending(vae: Any, count: int = 1, **changes: Any) -> PendingControl:
    use = messages.ControlUse(net=messages.ControlNetRef(path="/models/edges"), **changes)
    return PendingControl(use, torch.rand(count, 64, 64, 3), vae)


def control_at(sigma: float, *controls: PendingControl, before: Any = None) -> Any:
    """What ComfyUI hands to the network of a prompt's control."""
    return PendingControls(controls, before).get_control(LATENT, torch.full((4,), sigma), {}, 2, {})


def test_controlnets_are_told_with_the_prompts_while_they_work(ask):
    stepwise, vae = running(), Vae()
    always, early, never = pending(vae, strength=0.5), pending(vae, end=0.5), pending(vae, strength=0.0)
    for sigma in (0.9, 0.7, 0.3, 0.1):
        stepwise.predict([LATENT], TIMESTEP, inputs(control=control_at(sigma, always, early, never)), (0, 1), sigma)
    told = [message.run_conditions for message, _ in ask.sent]
    assert [len(each) for each in told] == [2, 0, 2, 0]
    assert [entry.controls for entry in told[0].values()] == [(always.message, early.message)] * 2
    assert [entry.controls for entry in told[2].values()] == [(always.message,)] * 2
    first, tensors = ask.sent[0]
    assert [tensors[f"{key}.0.control.1"].shape for key in first.conditions] == [(1, 16, 6, 6)] * 2
    assert vae.sizes == [(1, 48, 48)] * 2, "each picture that works is encoded once a run"
    assert all(not message.residuals for message, _ in ask.sent)


def test_a_prompt_for_an_area_has_its_control_picture_in_the_areas_size(ask):
    stepwise, vae = running(), Vae()
    control = pending(vae)
    for latent in (LATENT, LATENT[..., :3], LATENT):
        stepwise.predict([latent], TIMESTEP, inputs(control=control_at(0.5, control)), (0, 1), 0.5)
    assert vae.sizes == [(1, 48, 48), (1, 48, 24)]
    assert [len(message.run_conditions) for message, _ in ask.sent] == [2, 2, 0]


@pytest.mark.parametrize(("pictures", "sent"), [(1, 1), (2, 2), (3, 2), (5, 2)])
def test_control_pictures_of_another_number_are_taken_as_comfyui_takes_them(ask, pictures, sent):
    running().predict([LATENT], TIMESTEP, inputs(control=control_at(0.5, pending(Vae(), pictures))), (0, 1), 0.5)
    message, tensors = ask.last(messages.Predict)
    assert tensors[f"{message.conditions[0]}.0.control.0"].shape[0] == sent


def test_residuals_of_comfyuis_own_controlnets_travel_beside_ours(ask):
    residual = torch.ones(4, 8, 6)
    comfy = SimpleNamespace(get_control=lambda *_, **__: {"input": [residual], "middle": [], "output": []})
    control = control_at(0.5, pending(Vae()), before=comfy)
    running().predict([LATENT], TIMESTEP, inputs(control=control), (0, 1), 0.5)
    message, tensors = ask.last(messages.Predict)
    assert message.residuals == {"input": (0,)}
    assert all(len(entry.controls) == 1 for entry in message.run_conditions.values())
    assert torch.equal(tensors["residual.0"], residual)
