"""LATENTs of pictures, of videos, of video and sound: what travels of them, what comes back, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from paralleldit.nodes import host
from paralleldit.nodes.request import latent
from paralleldit.nodes.request.conditioning import to_message
from paralleldit.nodes.request.regions import placed_sides, refuse_places
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.families.spec import LatentSpec
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.graph.sampling import conditioning, sample
from torch import Tensor

PICTURE = (LatentSpec(16),)
VIDEO = (LatentSpec(16, name="video", dims=3, stride=(4, 8, 8)),)
COARSE = (LatentSpec(48, name="video", dims=3, stride=(4, 16, 16)),)
BOTH = (*VIDEO, LatentSpec(8, name="sound", stride=(1, 4, 1), patch=(1, 1, 1)))


class Nested:
    """As ComfyUI nests latents of video and sound."""

    is_nested = True

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def unbind(self) -> list[Tensor]:
        return self.tensors


CLIP, SOUND = torch.ones(2, 16, 3, 4, 6), torch.ones(2, 8, 7, 16)


@pytest.mark.parametrize(
    ("specs", "given", "shape"),
    [
        (PICTURE, {"samples": torch.zeros(2, 4, 6, 8)}, (2, 16, 6, 8)),
        (VIDEO, {"samples": torch.zeros(2, 16, 3, 6, 8)}, (2, 16, 3, 6, 8)),
        (VIDEO, {"samples": torch.zeros(2, 4, 6, 8)}, (2, 16, 1, 6, 8)),
        (VIDEO, {"samples": torch.ones(2, 16, 6, 8)}, (2, 16, 1, 6, 8)),
        (COARSE, {"samples": torch.zeros(1, 16, 3, 6, 9), "downscale_ratio_spacial": 8}, (1, 48, 3, 3, 4)),
        (COARSE, {"samples": torch.zeros(1, 4, 6, 8), "downscale_ratio_spacial": 16}, (1, 48, 1, 6, 8)),
        (COARSE, {"samples": torch.zeros(1, 4, 4, 6, 8), "downscale_ratio_temporal": 8}, (1, 48, 8, 6, 8)),
        (PICTURE, {"samples": torch.ones(1, 16, 6, 8), "downscale_ratio_spacial": 16}, (1, 16, 6, 8)),
    ],
    ids=[
        "channels of a picture",
        "a video",
        "an empty picture is one frame",
        "a picture is one frame",
        "made for smaller cells",
        "made for these cells",
        "made for longer cells",
        "what is not empty stays",
    ],
)
def test_an_empty_latent_becomes_the_models_own_and_a_picture_one_frame(specs, given, shape):
    latents, tensors = latent.to_message(given, specs, "some")
    assert tensors.keys() == {"latent"}
    assert tensors["latent"].shape == latents[specs[0].name].shape == shape
    back = latent.from_reply({**given, "other": 1}, specs, {"latent": torch.ones(1)})
    assert back == {"samples": back["samples"], "other": 1}, "the ratio was of the empty one"


@pytest.mark.parametrize(
    ("specs", "mask", "shape"),
    [
        (PICTURE, torch.ones(9, 9), (1, 1, 9, 9)),
        (PICTURE, torch.ones(2, 9, 9), (2, 1, 9, 9)),
        (VIDEO, torch.ones(9, 9), (1, 1, 1, 9, 9)),
        (VIDEO, torch.ones(5, 9, 9), (1, 1, 5, 9, 9)),
        (VIDEO, torch.ones(5, 1, 9, 9), (1, 1, 5, 9, 9)),
        (VIDEO, torch.ones(2, 1, 3, 9, 9), (2, 1, 3, 9, 9)),
    ],
)
def test_a_masks_first_dim_counts_pictures_and_of_a_video_frames(specs, mask, shape):
    samples = CLIP if specs is VIDEO else CLIP[:, :, 0]
    _, tensors = latent.to_message({"samples": samples, "noise_mask": mask}, specs, "some")
    assert tensors["noise_mask"].shape == shape


@pytest.mark.parametrize("masks", [0, 1, 2])
def test_nested_latents_are_taken_apart_and_put_together_again(masks):
    given: dict[str, Any] = {"samples": Nested([CLIP, SOUND]), "batch_index": [1, 0]}
    if masks:
        given["noise_mask"] = Nested([torch.ones(2, 1, 3, 4, 6), torch.ones(2, 1, 7, 16)][:masks])
    latents, tensors = latent.to_message(given, BOTH, "some")
    names = ("latent.video", "latent.sound", "noise_mask.video", "noise_mask.sound")
    assert tuple(tensors) == names[: 2 + masks]
    assert list(latents) == ["video", "sound"]
    back = latent.from_reply(given, BOTH, {name: tensor + 1 for name, tensor in tensors.items()})
    assert [torch.equal(one, other + 1) for one, other in zip(back["samples"].unbind(), (CLIP, SOUND), strict=True)]
    assert (type(back["samples"]), back["batch_index"]) == (Nested, [1, 0])
    assert latent.batch_index(given, 2) == (1, 0)


@pytest.mark.parametrize(
    ("specs", "samples", "words"),
    [
        (PICTURE, CLIP, ("5 dims", "takes 4", "pictures")),
        (VIDEO, CLIP[0, 0], ("3 dims", "takes 5", "videos")),
        (VIDEO, CLIP[:, :4], ("4 channels", "16")),
        (VIDEO, CLIP[:, :, :0], ("empty", "[2, 16, 0, 4, 6]")),
        (VIDEO, CLIP * torch.nan, ("NaN", f"{CLIP.numel()} of {CLIP.numel()}")),
        (VIDEO, Nested([CLIP, SOUND]), ("2 latents", "some samples one latent: video")),
        (BOTH, CLIP, ("one latent", "some samples 2 latents: video, sound")),
    ],
)
def test_a_latent_that_is_none_of_the_models_is_refused_by_name(specs, samples, words):
    with pytest.raises(UserError) as error:
        latent.to_message({"samples": samples}, specs, "some")
    assert all(word in str(error.value) for word in words), error.value
    assert error.value.hint


def test_parallel_sampler_samples_a_video(client, monkeypatch):
    monkeypatch.setitem(FAMILIES, "flux", replace(FAMILIES["flux"], latents=VIDEO))
    masks = torch.stack([torch.full((32, 48), float(frame)) for frame in range(3)])
    positive = [*conditioning(mask=masks), *conditioning(area=(2, 6, 1, 0))]
    out = sample(latent_image={"samples": torch.zeros(2, 16, 3, 4, 6)}, positive=positive)
    message, tensors = client.last(messages.Sample)
    assert message.positive[1].area == (2, 6, 1, 0)
    assert tensors["positive.0.region"].shape == (1, 3, 4, 6)
    assert tensors["positive.0.region"].mean(dim=(0, 2, 3)).tolist() == [0.0, 1.0, 2.0]
    assert out["samples"].shape == (2, 16, 3, 4, 6)


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (torch.ones(16, 16), (1, 1, 4, 6)),
        (torch.ones(1, 16, 16), (1, 1, 4, 6)),
        (torch.ones(3, 16, 16), (1, 3, 4, 6)),
        (torch.ones(2, 3, 4, 6), (2, 3, 4, 6)),
    ],
)
def test_a_prompts_mask_counts_in_every_frame_or_in_its_own(mask, shape):
    placed = placed_sides(conditioning(mask=mask), [], CLIP.shape)["positive"]
    assert placed[0][1]["mask"].shape == shape


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"area": (3, 4, 6, 0, 0, 0)}, ("6 numbers", "all frames")),
        ({"area": ("percentage", 1.0, 0.5, 0.0, 0.0)}, ("in percents", "pictures only")),
        ({"mask": torch.ones(2, 8, 8)}, ("masks for 2 frames", "has 3")),
        ({"mask": torch.ones(8, 8), "set_area_to_bounds": True}, ("bounds of a mask",)),
        ({"mask": torch.ones(1, 1, 1, 8, 8)}, ("[1, 1, 1, 8, 8]", "[frames, height, width]")),
        ({"area": (2, 6, 4, 0)}, ("area of 6 x 2 cells at 0, 4", "6 x 4")),
    ],
)
def test_what_is_no_place_in_a_video_is_refused(entry, words):
    with pytest.raises(UserError) as error:
        to_message("positive", placed_sides(conditioning(**entry), [], CLIP.shape)["positive"], "flux", CLIP.shape)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("entry", [{"area": (2, 6, 1, 0)}, {"mask": torch.ones(1, 8, 8)}])
def test_places_in_video_and_sound_are_refused(entry):
    refuse_places({"positive": conditioning(), "negative": conditioning(area=None)}, "some")
    with pytest.raises(UserError, match="negative conditioning has one"):
        refuse_places({"positive": conditioning(), "negative": conditioning(**entry)}, "some")


@pytest.mark.parametrize(
    ("rows", "numbers", "batch", "expected"),
    [(3, [4, 0, 2], 3, (4, 0, 2)), (3, [5], 3, (5, 5, 5)), (1, [1, 0], 2, (1, 0)), (1, [7], 1, (7,))],
    ids=["one each", "one for all", "one latent for several", "one"],
)
def test_draws_of_noise_count_as_in_comfyui(rows, numbers, batch, expected):
    given = {"samples": torch.ones(rows, 16, 4, 4), "batch_index": numbers}
    latents, _ = latent.to_message(given, PICTURE, "flux")
    assert len(latents[PICTURE[0].name]) == batch
    assert latent.batch_index(given, batch) == expected


def test_draws_of_noise_for_other_latents_are_refused():
    with pytest.raises(UserError, match="2 numbers for a batch of 3"):
        latent.batch_index({"batch_index": [0, 1]}, 3)
    for numbers in ([0, -1], [1 << 16, 0], [10**400, 0]):
        with pytest.raises(UserError, match="from 0 to 65535"):
            latent.batch_index({"batch_index": numbers}, 2)


def test_latents_come_back_in_the_type_that_the_host_keeps(client, monkeypatch):
    monkeypatch.setattr(host.current(), "kept", lambda tensor: tensor.half())
    back = sample(latent_image={"samples": torch.zeros(1, 16, 4, 4, dtype=torch.float16)})
    assert back["samples"].dtype == torch.float16
    (tensors,) = (tensors for message, tensors in client.sent if isinstance(message, messages.Sample))
    assert tensors["latent"].dtype == torch.float16, "by it the ranks round the noise, as ComfyUI does"
