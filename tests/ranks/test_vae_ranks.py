"""Decoding across ranks gives the picture that one rank decodes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from paralleldit.parallel_backend.comm import Axis, Ledger
from paralleldit.parallel_backend.vae.decode import decode
from paralleldit.parallel_backend.vae.load import LoadedVAE
from torch import Tensor

FLUX = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SD = {"latent_channels": 4}
CONFIGS = {
    "flux": FLUX,
    "sd": SD,
    "without attention": {"latent_channels": 16, "mid_block_add_attention": False, "layers_per_block": 2},
}

# batch, rows, columns: odd, uneven over the ranks, one row per rank, fewer rows than ranks
SHAPES = ((1, 17, 8), (3, 9, 5), (1, 4, 6), (2, 3, 6), (3, 1, 2))


def new_vae(config: dict, dtype: torch.dtype = torch.float32) -> LoadedVAE:
    torch.manual_seed(5)
    module = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        **config,
    )
    return LoadedVAE(module.to(dtype).eval().requires_grad_(False), "tiny")


def latents(config: dict, shape: tuple[int, int, int]) -> Tensor:
    batch, height, width = shape
    generator = torch.Generator().manual_seed(height)
    return torch.randn(batch, config["latent_channels"], height, width, generator=generator)


def plain(vae: LoadedVAE, latent: Tensor) -> Tensor:
    return ((vae.module.decode(latent.to(vae.dtype)).sample.float() + 1) / 2).clamp(0, 1).movedim(1, -1)


def alone() -> Axis:
    return Axis("alone", [dist.get_rank()], None, Ledger())


def decode_errors(axis: Axis, config: dict) -> list[float]:
    """Greatest deviation from the plain decode per shape, all by the same loaded VAE."""
    vae = new_vae(config)
    return [
        float((decode(vae, latents(config, shape), axis) - plain(vae, latents(config, shape))).abs().max())
        for shape in SHAPES
    ]


@pytest.mark.parametrize(("n", "config"), [*product((1, 2, 4), ("flux", "sd")), (3, "flux"), (2, "without attention")])
def test_every_rank_gets_the_plain_decode(ranks, n, config):
    for errors in ranks.run(n, decode_errors, CONFIGS[config]):
        assert max(errors) < 1e-4, dict(zip(SHAPES, errors, strict=True))


def decode_by_tiles(axis: Axis) -> tuple[Tensor, list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []
    options = {"tile_size": 24, "overlap": 8, "on_progress": lambda *step: seen.append(step)}
    return decode(new_vae(SD), latents(SD, (2, 9, 13)), axis, **options), seen


def test_tiles_give_the_same_picture_on_any_number_of_ranks(ranks):
    image, _ = ranks.run(1, decode_by_tiles)[0]
    for n in (2, 4):
        for other, seen in ranks.run(n, decode_by_tiles):
            assert torch.equal(other, image)
            assert seen == [(min(done, 12), 12) for done in range(n, 12 + n, n)]


def decode_across_two_groups(axis: Axis) -> dict[str, float | bool]:
    """The same VAE on one group, then on another, then alone again."""
    vae, latent = new_vae(FLUX), latents(FLUX, (1, 6, 4))
    names = list(vae.module.state_dict())
    first = plain(vae, latent)
    again = Axis("again", axis.ranks, dist.new_group(list(axis.ranks), use_local_synchronization=True), Ledger())
    errors = [float((decode(vae, latent, here) - first).abs().max()) for here in (axis, again, axis, again)]
    mine = {parameter.data_ptr() for parameter in vae.module.parameters()}
    return {
        "error": max(errors),
        "unchanged": list(vae.module.state_dict()) == names and torch.equal(decode(vae, latent, alone()), first),
        "shared": all(p.data_ptr() in mine for p in vae.row_parallel(again.group).parameters()),
    }


def test_groups_may_change_and_the_plain_decoder_stays_as_it_was(ranks):
    for seen in ranks.run(2, decode_across_two_groups):
        assert seen["error"] < 1e-4
        assert seen["unchanged"]
        assert seen["shared"]


def half_precision_errors(axis: Axis, dtype: torch.dtype) -> tuple[float, float]:
    """Mean deviation from the fp32 picture with activations in the thousands: of the plain decode, and across ranks."""
    exact, rounded, latent = new_vae(FLUX), new_vae(FLUX, dtype), latents(FLUX, (1, 9, 8))
    for vae in (exact, rounded):
        vae.module.decoder.conv_in.weight *= 1000
    truth = plain(exact, latent)
    return tuple(
        float((image - truth).abs().mean()) for image in (plain(rounded, latent), decode(rounded, latent, axis))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_across_ranks_as_on_one(ranks, dtype):
    for on_one, across in ranks.run(2, half_precision_errors, dtype):
        assert across < 1.2 * on_one


def refuse(axis: Axis) -> str:
    try:
        decode(new_vae(SD), latents(FLUX, (1, 4, 4)), axis)
    except Exception as error:  # noqa: BLE001 its name is what the test looks at
        return f"{type(error).__name__}: {error}"
    return "decoded"


def test_every_rank_refuses_a_wrong_latent_alike(ranks):
    for answer in ranks.run(2, refuse):
        assert answer.startswith("UserError: The latent has 16 channels, the VAE tiny takes 4.")
