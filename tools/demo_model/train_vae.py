"""Train the demo model's VAE: `python -m tools.demo_model.train_vae` (resumes by itself).

`--decoder-only` goes on from the trained VAE with its encoder frozen, so that latents made with it stay valid, and
counts edges more: at 128 px a small shape is little else. Its state lies apart (`vae-decoder`) until it is taken over.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from torch import nn
from torch.nn import functional as F

from . import checkpoint
from .muon import Muon
from .scenes import draw, edge_map, make_scene

FOLDER = checkpoint.CACHE / "vae"
DECODER_FOLDER = checkpoint.CACHE / "vae-decoder"
SEED = 11
POOL = 1500
STEPS, DECODER_STEPS = 1800, 3000
LEARNING_RATE = 2e-3
DECODER_LEARNING_RATE = 1e-3
KL_WEIGHT = 1e-3
BORDER = 2
EDGE_WEIGHT = 3.0
"""How much more an error counts beside the sharpest edges of a picture, in decoder training."""
SAVE_SECONDS = 120


def new_vae() -> AutoencoderKL:
    # Its annotations are of one level.
    return cast(Any, AutoencoderKL)(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=256,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def picture(index: int, size: int) -> np.ndarray:
    """Mostly scenes, one in ten an edge map and one in ten a chalk drawing."""
    scene = make_scene(SEED, index, canvas=size)
    if index % 10 == 0:
        return draw(scene, size, "chalk")
    drawn = draw(scene, size)
    return edge_map(drawn) if index % 10 == 1 else drawn


def to_tensor(pictures: list[np.ndarray] | torch.Tensor) -> torch.Tensor:
    """uint8 `[H, W, 3]` pictures as one float tensor `[B, 3, H, W]` in -1..1."""
    stacked = torch.as_tensor(np.stack(pictures) if isinstance(pictures, list) else pictures)
    stacked = stacked.permute(0, 3, 1, 2).float()
    return (stacked / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_pictures(tensor: torch.Tensor) -> np.ndarray:
    return ((tensor.clamp(-1, 1) + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).cpu().numpy()


class Batches:
    """Crops of 64 px first (few of them flat), then whole pictures of 256 and 128 px.

    For the decoder alone whole pictures from the start, since its norms see whole pictures in use; two in three 128 px.
    """

    def __init__(self, steps: int, decoder_only: bool) -> None:
        self.first_whole = 0 if decoder_only else steps // 2
        self.cycle = ("small", "large", "small") if decoder_only else ("large", "small")
        self.large = [picture(i, 256) for i in range(POOL)]
        self.small = [picture(i, 128) for i in range(POOL, 3 * POOL)]

    def at(self, step: int) -> torch.Tensor:
        rng = np.random.default_rng([SEED, step])
        if step >= self.first_whole:
            pool, count = {"large": (self.large, 3), "small": (self.small, 10)}[self.cycle[step % len(self.cycle)]]
            return to_tensor([pool[i] for i in rng.integers(len(pool), size=count)])
        crops: list[np.ndarray] = []
        while len(crops) < 32:
            pool = (self.large, self.small)[int(rng.integers(2))]
            source = pool[int(rng.integers(len(pool)))]
            y, x = rng.integers(source.shape[0] - 64, size=2)
            crop = source[y : y + 64, x : x + 64]
            if crop.std(axis=(0, 1)).max() > 14 or rng.random() < 0.1:
                crops.append(crop)
        return to_tensor(crops)


@torch.no_grad()
def initialise(vae: AutoencoderKL, batch: torch.Tensor) -> None:
    """Scale every convolution so that its output has unit variance on `batch` (data-dependent initialisation)."""

    def rescale(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        std = output.std().clamp_min(1e-4)
        cast(nn.Conv2d, module).weight.data.div_(std)
        return output / std

    hooks = [m.register_forward_hook(rescale) for m in vae.modules() if isinstance(m, nn.Conv2d)]
    decoded(vae, posterior_of(vae, batch).mean)
    for hook in hooks:
        hook.remove()
    last = vae.encoder.conv_out
    last.weight[16:].zero_()
    cast(torch.Tensor, last.bias)[16:].fill_(-3.0)
    vae.decoder.conv_out.weight.mul_(0.4)


def border_weight(target: torch.Tensor) -> torch.Tensor:
    """`[1, 1, H, W]`: 3 on the picture's border, 1 inside, before scaling to a mean of 1."""
    weight = torch.full_like(target[:1, :1], 3.0)
    weight[..., BORDER:-BORDER, BORDER:-BORDER] = 1.0
    return weight / weight.mean()


def edge_weight(target: torch.Tensor) -> torch.Tensor:
    """`[B, 1, H, W]`: up to 1 + `EDGE_WEIGHT` within two pixels of an edge, 1 elsewhere."""
    across = F.pad(target.diff(dim=-1), (0, 1)).abs().amax(dim=1, keepdim=True)
    down = F.pad(target.diff(dim=-2), (0, 0, 0, 1)).abs().amax(dim=1, keepdim=True)
    near = F.max_pool2d(torch.maximum(across, down), 5, stride=1, padding=2)
    return 1 + EDGE_WEIGHT * (near / 0.25).clamp_max(1)


def loss_of(output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted L1 + MSE, and 0.5 gradient L1."""
    error = output - target
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    flat = (weight * (error.abs() + error.square())).mean()
    return flat + 0.5 * (across.abs().mean() + down.abs().mean())


@torch.no_grad()
def judge(vae: AutoencoderKL) -> tuple[float, np.ndarray]:
    """PSNR in dB on unseen 256 px scenes, and a sheet of truth above reconstruction."""
    truth = to_tensor([draw(make_scene(SEED + 1, i, held_out=True, canvas=256), 256) for i in range(8)])
    made = decoded(vae, posterior_of(vae, truth).mean).clamp(-1, 1)
    psnr = float(10 * torch.log10(4 / F.mse_loss(made, truth)))
    return psnr, np.concatenate([np.concatenate(to_pictures(t), axis=1) for t in (truth, made)], axis=0)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL) -> tuple[float, float]:
    """Mean and standard deviation of the latents of training scenes at 128 px."""
    latents = torch.cat(
        [
            posterior_of(vae, to_tensor([draw(make_scene(SEED, i), 128) for i in range(s, s + 32)])).mean
            for s in range(0, 256, 32)
        ]
    )
    return float(latents.mean()), float(latents.std())


def posterior_of(vae: AutoencoderKL, pictures: torch.Tensor) -> DiagonalGaussianDistribution:
    """The distribution of the latents of pictures `[B, 3, H, W]`."""
    return cast(AutoencoderKLOutput, vae.encode(pictures)).latent_dist


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The pictures `[B, 3, H, W]` of latents."""
    return cast(Any, vae).decode(latents).sample


def load_trained(folder: Path = FOLDER, device: torch.device | str = "cpu") -> AutoencoderKL:
    """The trained VAE with its latent shift and scale in the config; the exported one where there is no checkpoint."""
    state = checkpoint.load(folder)
    if state is None:
        vae = AutoencoderKL.from_pretrained(checkpoint.TARGET / "vae", dtype=torch.float32)
    else:
        parts, meta = state
        vae = new_vae()
        vae.load_state_dict(parts["vae"])
        if "std" in meta:
            vae.register_to_config(shift_factor=meta["mean"], scaling_factor=1 / meta["std"])
    nn.Module.to(vae, device)
    return vae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help=f"default {STEPS}, or {DECODER_STEPS} with --decoder-only")
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    decoder_only = options.decoder_only
    steps = options.steps or (DECODER_STEPS if decoder_only else STEPS)
    folder, top_rate = (DECODER_FOLDER, DECODER_LEARNING_RATE) if decoder_only else (FOLDER, LEARNING_RATE)
    started = time.monotonic()
    batches = Batches(steps, decoder_only)
    print(f"pictures drawn in {time.monotonic() - started:.0f} s", flush=True)

    vae = load_trained().train() if decoder_only else new_vae()
    cast(Any, vae).to(memory_format=torch.channels_last)
    trained = vae.decoder if decoder_only else vae
    vae.encoder.requires_grad_(not decoder_only)
    kernels = [p for p in trained.parameters() if p.ndim == 4]
    others = [p for p in trained.parameters() if p.ndim != 4]
    optimizers = {"muon": Muon(kernels, top_rate), "adamw": torch.optim.AdamW(others, top_rate)}
    step, seconds = 0, 0.0
    resumed = checkpoint.load(folder)
    if resumed is not None:
        parts, meta = resumed
        step, seconds = meta["step"], meta["seconds"]
        vae.load_state_dict(parts["vae"])
        for name, optimizer in optimizers.items():
            checkpoint.load_optimizer(optimizer, parts[name])
    elif not decoder_only:
        initialise(vae, batches.at(0))

    def save(**more: float) -> None:
        parts = {name: checkpoint.optimizer_tensors(optimizer) for name, optimizer in optimizers.items()}
        spent = seconds + time.monotonic() - started
        checkpoint.save(folder, {"vae": vae.state_dict(), **parts}, {"step": step, "seconds": spent, **more})
        psnr, sheet = judge(vae)
        Image.fromarray(sheet).save(folder / "sheet.png")
        print(f"step {step} saved, {psnr:.2f} dB at 256 px", flush=True)

    started = saved = time.monotonic()
    while step < steps:
        share = min(1.0, (1 - step / steps) / 0.7)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = top_rate * share
        batch = batches.at(step)
        posterior = posterior_of(vae, batch)
        if decoder_only:
            loss = loss_of(decoded(vae, posterior.sample()), batch, border_weight(batch) * edge_weight(batch))
        else:
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            loss = loss_of(decoded(vae, posterior.sample()), batch, border_weight(batch)) + KL_WEIGHT * kl
        vae.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        step += 1
        if step % 20 == 0:
            print(f"step {step}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
    if decoder_only:  # the latents that are cached already were made with this shift and scale
        mean, std = vae.config["shift_factor"], 1 / vae.config["scaling_factor"]
    else:
        mean, std = measure_latents(vae)
    save(mean=mean, std=std)
    print(f"done: latent mean {mean:.4f}, std {std:.4f}")


if __name__ == "__main__":
    main()
