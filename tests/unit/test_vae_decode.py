"""Latents to pictures and back on one rank: ComfyUI's conventions, tiles, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.vae.decode import decode
from paralleldit.parallel_backend.vae.encode import encode
from paralleldit.parallel_backend.vae.load import LoadedVAE
from paralleldit.parallel_backend.vae.tiles import Tiling, blend_weights, spans
from paralleldit.tests import tiny_vaes
from torch import Tensor

ALONE = Axis("alone", [0], None, Ledger())


def new_vae(channels: int = 4, dtype: torch.dtype = torch.float32) -> LoadedVAE:
    torch.manual_seed(5)
    module = AutoencoderKL(
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=4,
    )
    return LoadedVAE(module.to(dtype).eval().requires_grad_(False), "tiny")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def smooth(*shape: int) -> Tensor:
    """Slow waves over height and width."""
    rows = torch.linspace(0, 2, shape[2])[:, None]
    columns = torch.linspace(0, 3, shape[3])
    phases = torch.arange(shape[0] * shape[1]).reshape(shape[0], shape[1], 1, 1)
    return torch.sin(rows + columns + phases) / 2


def plain(vae: LoadedVAE, latent: Tensor) -> Tensor:
    with torch.no_grad():
        return ((vae.module.decode(latent).sample + 1) / 2).clamp(0, 1).movedim(1, -1)


@pytest.mark.parametrize("shape", [(1, 4, 5, 7), (3, 4, 2, 1)])
def test_a_decoded_picture_is_the_hosts_image_type(shape):
    vae = new_vae()
    vae.module.decoder.conv_out.weight *= 20
    image = decode(vae, noise(*shape), ALONE)
    assert image.shape == (shape[0], shape[2] * 8, shape[3] * 8, 3)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert (image.min(), image.max()) == (0, 1)
    torch.testing.assert_close(image, plain(vae, noise(*shape)), rtol=0, atol=1e-4)


@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 59))
def test_spans_cover_everything_and_share_the_overlap(extent, tile, overlap):
    overlap = min(overlap, tile - 1)
    stretches = spans(extent, tile, overlap)
    assert {span.size for span in stretches} == {min(tile, extent)}
    assert stretches[0].start == 0
    assert stretches[-1].start + stretches[-1].size == extent
    for before, after in pairwise(stretches):
        assert before.start < after.start <= before.start + before.size - overlap


@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 39), st.sampled_from([1, 8]))
def test_blend_weights_are_shares_of_each_pixel(extent, tile, overlap, scale):
    stretches = spans(extent, tile, min(overlap, tile - 1))
    total = torch.zeros(extent * scale)
    for span, weight in blend_weights(stretches, scale).items():
        assert weight.min() > 0
        total[span.start * scale : (span.start + span.size) * scale] += weight
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("tile_size", [64, 72, 4096])
def test_one_tile_over_the_whole_picture_is_exact(tile_size):
    vae, latent = new_vae(), noise(2, 4, 8, 6)
    assert torch.equal(decode(vae, latent, ALONE, Tiling(tile_size, 16)), decode(vae, latent, ALONE))


def test_blended_tiles_leave_no_seams_in_a_smooth_picture():
    vae, latent = new_vae(), smooth(1, 4, 24, 28)
    for weight in vae.module.decoder.parameters():
        if weight.ndim == 4:
            weight.copy_(weight.sum((-2, -1), keepdim=True) / weight[0, 0].numel() ** 0.5)  # blurs

    def worst_jump(*tiling: Tiling) -> float:
        """The greatest difference of two neighbouring pixels."""
        image = decode(vae, latent, ALONE, *tiling)
        return max(float(image.diff(dim=dim).abs().max()) for dim in (1, 2))

    whole = worst_jump()
    assert worst_jump(Tiling(96, 0)) > 2 * whole
    assert worst_jump(Tiling(96, 32)) < 1.2 * whole


def test_progress_counts_pictures_or_tiles():
    seen: list[tuple[int, int]] = []
    decode(new_vae(), noise(3, 4, 2, 2), ALONE, on_progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    decode(new_vae(), noise(1, 4, 8, 4), ALONE, Tiling(32, 0), on_progress=lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2)]
    seen.clear()
    encode(new_vae(), torch.rand(2, 8, 8, 3), ALONE, on_progress=lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2)]


NAN = float("nan")
REFUSED = {
    "channels": (noise(1, 16, 4, 4), (), "16 channels, the VAE tiny takes 4"),
    "video": (noise(1, 4, 2, 4, 4), (), r"\[1, 4, 2, 4, 4\]"),
    "empty": (torch.zeros(0, 4, 4, 4), (), r"\[0, 4, 4, 4\]"),
    "not finite": (torch.tensor([NAN, 1, -NAN, 2]).reshape(1, 4, 1, 1), (), "2 of its 4 values"),
    "tile_size": (noise(1, 4, 4, 4), (Tiling(100, 64),), "tile_size is 100, but must be a multiple of 8"),
    "negative": (noise(1, 4, 4, 4), (Tiling(-8, 64),), "tile_size is -8"),
    "overlap": (noise(1, 4, 4, 4), (Tiling(64, 9),), "overlap is 9"),
    "all overlap": (noise(1, 4, 4, 4), (Tiling(64, 64),), "64 pixels cannot overlap by 64"),
}


@pytest.mark.parametrize(("latent", "tiling", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_decoded_is_refused(latent, tiling, message):
    with pytest.raises(UserError, match=message):
        decode(new_vae(), latent, ALONE, *tiling)


def test_non_finite_pixels_are_an_error_and_not_a_black_picture():
    vae = new_vae(dtype=torch.float16)
    vae.module.decoder.conv_in.weight.fill_(60000)
    with pytest.raises(UserError, match=r"non-finite pixels in torch.float16. Load it as bfloat16"):
        decode(vae, noise(1, 4, 4, 4), ALONE)


def test_encoding_takes_the_mode_of_the_middle_of_the_picture():
    vae, image = new_vae(), torch.rand(2, 37, 42, 3)
    middle = image[:, 2:34, 1:41].movedim(-1, 1) * 2 - 1
    with torch.no_grad():
        expected = vae.module.encode(middle).latent_dist.mode()
    latent = encode(vae, image, ALONE)
    assert latent.shape == (2, 4, 4, 5)
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 16, 16, 4), r"\[1, 16, 16, 4\] cannot be encoded by tiny: expected was \[B, H, W, 3\]"),
        (torch.rand(1, 16, 7, 3), "7 x 16 pixels is smaller than the 8"),
        (torch.full((1, 8, 8, 3), NAN), "not finite"),
    ],
)
def test_what_cannot_be_encoded_is_refused(image, message):
    with pytest.raises(UserError, match=message):
        encode(new_vae(), image, ALONE)


def test_frames_that_do_not_fit_are_refused():
    vae = tiny_vaes.new_vae("AutoencoderKLWan (2.1)")
    with pytest.raises(UserError, match=r"video of 7 frames does not fit .* 4 each\. Give it 5 or 9 frames"):
        encode(vae, torch.rand(1, 7, 8, 8, 3), ALONE)
    with pytest.raises(
        UserError, match=r"\[1, 4, 2, 2\] cannot be decoded by tiny: expected was \[B, C, frames, h, w\]"
    ):
        decode(vae, noise(1, 4, 2, 2), ALONE)


def test_latents_of_ltx_are_normalised_as_in_the_graph():
    vae = tiny_vaes.new_vae("AutoencoderKLLTXVideo")
    vae.module.latents_mean.copy_(torch.arange(8) - 3)
    vae.module.latents_std.copy_(torch.arange(8) + 0.5)
    image = torch.rand(1, 1, 32, 32, 3)
    latent = encode(vae, image, ALONE)
    raw = vae.module.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    mean, deviation = (each.view(1, 8, 1, 1, 1) for each in (vae.module.latents_mean, vae.module.latents_std))
    torch.testing.assert_close(latent * deviation + mean, raw, rtol=0, atol=1e-5)
    expected = vae.module.decode(raw).sample
    torch.testing.assert_close(
        decode(vae, latent, ALONE), (expected.movedim(1, -1) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4
    )
