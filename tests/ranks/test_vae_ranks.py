"""Decoding and encoding across ranks gives what the plain diffusers VAE gives in one process."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from paralleldit.parallel_backend.comm import Axis
from paralleldit.parallel_backend.vae.decode import decode
from paralleldit.parallel_backend.vae.encode import encode
from paralleldit.parallel_backend.vae.load import LoadedVAE
from paralleldit.parallel_backend.vae.run import NO_TILES, Tiling
from torch import Tensor

KL = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "AutoencoderKL (Flux)": (
        "AutoencoderKL",
        KL | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    ),
    "AutoencoderKL (SD)": ("AutoencoderKL", KL | {"latent_channels": 4}),
    "AutoencoderKL without attention": (
        "AutoencoderKL",
        KL | {"latent_channels": 4, "mid_block_add_attention": False, "layers_per_block": 2},
    ),
}
"""By what the README calls it: class and config of a tiny one."""

# batch, latent rows and columns: odd, uneven over the ranks, one row per rank, fewer rows than ranks
SHAPES = ((1, 17, 8), (3, 9, 5), (1, 4, 6), (2, 3, 6), (3, 1, 2))
TOLERANCE = 1e-5


def new_vae(case: str, dtype: torch.dtype = torch.float32) -> LoadedVAE:
    torch.manual_seed(5)
    name, config = CASES[case]
    return LoadedVAE(getattr(diffusers, name)(**config).to(dtype).eval().requires_grad_(False), "tiny")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-2]))


def latents(vae: LoadedVAE, batch: int, height: int, width: int) -> Tensor:
    return noise(batch, vae.latent_channels, height, width)


def images(vae: LoadedVAE, batch: int, height: int, width: int) -> Tensor:
    """Of latents of `height` x `width`."""
    return noise(batch, vae.image_channels, height * vae.scale, width * vae.scale).movedim(1, -1).div(6).add(0.5)


def plain_decode(vae: LoadedVAE, latent: Tensor) -> Tensor:
    """-1 to 1, as diffusers has it."""
    return vae.module.decode(latent.to(vae.dtype)).sample.float()


def plain_encode(vae: LoadedVAE, image: Tensor) -> Tensor:
    return vae.module.encode((image * 2 - 1).movedim(-1, 1).to(vae.dtype)).latent_dist.mode().float()


def widen(image: Tensor) -> Tensor:
    return image.movedim(-1, 1) * 2 - 1


def error(mine: Tensor, truth: Tensor) -> float:
    return float((mine - truth).norm() / truth.norm())


def errors(axis: Axis, case: str) -> list[tuple[float, float]]:
    """Relative error of decode and encode per shape, all by the same loaded VAE; on the first rank."""
    vae, found = new_vae(case), []
    vae.module.decoder.conv_out.weight.mul_(0.2)  # else the picture is cut off at 0 and 1
    for shape in SHAPES:
        picture, latent = decode(vae, latents(vae, *shape), axis), encode(vae, images(vae, *shape), axis)
        assert (picture is None) == (latent is None) == (axis.rank > 0)
        if picture is not None and latent is not None:
            truth = plain_decode(vae, latents(vae, *shape))
            assert truth.abs().max() < 1
            found.append((error(widen(picture), truth), error(latent, plain_encode(vae, images(vae, *shape)))))
    return found


RUNS = [
    *((n, case) for n in (1, 2, 3, 4) for case in CASES if "without" not in case or n == 2),
    *((n, "AutoencoderKL (Flux)") for n in (5, 6, 7, 8)),
]


@pytest.mark.parametrize(("n", "case"), RUNS)
def test_the_plain_decode_and_encode(ranks, n, case):
    for shape, (decoded, encoded) in zip(SHAPES, ranks.run(n, errors, case)[0], strict=True):
        assert decoded <= TOLERANCE, shape
        assert encoded <= TOLERANCE, shape


def by_tiles(axis: Axis) -> tuple[Tensor | None, Tensor | None, list[tuple[int, int]]]:
    vae, tiling = new_vae("AutoencoderKL (SD)"), Tiling(24, 8)
    seen: list[tuple[int, int]] = []
    picture = decode(vae, latents(vae, 2, 9, 13), axis, tiling, on_progress=lambda *step: seen.append(step))
    return picture, encode(vae, images(vae, 2, 9, 13), axis, tiling), seen


def test_tiles_give_the_same_on_any_number_of_ranks(ranks):
    picture, latent, _ = ranks.run(1, by_tiles)[0]
    for n in (2, 4):
        answers = ranks.run(n, by_tiles)
        assert torch.equal(answers[0][0], picture)
        assert torch.equal(answers[0][1], latent)
        for _, _, seen in answers:
            assert seen == [(min(done, 12), 12) for done in range(n, 12 + n, n)]


def half_precision_errors(axis: Axis, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Mean deviation from fp32, with activations in the thousands: of the plain VAE, and across ranks."""
    exact, rounded = (new_vae("AutoencoderKL (Flux)", each) for each in (torch.float32, dtype))
    for vae in (exact, rounded):
        vae.module.decoder.conv_in.weight *= 1000
        vae.module.encoder.conv_in.weight *= 1000
    latent, image = latents(exact, 1, 9, 8), images(exact, 1, 9, 8)
    picture, encoded = decode(rounded, latent, axis, NO_TILES), encode(rounded, image, axis, NO_TILES)
    if picture is None or encoded is None:
        return []
    decoded = [plain_decode(vae, latent).clamp(-1, 1) for vae in (exact, rounded)]
    modes = [plain_encode(vae, image) for vae in (exact, rounded)]
    return [
        (float((on_one - truth).abs().mean()), float((across - truth).abs().mean()))
        for (truth, on_one), across in ((decoded, widen(picture)), (modes, encoded))
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_across_ranks_as_on_one(ranks, dtype):
    for on_one, across in ranks.run(2, half_precision_errors, dtype)[0]:
        assert across < 1.2 * on_one


def refuse(axis: Axis) -> str:
    vae = new_vae("AutoencoderKL (SD)")
    try:
        decode(vae, noise(1, 16, 4, 4), axis)
    except Exception as error:  # noqa: BLE001 its name is what the test looks at
        return f"{type(error).__name__}: {error}"
    return "decoded"


def overflow(axis: Axis) -> str:
    vae = new_vae("AutoencoderKL (SD)", torch.float16)
    vae.module.decoder.conv_in.weight.fill_(60000)
    latent = latents(vae, 1, 8, 4)
    try:
        decode(vae, latent, axis)
    except Exception as error:  # noqa: BLE001 its name is what the test looks at
        return f"{type(error).__name__}: {error}"
    return "decoded"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (refuse, "UserError: The latent has 16 channels, the VAE tiny takes 4."),
        (overflow, "UserError: The VAE tiny gave non-finite pixels in torch.float16."),
    ],
)
def test_every_rank_refuses_alike(ranks, function, words):
    for answer in ranks.run(2, function):
        assert answer.startswith(words)
