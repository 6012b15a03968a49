"""Decoding and encoding across ranks gives what the plain diffusers VAE gives in one process."""

from __future__ import annotations

import pytest
import torch
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.errors import Cancelled
from paralleldit.parallel_backend.vae.decode import decode
from paralleldit.parallel_backend.vae.encode import encode
from paralleldit.parallel_backend.vae.load import LoadedVAE
from paralleldit.parallel_backend.vae.tiles import NO_TILES, Tiling
from paralleldit.tests.covering import WHOLE
from paralleldit.tests.tiny_vaes import CASES, new_vae
from torch import Tensor, nn

IMAGES = ((1, 17, 8), (3, 9, 5), (1, 4, 6), (3, 1, 2))
"""Batch, latent rows and columns: odd, uneven over the ranks, one row per rank, fewer rows than ranks."""
VIDEOS = ((1, 3, 9, 5), (2, 2, 4, 3))
"""Batch, latent frames, rows and columns."""
TOLERANCE = 1e-5


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-2]))


def latents(vae: LoadedVAE, batch: int, *size: int) -> Tensor:
    """Of (frames and) latent rows and columns."""
    return noise(batch, vae.latent_channels, *size)


def images(vae: LoadedVAE, batch: int, *size: int) -> Tensor:
    """Of the latents of `size`."""
    *frames, height, width = size
    frames = [(each - 1) * (vae.frames or 1) + 1 for each in frames]
    pixels = noise(batch, vae.image_channels, *frames, height * vae.scale, width * vae.scale)
    return pixels.movedim(1, -1).div(6).add(0.5)


def plain_decode(vae: LoadedVAE, latent: Tensor) -> Tensor:
    """-1 to 1, as diffusers has it."""
    if vae.module.config.get("timestep_conditioning"):
        # Noise and timestep are those of ComfyUI, drawn from our seed.
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        return vae.module.decode(latent * 0.975 + noise * 0.025, torch.full((len(latent),), 0.05)).sample
    return vae.module.decode(latent.to(vae.dtype)).sample.float()


def plain_encode(vae: LoadedVAE, image: Tensor) -> Tensor:
    encoded = vae.module.encode((image * 2 - 1).movedim(-1, 1).to(vae.dtype))
    return (encoded.latent if "latent" in encoded else encoded.latent_dist.mode()).float()


def widen(image: Tensor) -> Tensor:
    return image.movedim(-1, 1) * 2 - 1


def error(mine: Tensor, truth: Tensor) -> float:
    return float((mine - truth).norm() / truth.norm())


def quiet_vae(case: str, device: torch.device | str = "cpu") -> LoadedVAE:
    """One whose pictures are not cut off at 0 and 1."""
    vae = new_vae(case)
    named = vae.module.decoder.named_modules()
    layers = [
        part for name, part in named if isinstance(part, nn.Conv2d | nn.Conv3d | nn.Linear) and "time_" not in name
    ]
    layers[-1].weight.mul_(0.05)
    vae.module.to(device)
    return vae


def shapes_of(vae: LoadedVAE) -> tuple[tuple[int, ...], ...]:
    return VIDEOS if vae.frames else IMAGES


def truths(axis: Axis, case: str) -> list[tuple[Tensor, Tensor]]:
    """What diffusers decodes and encodes, per shape."""
    vae, found = quiet_vae(case), []
    for shape in shapes_of(vae):
        truth = plain_decode(vae, latents(vae, *shape))
        assert truth.abs().max() < 1
        found.append((truth, plain_encode(vae, images(vae, *shape))))
    return found


def results(axis: Axis, case: str, device: torch.device | str = "cpu") -> list[tuple[Tensor | None, Tensor | None]]:
    """What the ranks decode and encode on `device`, per shape, all by the same loaded VAE."""
    vae = quiet_vae(case, device)
    return [
        (decode(vae, latents(vae, *shape), axis), encode(vae, images(vae, *shape), axis)) for shape in shapes_of(vae)
    ]


RANKS = {
    "AutoencoderKL (Flux)": (1, 2, 3, 5, 8),
    "AutoencoderKLWan (2.1)": (1, 2, 4, 8),
    "AutoencoderKLQwenImage": (1, 2, 4),
}
"""Others on 4: of these, two are at an edge of the picture and two between others. `make matrix` has all on 1 to 8."""
# Runs of as many ranks follow each other, which then need not meet anew.
RUNS = sorted(
    ((n, case) for case in CASES for n in (range(1, 9) if WHOLE else RANKS.get(case, (4,)))),
    key=lambda run: run[0],
)


@pytest.mark.parametrize(("n", "case"), RUNS)
def test_the_plain_decode_and_encode(ranks, vae_errors, n, case):
    (expected,) = ranks.once(1, truths, case)
    first, *others = ranks.run(n, results, case)
    assert all(each is None for other in others for result in other for each in result)
    found = [
        (error(widen(picture), decoded), error(latent, encoded))
        for (picture, latent), (decoded, encoded) in zip(first, expected, strict=True)
    ]
    for direction, worst in zip(("decode", "encode"), map(max, zip(*found, strict=True)), strict=True):
        vae_errors.setdefault(f"{case} | {direction}", {})[f"{n} ranks"] = worst
        assert worst <= TOLERANCE, (direction, found)


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


def cancelled(axis: Axis) -> tuple[int, int, bool]:
    """How often the ranks looked whether to leave, until they did; how much was done; and whether they are in step."""
    vae = new_vae("AutoencoderKLWan (2.1)")
    latent = latents(vae, 1, 3, 5, 4)
    whole, looks, seen = decode(vae, latent, axis), [], []

    def look() -> None:
        looks.append(True)
        if len(looks) == 2:
            raise Cancelled("Cancelled.")

    try:
        decode(vae, latent, axis, on_progress=lambda *step: seen.append(step), check=look)
    except Cancelled:
        again = decode(vae, latent, axis)
        return len(looks), len(seen), again is None if whole is None else torch.equal(whole, again)
    return len(looks), len(seen), False


def test_a_cancel_is_met_in_the_middle_of_a_video(ranks):
    assert ranks.run(2, cancelled) == [(2, 0, True)] * 2


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
