"""The VAE nodes without ComfyUI and without ranks: what they send, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paralleldit import NODE_CLASS_MAPPINGS
from paralleldit.launcher import devices
from paralleldit.nodes import host
from paralleldit.nodes.layout_choice import LayoutChoice
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.graph.sampling import NAME, node


def test_a_vae_decodes_and_encodes(client):
    vae = node("VAELoader").load(NAME, "fp32")[0]
    assert node("VAEDecode").decode({"samples": torch.zeros(1, 16, 4, 6)}, vae, 256, 32)[0].shape == (1, 32, 48, 3)
    message, _ = client.last(messages.Decode)
    assert (message.vae.weight_dtype, message.tile_size, message.overlap) == ("fp32", 256, 32)
    latent = node("VAEEncode").encode(torch.zeros(2, 16, 24, 4), vae, 128, 16)[0]
    assert latent["samples"].shape == (2, 1, 2, 3)
    message, tensors = client.last(messages.EncodeImage)
    assert (message.tile_size, message.overlap, tensors["image"].shape[-1]) == (128, 16, 3)


def test_a_vae_without_encoder_is_not_asked_to_encode(client):
    vae = node("VAELoader").load(NAME, "fp32")[0]
    decoder = {name: key for name, key in vae.header.names.items() if name.startswith("decoder.")}
    vae = replace(vae, header=replace(vae.header, names=decoder))
    with pytest.raises(UserError, match="tiny cannot encode: it holds no encoder"):
        node("VAEEncode").encode(torch.zeros(1, 16, 16, 3), vae, 0, 0)
    assert not client.sent


def test_what_to_do_without_memory_is_told(client):
    vae = node("VAELoader").load(NAME, "fp32")[0]
    pixels, mask = torch.ones(1, 16, 16, 3), torch.zeros(1, 16, 16)
    for run in (
        lambda *policy: node("VAEDecode").decode({"samples": torch.zeros(1, 16, 4, 6)}, vae, 0, 64, *policy),
        lambda *policy: node("VAEEncode").encode(pixels, vae, 0, 64, *policy),
        lambda *policy: node("VAEEncodeForInpaint").encode(pixels, vae, mask, 0, 0, 64, *policy),
    ):
        for policy in ((), ("tiles",)):
            run(*policy)
            assert client.sent[-1][0].on_out_of_memory == (*policy, "error")[0]


def test_a_vae_with_ranks_of_its_own_has_a_sidecar_of_its_own(client):
    usual = host.current().spec
    vae = node("VAELoader").load(NAME, "fp32", LayoutChoice(ranks=3), 1)[0]
    vae.decode(torch.zeros(1, 16, 4, 6))
    spec = client.specs[-1]
    assert (spec.ranks, spec.slot.directory) == (1, usual.slot.vae.directory)
    assert spec.slot.directory != usual.slot.directory
    node("VAELoader").load(NAME, "fp32", LayoutChoice(ranks=3))[0].decode(torch.zeros(1, 16, 4, 6))
    assert (client.specs[-1].ranks, client.specs[-1].slot.directory) == (3, usual.slot.directory)


@pytest.mark.parametrize(
    ("sampling", "own", "gpus", "hint"),
    [
        (3, 1, (3,), ""),
        (2, 2, (2, 3), ""),
        (0, 1, None, "ranks of Parallel Layout to 3"),
        (3, 2, None, "own_ranks to 1"),
        (0, 4, None, "Set own_ranks to 0: "),
    ],
)
def test_a_vae_of_its_own_takes_the_last_gpus(client, monkeypatch, sampling, own, gpus, hint):
    host.use(host.Host(models=host.current().models, spec=replace(host.current().spec, device="cuda")))
    monkeypatch.setattr(devices, "gpu_count", lambda python: 4)
    vae = node("VAELoader").load(NAME, "fp32", LayoutChoice(ranks=sampling), own)[0]
    if gpus is None:
        with pytest.raises(UserError, match=f"need .* GPUs, but torch sees 4.* {hint}"):
            vae.decode(torch.zeros(1, 16, 4, 6))
    else:
        vae.decode(torch.zeros(1, 16, 4, 6))
        assert client.specs[-1].gpus == gpus


def test_a_vae_of_its_own_needs_a_sidecar_of_this_host(client):
    spec = replace(host.current().spec, address="tcp://far:1", remote=True)
    vae = node("VAELoader").load(NAME, "fp32", None, 1)[0]
    host.use(host.Host(models=host.current().models, spec=spec))
    with pytest.raises(UserError, match=r"own_ranks=1 starts a second sidecar .* at tcp://far:1"):
        vae.decode(torch.zeros(1, 16, 4, 6))


def test_stock_vae_nodes_find_what_they_ask_of_a_vae(client):
    vae = node("VAELoader").load(NAME, "fp32")[0]
    ratio = vae.downscale_ratio
    assert (ratio, vae.spacial_compression_decode(), vae.spacial_compression_encode()) == (8, 8, 8)
    assert (vae.temporal_compression_decode(), vae.latent_channels) == (None, 16)
    assert vae.decode(torch.zeros(1, 16, 4, 6)).shape == (1, 32, 48, 3)
    assert vae.encode(torch.zeros(1, 16, 16, 4)).shape == (1, 1, 2, 2)
    vae.decode_tiled(torch.zeros(1, 16, 4, 6), tile_x=4, tile_y=4, overlap=1, tile_t=None, overlap_t=None)
    assert client.last(messages.Decode)[0].tile_size == 4 * ratio
    vae.encode_tiled(torch.zeros(1, 64, 64, 3), tile_x=32, tile_y=32, overlap=8, tile_t=None, overlap_t=None)
    assert client.last(messages.EncodeImage)[0].overlap == 8


VIDEO = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}


@pytest.mark.parametrize(("masks", "video"), [(1, False), (1, True), (5, True)])
def test_encoding_for_inpainting_greys_what_the_mask_covers_and_grows_it(client, masks, video):
    vae = node("VAELoader").load(NAME, "fp32")[0]
    if video:
        vae = replace(vae, header=replace(vae.header, name="AutoencoderKLWan", config=VIDEO))
    pixels, mask = torch.ones(5, 34, 41, 3), torch.zeros(masks, 34, 41)
    mask[-1, 10:14, 20:22] = 1
    latent = node("VAEEncodeForInpaint").encode(pixels, vae, mask, 3, 0, 64)[0]
    image = client.last(messages.EncodeImage)[1]["image"]
    assert image.shape == (1,) * video + (5, 32, 40, 3)
    grey = [0, 0, 0, 0, 4 * 2 * 3] if masks > 1 else [4 * 2 * 3] * 5
    assert (image == 0.5).sum(dim=(-3, -2, -1)).flatten().tolist() == grey
    assert latent["noise_mask"].shape == (masks, 1, 32, 40)
    grown = latent["noise_mask"].nonzero()[:, 2:]
    assert (grown.amin(0).tolist(), grown.amax(0).tolist()) == ([8, 19], [13, 22])


def test_masks_that_do_not_fit_the_pictures_are_counted(client):
    vae = node("VAELoader").load(NAME, "fp32")[0]
    with pytest.raises(UserError, match="3 masks do not fit 5 pictures"):
        node("VAEEncodeForInpaint").encode(torch.ones(5, 16, 16, 3), vae, torch.zeros(3, 16, 16), 0, 0, 64)
    assert not client.sent


@pytest.mark.parametrize(
    ("tile_size", "overlap", "words"), [(64, 64, "overlap=64"), (64, 128, "overlap=128"), (-8, 0, "tile_size=-8")]
)
def test_tiles_without_room_are_refused(client, tile_size, overlap, words):
    with pytest.raises(UserError, match=words):
        NODE_CLASS_MAPPINGS["ParallelDiTVAEDecode"].VALIDATE_INPUTS(tile_size, overlap)


def test_a_vae_of_comfyui_is_not_decoded_by_the_ranks(client):
    with pytest.raises(UserError, match="not loaded by Parallel VAE Loader"):
        node("VAEDecode").decode({"samples": torch.zeros(1, 16, 4, 4)}, object(), 0, 0)
    with pytest.raises(UserError, match="not loaded by Parallel VAE Loader"):
        node("VAEEncode").encode(torch.zeros(1, 16, 16, 3), object(), 0, 0)
