"""Train the demo model's VAE: `python -m tools.demo_model.train_vae` (resumes by itself)."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F

from . import checkpoint
from .muon import Muon
from .scenes import draw, edge_map, make_scene

FOLDER = checkpoint.CACHE / "vae"
SEED = 11
POOL = 1500
LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-3
BORDER = 2
SAVE_SECONDS = 120


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
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
    scene = make_scene(SEED, index)
    if index % 10 == 0:
        return draw(scene, size, "chalk")
    drawn = draw(scene, size)
    return edge_map(drawn) if index % 10 == 1 else drawn


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 `[H, W, 3]` pictures as one float tensor `[B, 3, H, W]` in -1..1."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return (stacked / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_pictures(tensor: torch.Tensor) -> np.ndarray:
    return ((tensor.clamp(-1, 1) + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).numpy()


class Batches:
    """Crops of 64 px first (few of them flat), then whole pictures of 128 and 256 px."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.large = [picture(i, 256) for i in range(POOL)]
        self.small = [picture(i, 128) for i in range(POOL, 3 * POOL)]

    def at(self, step: int) -> torch.Tensor:
        rng = np.random.default_rng([SEED, step])
        if step >= self.steps // 2:
            pool, count = ((self.large, 3), (self.small, 10))[step % 2]
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

    def rescale(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        std = output.std().clamp_min(1e-4)
        module.weight.div_(std)
        return output / std

    hooks = [m.register_forward_hook(rescale) for m in vae.modules() if isinstance(m, torch.nn.Conv2d)]
    posterior = vae.encode(batch).latent_dist
    vae.decode(posterior.mean)
    for hook in hooks:
        hook.remove()
    vae.encoder.conv_out.weight[16:].zero_()
    vae.encoder.conv_out.bias[16:].fill_(-3.0)
    vae.decoder.conv_out.weight.mul_(0.4)


def loss_of(output: torch.Tensor, target: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + 0.5 gradient L1, the picture's border counted more, and the KL term."""
    weight = torch.full_like(target[:1, :1], 3.0)
    weight[..., BORDER:-BORDER, BORDER:-BORDER] = 1.0
    weight = weight / weight.mean()
    error = output - target
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    flat = (weight * (error.abs() + error.square())).mean()
    return flat + 0.5 * (across.abs().mean() + down.abs().mean()) + KL_WEIGHT * kl


@torch.no_grad()
def judge(vae: AutoencoderKL) -> tuple[float, np.ndarray]:
    """PSNR in dB on unseen 256 px scenes, and a sheet of truth above reconstruction."""
    truth = to_tensor([draw(make_scene(SEED + 1, i, held_out=True), 256) for i in range(8)])
    made = vae.decode(vae.encode(truth).latent_dist.mean).sample.clamp(-1, 1)
    psnr = float(10 * torch.log10(4 / F.mse_loss(made, truth)))
    return psnr, np.concatenate([np.concatenate(to_pictures(t), axis=1) for t in (truth, made)], axis=0)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL) -> tuple[float, float]:
    """Mean and standard deviation of the latents of training scenes at 128 px."""
    latents = torch.cat(
        [
            vae.encode(to_tensor([draw(make_scene(SEED, i), 128) for i in range(s, s + 32)])).latent_dist.mean
            for s in range(0, 256, 32)
        ]
    )
    return float(latents.mean()), float(latents.std())


def load_trained(folder: Path = FOLDER) -> AutoencoderKL:
    """The trained VAE with its latent shift and scale in the config; the exported one where there is no checkpoint."""
    state = checkpoint.load(folder)
    if state is None:
        return AutoencoderKL.from_pretrained(checkpoint.TARGET / "vae", dtype=torch.float32).eval()
    parts, meta = state
    vae = new_vae()
    vae.load_state_dict(parts["vae"])
    if "std" in meta:
        vae.register_to_config(shift_factor=meta["mean"], scaling_factor=1 / meta["std"])
    return vae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    started = time.monotonic()
    batches = Batches(options.steps)
    print(f"pictures drawn in {time.monotonic() - started:.0f} s", flush=True)

    vae = new_vae().to(memory_format=torch.channels_last)
    kernels = [p for p in vae.parameters() if p.ndim == 4]
    others = [p for p in vae.parameters() if p.ndim != 4]
    optimizers = {"muon": Muon(kernels, LEARNING_RATE), "adamw": torch.optim.AdamW(others, LEARNING_RATE)}
    step, seconds = 0, 0.0
    resumed = checkpoint.load(FOLDER)
    if resumed is None:
        initialise(vae, batches.at(0))
    else:
        parts, meta = resumed
        step, seconds = meta["step"], meta["seconds"]
        vae.load_state_dict(parts["vae"])
        for name, optimizer in optimizers.items():
            checkpoint.load_optimizer(optimizer, parts[name])

    def save(**more: float) -> None:
        parts = {name: checkpoint.optimizer_tensors(optimizer) for name, optimizer in optimizers.items()}
        spent = seconds + time.monotonic() - started
        checkpoint.save(FOLDER, {"vae": vae.state_dict(), **parts}, {"step": step, "seconds": spent, **more})
        psnr, sheet = judge(vae)
        Image.fromarray(sheet).save(FOLDER / "sheet.png")
        print(f"step {step} saved, {psnr:.2f} dB at 256 px", flush=True)

    started = saved = time.monotonic()
    while step < options.steps:
        share = min(1.0, (1 - step / options.steps) / 0.7)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * share
        batch = batches.at(step)
        posterior = vae.encode(batch).latent_dist
        loss = loss_of(vae.decode(posterior.sample()).sample, batch, posterior.kl().mean() / posterior.mean[0].numel())
        vae.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        step += 1
        if step % 20 == 0:
            print(f"step {step}/{options.steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
    mean, std = measure_latents(vae)
    save(mean=mean, std=std)
    print(f"done: latent mean {mean:.4f}, std {std:.4f}")


if __name__ == "__main__":
    main()
