"""CONDITIONING as Parallel Sampler sends it: what each family takes of a prompt, and where several prompts count."""

from __future__ import annotations

import pytest
import torch
from paralleldit.nodes.handles import ModelHandle
from paralleldit.nodes.layout_choice import LayoutChoice
from paralleldit.nodes.request.conditioning import entry_of, to_message
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.graph.sampling import conditioning, load, sample

MASK, TEXT, MASK_2 = torch.ones(1, 4), torch.ones(1, 7, 5), torch.ones(1, 7)
HUNYUAN = {"attention_mask": MASK, "conditioning_mt5xl": TEXT, "attention_mask_mt5xl": MASK_2}
SIZES = {"width": 640, "height": 480}


def model_of(family: str) -> ModelHandle:
    return ModelHandle(messages.ModelRef(path="unused"), None, family, next(iter(FAMILIES[family].published.values())))


@pytest.mark.parametrize(
    ("family", "entry", "names", "size"),
    [
        ("pixart-sigma", {"pooled_output": None}, {"tokens"}, None),
        ("pixart-alpha", {"pooled_output": torch.ones(1, 6), **SIZES}, {"tokens"}, (480, 640)),
        ("pixart-alpha", {"attention_mask": MASK, "width": 640}, {"tokens", "mask"}, None),
        ("zimage", {"attention_mask": MASK, "pooled_output": None}, {"tokens"}, None),
        (
            "hunyuanvideo",
            {"attention_mask": MASK, "pooled_output": torch.ones(1, 6)},
            {"tokens", "mask", "pooled"},
            None,
        ),
        ("hunyuandit", HUNYUAN, {"tokens", "mask", "tokens_2", "mask_2"}, None),
        ("hunyuandit", {**HUNYUAN, **SIZES}, {"tokens", "mask", "tokens_2", "mask_2"}, (480, 640)),
    ],
)
def test_a_prompt_travels_with_what_its_model_takes(client, family, entry, names, size):
    sample(model_of(family), positive=[[torch.ones(1, 4, 8), entry]])
    message, tensors = client.last(messages.Sample)
    assert {name for name in tensors if name != "latent"} == {f"positive.0.{name}" for name in names}
    assert message.positive[0].size == size
    assert message.positive[0].guidance == FAMILIES[family].guidance
    spec = FAMILIES[family].latent
    assert tensors["latent"].shape == (1, spec.channels, *[1] * (spec.dims - 2), 4, 4)


def test_target_size_travels(client):
    sizes = {**SIZES, "target_width": 320, "target_height": 240}
    sample(model_of("hunyuandit"), positive=[[torch.ones(1, 4, 8), {**HUNYUAN, **sizes}]])
    (entry,) = client.last(messages.Sample)[0].positive
    assert (entry.size, entry.target_size) == ((480, 640), (240, 320))


@pytest.mark.parametrize(
    ("family", "entry", "words"),
    [
        ("flux", {"pooled_output": torch.ones(1, 6), "attention_mask": MASK}, ("carries attention_mask",)),
        ("hunyuandit", {"attention_mask": MASK}, ("no conditioning_mt5xl", "mT5")),
        (
            "hunyuanvideo",
            {"pooled_output": torch.ones(1, 6), "guiding_frame_index": 0},
            ("carries guiding_frame_index",),
        ),
        ("pixart-alpha", {"aspect_ratio": 1.5}, ("carries aspect_ratio",)),
        ("pixart-alpha", {"width": 0, "height": 8}, ("width=0",)),
    ],
)
def test_a_prompt_of_another_model_is_refused(client, family, entry, words):
    with pytest.raises(UserError) as error:
        sample(model_of(family), positive=[[torch.ones(1, 4, 8), entry]])
    assert all(word in str(error.value) for word in words), error.value
    assert not client.sent


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoded_prompt_is_one_that_travels(family):
    tensors = {each.name: torch.ones(1, 3) for each in FAMILIES[family].inputs}
    _, travelling_tensors = to_message("positive", entry_of(tensors, 2.0), family, (1, 4, 4, 4))
    assert travelling_tensors == {f"positive.0.{name}": tensor for name, tensor in tensors.items()}


# -- several prompts, each in its place ----------------------------------------------------------------------------


def test_neutral_settings_of_a_prompt_pass(client):
    sample(positive=conditioning(strength=1.0, start_percent=0.0, end_percent=1.0, control=None))
    assert client.last(messages.Sample)


def test_prompts_that_share_tensors_send_them_once(client):
    mask = torch.ones(1, 32, 32)
    prompt = conditioning(mask=mask, mask_strength=0.5, strength=0.8, end_percent=0.4)
    again = [[prompt[0][0], {**prompt[0][1], "mask": 1 - mask, "guidance": 1.5, "start_percent": 0.4}]]
    sample(positive=[*prompt, *again, *conditioning(area=(2, 4, 2, 0))])
    message, tensors = client.last(messages.Sample)
    assert message.positive == (
        messages.Conditioning(guidance=3.5, strength=0.4, end=0.4),
        messages.Conditioning(guidance=1.5, strength=0.4, start=0.4, end=0.4, prompt=0),
        messages.Conditioning(guidance=3.5, area=(2, 4, 2, 0)),
    )
    places = ("0.tokens", "0.pooled", "0.region", "1.region", "2.tokens", "2.pooled")
    assert set(tensors) == {"latent", *(f"positive.{place}" for place in places)}
    assert torch.equal(tensors["positive.0.region"], torch.ones(1, 4, 4))


def test_an_area_of_a_negative_prompt_that_is_not_evaluated_counts_for_the_positive_one(client):
    sample(negative=conditioning(area=(2, 2, 0, 0), strength=0.3))
    message, _ = client.last(messages.Sample)
    assert message.negative == ()
    assert message.positive[1] == messages.Conditioning(guidance=3.5, prompt=0, area=(2, 2, 0, 0), strength=0.3)


def test_reference_latents_travel_with_their_prompt(client):
    references = [torch.ones(1, 16, 6, 4), torch.zeros(3, 16, 2, 2)]
    prompt = conditioning(reference_latents=references, reference_latents_method="index")
    sample(positive=prompt, latent_image={"samples": torch.zeros(2, 16, 4, 4)})
    message, tensors = client.last(messages.Sample)
    assert (message.positive[0].references, message.positive[0].reference_places) == (2, "index")
    assert torch.equal(tensors["positive.0.reference.0"], references[0])
    assert tensors["positive.0.reference.1"].shape == (2, 16, 2, 2)


def test_a_part_of_the_picture_is_refused_where_strips_are_predicted(client):
    with pytest.raises(UserError, match="area of the picture, but pipefusion_degree=2"):
        sample(load(LayoutChoice(ranks=2, pipefusion_degree=2)), positive=conditioning(area=(2, 2, 0, 0)))
    assert not client.sent
