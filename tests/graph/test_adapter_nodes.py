"""Parallel LoRA, and the patches of ComfyUI's own LoRA nodes: what of them goes to the ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paralleldit.nodes import host
from paralleldit.nodes.layout_choice import LayoutChoice
from paralleldit.nodes.request.controls import PendingControl, active_controls, resized
from paralleldit.nodes.request.weight_patches import changes_of
from paralleldit.nodes.session.weight_delivery import deliver
from paralleldit.parallel_backend.adapters.lora.store import AdapterStore
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.files.lora_kinds import CONTROL, refusal
from paralleldit.parallel_backend.files.states import FileStates
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.graph.test_nodes import conditioning, load, node, sample
from safetensors.torch import save_file

KEY = "diffusion_model.double_blocks.0.img_attn.qkv.weight"


@pytest.fixture
def lora(models):
    path = models / "loras" / "style" / "chalk.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, path)
    return path


def test_a_lora_travels_by_its_path_and_the_model_before_it_is_as_it_was(client, lora):
    plain = load()
    once = node("Lora").add(plain, "style/chalk.safetensors", 0.5)[0]
    twice = node("Lora").add(once, "style/chalk.safetensors", -1.0, "1, 0.5,0")[0]
    for model, strengths in ((plain, []), (once, [(0.5, ())]), (twice, [(0.5, ()), (-1.0, (1.0, 0.5, 0.0))])):
        sample(model)
        files = client.last(messages.Sample)[0].adapters.files
        assert [(each.strength, each.block_strengths) for each in files] == strengths
        assert {each.path for each in files} <= {str(lora)}


@pytest.mark.parametrize(
    ("name", "factors", "words"),
    [
        ("none.safetensors", "", "not found"),
        ("style/chalk.safetensors", "1;2", "no list"),
        ("style/chalk.safetensors", "101", "101"),
    ],
)
def test_a_lora_that_cannot_be_is_refused_before_the_run(client, lora, name, factors, words):
    with pytest.raises(UserError, match=words):
        node("Lora").VALIDATE_INPUTS(name, factors)
    with pytest.raises(UserError, match=words):
        node("Lora").add(load(), name, 1.0, factors)


def test_a_control_lora_is_refused_at_its_node_by_the_sentence_of_comfyuis_own_loader(client, lora):
    save_file({"single_blocks.0.linear1.set_weight": torch.ones(2), "img_in.reshape_weight": torch.ones(2)}, lora)
    with pytest.raises(UserError, match="is a control LoRA: it widens the model's input") as refused:
        node("Lora").add(load(), "style/chalk.safetensors", 1.0)
    own = refusal("A LoRA of the graph", CONTROL)
    assert refused.value.message.removeprefix("chalk.safetensors") == own.message.removeprefix("A LoRA of the graph")
    assert refused.value.hint == own.hint


def patch(name: str, *weights: Any, strength: float = 1.0, offset: Any = None, function: Any = None) -> Any:
    return strength, SimpleNamespace(name=name, weights=weights), 1.0, offset, function


def low_rank(fill: float) -> tuple[Any, ...]:
    return torch.full((6, 2), fill), torch.ones(2, 2), 4.0, None, None, None


def swap_scale_shift(weight):
    return weight


def test_patches_become_changes_with_their_strength_and_their_rows():
    patches = {
        KEY: [patch("lora", *low_rank(1.0), strength=-0.5), (1.0, ("diff", (torch.ones(6, 2),)), 1.0, (0, 2, 4), None)],
        "diffusion_model.final_layer.adaLN_modulation.1.weight": [
            patch("lora", *low_rank(1.0), function=swap_scale_shift)
        ],
    }
    first, second, third = changes_of(patches)
    assert (first.message.strength, first.message.rows, first.message.swap_halves) == (-0.5, None, False)
    assert first.message.key == KEY.removeprefix("diffusion_model.")
    assert set(first.tensors) == {"up", "down", "alpha"}
    assert (second.message.rows, set(second.tensors)) == ((2, 4), {"diff"})
    assert third.message.swap_halves
    assert third.message.digest == first.message.digest, "the same tensors are sent once"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (patch("boft", torch.ones(2)), "OFT or BOFT"),
        (patch("lora", *low_rank(1.0), function=torch.neg), "function"),
        (patch("lora", *low_rank(1.0), offset=(1, 0, 2)), "columns"),
        ((1.0, ("set", (torch.ones(2),)), 1.0, None, None), "control LoRA"),
        ((1.0, (torch.ones(6, 2),), 0.5, None, None), "merged model"),
        (patch("lora", *low_rank(1.0)[:5], torch.ones(2)), "control LoRA"),
    ],
)
def test_a_patch_that_cannot_travel_is_refused_by_name(value, words):
    with pytest.raises(UserError, match=words):
        changes_of({KEY: [value]})


@pytest.fixture
def ranks(client, monkeypatch):
    """The client's ranks, as far as they keep changes."""
    store = AdapterStore(FileStates())

    def request(message, tensors=None, *rest):
        client.sent.append((message, dict(tensors or {})))
        data = {}
        if isinstance(message, messages.FindChanges):
            data = {"missing": store.missing(message.digests)}
        if isinstance(message, messages.KeepChanges):
            store.keep(message.digests, dict(tensors))
        return messages.Result(id=0, data=data), {}

    monkeypatch.setattr(client, "request", request)
    return store


def test_only_what_the_ranks_do_not_have_is_sent(client, ranks):
    def sent():
        count = len(client.sent)
        deliver(client, changes_of(patches))
        return [
            list(message.digests) for message, _ in client.sent[count:] if isinstance(message, messages.KeepChanges)
        ]

    patches = {KEY: [patch("lora", *low_rank(1.0))], KEY.replace("0", "1"): [patch("lora", *low_rank(2.0))]}
    first = sent()
    assert [len(each) for each in first] == [2]
    assert sent() == []
    patches[KEY] = [patch("lora", *low_rank(1.0), strength=0.3)]
    assert sent() == [], "another strength sends nothing"
    patches[KEY] = [patch("lora", *low_rank(3.0))]
    assert [len(each) for each in sent()] == [1]
    ranks.forget()
    assert [len(each) for each in sent()] == [2], "a new sidecar is sent everything again"


def test_a_model_without_patches_asks_the_ranks_for_nothing(client):
    assert host.current().changes(load()) == []
    sample()
    assert not [message for message, _ in client.sent if isinstance(message, messages.FindChanges)]


# -- ControlNets ---------------------------------------------------------------------------------------------------


@pytest.fixture
def net(models):
    return loaded_net(
        models,
        "edges",
        {
            "controlnet_x_embedder.weight": (64, 64),
            "x_embedder.weight": (64, 64),
            "context_embedder.weight": (64, 24),
            "time_text_embed.text_embedder.linear_1.weight": (64, 12),
            "transformer_blocks.0.attn.norm_added_q.weight": (16,),
        },
    )


def loaded_net(models, name, shapes):
    """A file of which the header is that of a ControlNet; a shape of none stands for the number 1."""
    path = models / "controlnet" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, path)
    return node("ControlNetLoader").load(path.name)[0]


class Vae:
    """Remembers what it encodes."""

    def __init__(self):
        self.pictures = []

    def encode(self, picture):
        self.pictures.append(picture)
        batch, height, width, _ = picture.shape
        return torch.full((batch, 16, height // 8, width // 8), picture.mean().item())


def controlled(net, vae, prompts=None, **changes):
    inputs = {
        "positive": conditioning(),
        "negative": conditioning(),
        "controlnet": net,
        "image": torch.ones(1, 64, 64, 3),
        "vae": vae,
        "strength": 0.5,
        "start_percent": 0.0,
        "end_percent": 0.8,
        "mode": -1,
    }
    sides = dict(zip(("positive", "negative"), prompts or (), strict=bool(prompts)))
    return node("ControlNetApply").apply(**(inputs | sides | changes))


def test_controlnets_travel_once_with_their_pictures_in_the_latents_size(client, net):
    vae = Vae()
    once = controlled(net, vae)
    positive, negative = controlled(net, vae, once, image=torch.zeros(1, 32, 48, 3), mode=2, strength=1.0)
    sample(positive=positive, negative=negative, cfg=2.0, latent_image={"samples": torch.zeros(1, 16, 4, 6)})
    message, tensors = client.last(messages.Sample)
    assert [(each.strength, each.end, each.mode) for each in message.controls] == [(0.5, 0.8, None), (1.0, 0.8, 2)]
    assert message.positive[0].controls == message.negative[0].controls == (0, 1)
    assert [picture.shape[1:3] for picture in vae.pictures] == [(32, 48), (32, 48)]
    assert tensors["control.0"].shape == (1, 16, 4, 6)
    assert (tensors["control.0"].mean(), tensors["control.1"].mean()) == (1.0, 0.0)


def test_at_cfg_1_the_positive_prompt_alone_has_its_controlnet(client, net):
    positive, _ = controlled(net, Vae())
    sample(positive=positive)
    message, tensors = client.last(messages.Sample)
    assert message.positive[0].controls == (0,)
    assert (len(message.controls), message.negative) == (1, ())
    assert "control.0" in tensors


def test_pixels_travel_to_a_controlnet_that_takes_them(client, models, net):
    pixels = loaded_net(
        models,
        "pixels",
        {
            "double_blocks.0.img_attn.qkv.weight": (192, 64),
            "double_blocks.0.img_attn.norm.query_norm.scale": (16,),
            "pos_embed_input.weight": (64, 64),
            "input_hint_block.14.weight": (16, 16, 3, 3),
            "img_in.weight": (64, 64),
            "txt_in.weight": (64, 24),
            "vector_in.in_layer.weight": (64, 12),
        },
    )
    positive, _ = controlled(pixels, None)
    sample(positive=positive, latent_image={"samples": torch.zeros(1, 16, 4, 6)})
    assert client.last(messages.Sample)[1]["control.0"].shape == (1, 3, 32, 48)
    with pytest.raises(UserError, match="Connect the model's VAE"):
        controlled(net, None)


def test_stabilitys_edges_are_drawn_as_it_was_trained(client, models):
    edges = loaded_net(
        models,
        "canny",
        {
            "pos_embed_input.proj.weight": (64, 16, 2, 2),
            "transformer_blocks.0.adaLN_modulation.1.weight": (384, 64),
            "time_text_embed.text_embedder.linear_1.weight": (64, 12),
            "control_type": (),
        },
    )
    vae = Vae()
    positive, _ = controlled(edges, vae)
    sample(positive=positive, latent_image={"samples": torch.zeros(1, 16, 4, 6)})
    seen_by_vae = 2 * vae.pictures[0] - 1
    assert seen_by_vae.unique() == 255 * 0.5 + 0.5


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"controlnet_blocks.0.linear.weight": (2, 2)}, "Mistoline"),
        ({"x_embedder.weight": (2, 2)}, "no ControlNet that is known"),
        ({"controlnet_x_embedder.weight": (2, 2), "x_embedder.weight": (2, 2)}, "It has no context_embedder"),
    ],
)
def test_a_file_that_is_no_such_controlnet_is_refused_by_its_header(client, models, shapes, words):
    with pytest.raises(UserError, match=words):
        loaded_net(models, "other", shapes)


def test_a_prompt_for_an_area_has_the_control_picture_in_the_areas_size(client, net):
    positive, _ = controlled(net, Vae())
    around, prompt = [[positive[0][0], {**positive[0][1], "area": (2, 4, 0, 0)}]], positive
    sample(positive=[*prompt, *around])
    message, tensors = client.last(messages.Sample)
    assert [entry.controls for entry in message.positive] == [(0,), (1,)]
    assert (tensors["control.0"].shape[2:], tensors["control.1"].shape[2:]) == ((4, 4), (2, 4))


def test_a_control_picture_is_cut_in_the_middle():
    image = torch.zeros(1, 8, 32, 3)
    image[:, :, 12:20] = 1.0
    assert resized(image, 16, 16).mean() == 1.0


class ComfyControl:
    """ComfyUI's own ControlNet, as far as its samplers ask it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        answers = {
            "get_control": {"input": ["own"], "middle": [], "output": []},
            "get_models": ["a model"],
            "get_extra_hooks": ["hooks"],
            "inference_memory_requirements": 8,
        }
        return lambda *args, **kwargs: self.calls.append(name) or answers.get(name)


@pytest.mark.parametrize("before", [None, ComfyControl()], ids=["alone", "after ComfyUI's own"])
def test_all_that_samplers_of_comfyui_ask_a_controlnet_is_answered(client, net, before):
    prompt = conditioning() if before is None else conditioning(control=before)
    positive, _ = controlled(net, Vae(), (prompt, conditioning()))
    control = positive[0][1]["control"]
    assert control.previous_controlnet is before
    control.pre_run(SimpleNamespace(stepwise=None), lambda percent: percent)
    found = control.get_control(torch.zeros(2, 4, 6, 6), torch.tensor([0.4, 0.4]), {}, 2, {})
    assert (found["input"], found["output"]) == ([] if before is None else ["own"], [])
    assert [(len(each.controls), round(each.sigma, 6)) for each in active_controls(found)] == [(1, 0.4)]
    assert control.get_models() == ([] if before is None else ["a model"])
    assert control.get_extra_hooks() == ([] if before is None else ["hooks"])
    assert control.inference_memory_requirements(torch.float32) == (0 if before is None else 8)
    assert (control.get_models_only_self(), control.multigpu_clones, control.extra_hooks) == ([], {}, None)
    assert control.get_instance_for_device("cpu") is control
    control.cleanup()
    if before is not None:
        assert {"pre_run", "cleanup"} <= set(before.calls)


def test_prompts_share_their_controlnet_so_that_samplers_evaluate_them_together(client, net):
    positive, negative = controlled(net, Vae())
    assert positive[0][1]["control"] is negative[0][1]["control"]


def test_a_model_that_is_not_in_the_ranks_is_refused(client, net):
    positive, _ = controlled(net, Vae())
    with pytest.raises(UserError, match="only the ranks can evaluate"):
        positive[0][1]["control"].pre_run(SimpleNamespace(), lambda percent: percent)


def test_a_controlnet_that_would_never_work_is_refused(client, net):
    with pytest.raises(UserError, match=r"0\.9"):
        node("ControlNetApply").VALIDATE_INPUTS(0.9, 0.1)
    with pytest.raises(UserError, match="after end_percent"):
        controlled(net, Vae(), start_percent=0.9, end_percent=0.1)


def test_old_keys_and_a_controlnet_are_refused_before_the_run(client, net):
    positive, _ = controlled(net, Vae())
    layout = LayoutChoice(ranks=2, distrifusion_degree=2)
    with pytest.raises(UserError, match="distrifusion_degree=2"):
        sample(load(layout), positive=positive)
    assert not [message for message, _ in client.sent if isinstance(message, messages.Sample)]


# -- IP-Adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(models):
    """As XLabs names them, of the tiny model's width."""
    path = models / "ipadapter" / "look.safetensors"
    path.parent.mkdir(exist_ok=True)
    tensors = {"ip_adapter_proj_model.proj.weight": torch.ones(96, 20)}
    for leaf, shape in (("weight", (64, 24)), ("bias", (64,))):
        tensors[f"double_blocks.0.processor.ip_adapter_double_stream_k_proj.{leaf}"] = torch.ones(*shape)
    save_file(tensors, path)
    return path


def seen(**fields):
    """A CLIP_VISION_OUTPUT."""
    return SimpleNamespace(**{"image_embeds": torch.ones(1, 20), "penultimate_hidden_states": None, **fields})


def test_a_picture_travels_with_both_prompts_and_the_model_before_it_is_as_it_was(client, adapter):
    plain = load()
    once = node("IPAdapter").show(plain, "look.safetensors", seen(), 0.5, 0.0, 0.8)[0]
    twice = node("IPAdapter").show(
        once, "look.safetensors", seen(), 1.0, 0.1, 1.0, seen(image_embeds=torch.full((1, 20), 2.0))
    )[0]
    for model, weights in ((plain, []), (once, [0.5]), (twice, [0.5, 1.0])):
        sample(model, negative=conditioning(), cfg=2.0)
        message, tensors = client.last(messages.Sample)
        assert [each.weight for each in message.positive[0].image_prompts] == weights
        assert message.positive[0].image_prompts == message.negative[0].image_prompts
        assert [f"positive.0.image.{number}" in tensors for number in range(3)].count(True) == len(weights)
    assert message.positive[0].image_prompts[0].end == 0.8
    assert message.positive[0].image_prompts[0].adapter.path == str(adapter)
    sides = ("positive.0.image.0", "negative.0.image.0", "positive.0.image.1", "negative.0.image.1")
    assert [tensors[name].mean() for name in sides] == [1.0, 0.0, 1.0, 2.0]


def test_a_picture_that_cannot_be_shown_is_refused_before_the_run(client, adapter, lora):
    for inputs, words in ((("look.safetensors", 0.9, 0.1), r"0\.9"), (("none.safetensors", 0.0, 1.0), "not found")):
        with pytest.raises(UserError, match=words):
            node("IPAdapter").VALIDATE_INPUTS(*inputs)
    for output, words in (
        (seen(image_embeds=torch.ones(1, 21)), "width 20; the vision model gives a width of 21"),
        (seen(image_embeds=None), "gives none"),
    ):
        with pytest.raises(UserError, match=words):
            node("IPAdapter").show(load(), "look.safetensors", output, 1.0, 0.0, 1.0)
    with pytest.raises(UserError, match="is a LoRA; an IP-Adapter was asked for"):
        node("IPAdapter").show(load(), str(lora), seen(), 1.0, 0.0, 1.0)
    other = replace(load(), family="sd3")
    with pytest.raises(UserError, match="an IP-Adapter for flux models"):
        node("IPAdapter").show(other, "look.safetensors", seen(), 1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("pictures", "batch", "taken"),
    [(1, 3, [0]), (3, 3, [0, 1, 2]), (5, 2, [0, 1]), (2, 5, [0, 1, 0, 1, 0])],
    ids=["one for all", "one each", "more", "fewer"],
)
def test_control_pictures_of_other_batches_are_taken_as_in_comfyui(pictures, batch, taken):
    image = torch.arange(pictures).view(-1, 1, 1, 1).expand(-1, 64, 64, 3) / 10
    control = PendingControl(messages.ControlUse(net=messages.ControlNetRef(path="x")), image, Vae())
    control.picture(8, 8, batch)
    (encoded,) = control.vae.pictures
    assert (encoded[:, 0, 0, 0] * 10).round().int().tolist() == taken
