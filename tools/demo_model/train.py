"""Train the transformer: `python -m tools.demo_model.train --steps 20000` (resumes by itself).

The learning rate and the picture sizes follow the steps done, and every step costs about the same: an interrupted or
slowed run goes on where it was. SIGTERM and SIGINT save and end it. The text encoders are those of `train_text`, or
where it has not run those that are exported. On a GPU a step has 32 times the pictures: `--steps 4000` is enough.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from . import checkpoint, machine
from .cache_latents import Latents, load_latents
from .interruption import Interruption
from .model import DemoModel, label_loss, pack, shifted
from .sampling import sample_sheet
from .train_text import load_taught
from .train_vae import load_trained

FOLDER = checkpoint.CACHE / "transformer"
SEED = 21
LEARNING_RATE = {"cpu": 1e-3, "cuda": 1.5e-3}
"""For the pictures that a step has on such a device."""
WARMUP_STEPS = 100
DECAY_FROM = 0.6
LARGE_FROM = 0.4
BATCH = {128: 16, 192: 8, 256: 5, 384: 2}
SHIFT = {128: 2.0, 192: 2.5, 256: 3.0, 384: 3.0}
SIZE_CYCLE = (128, 256, 192, 128, 256, 384, 256)
PROMPT_DROPOUT = 0.1
UNIFORM_SHARE = 0.15
LABEL_WEIGHT = 0.3
EMA_DECAY = 0.998
PRINT_SECONDS = 30
SAVE_SECONDS = 240
SHEET_SECONDS = 480
SHEET_CAPTIONS = (
    "a large red circle on a gray background",
    "two small blue squares on a yellow background",
    "three green stars on a pink striped background",
    "a purple triangle left of a yellow ring on a green background",
    "a large white cross above two small black circles on a blue checkered background",
    "an orange star at the top left on a purple background",
    "two outlined red triangles below a small blue ring on a gray background",
    "a large striped green square right of three small white stars on a pink background",
)


class Feed:
    """Random batches of the cached latents of one size; the batch of a step depends on the step alone."""

    def __init__(self, cached: Latents, model: DemoModel, device: torch.device) -> None:
        self.size, self.device = cached.size, device
        self.batch = BATCH[cached.size] * machine.BATCH_SCALE[device.type]
        self.latents, self.labels = cached.latents.to(device), cached.labels.to(device)
        self.pooled, self.text = (each.half() for each in model.read_all(cached.captions))
        self.unsaid = model.read_all([""])

    def at(self, step: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(self.device).manual_seed((SEED * 1000 + self.size << 32) + step)

        def uniform() -> torch.Tensor:
            return torch.rand(self.batch, generator=generator, device=self.device)

        chosen = torch.randint(len(self.latents), (self.batch,), generator=generator, device=self.device)
        clean = pack(self.latents[chosen].float())
        normal = torch.randn(self.batch, generator=generator, device=self.device) * 1.2
        sigma = shifted(torch.sigmoid(normal), SHIFT[self.size])
        sigma = torch.where(uniform() < UNIFORM_SHARE, uniform(), sigma)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        dropped = uniform() < PROMPT_DROPOUT
        pooled = torch.where(dropped[:, None], self.unsaid[0], self.pooled[chosen].float())
        text = torch.where(dropped[:, None, None], self.unsaid[1], self.text[chosen].float())
        return clean, noise, sigma, pooled, text, self.labels[chosen].float() / 255


def learning_rate(top: float, step: int, share: float) -> float:
    """Warm-up, then constant, then linear to a fiftieth over the last part of the steps."""
    fall = min(1.0, max(0.02, (1 - share) / (1 - DECAY_FROM)))
    return top * min(1.0, (step + 1) / WARMUP_STEPS) * fall


def size_at(step: int, share: float, large_from: float) -> int:
    return 128 if share < large_from else SIZE_CYCLE[step % len(SIZE_CYCLE)]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--large-from", type=float, default=LARGE_FROM, help="share of the steps at 128 px only")
    machine.add_options(parser)
    parser.add_argument("--from-export", action="store_true", help="without a checkpoint, start from the export")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="on a GPU they never are compiled")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    device = machine.prepare(options)
    torch.manual_seed(SEED)
    checkpoint.CACHE.mkdir(exist_ok=True)
    (checkpoint.CACHE / "train.pid").write_text(f"{os.getpid()}\n")
    model, shadow = DemoModel().to(device), DemoModel().to(device).requires_grad_(False)
    for encoder in (model.clip, model.t5):
        encoder.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    average = [p for p, trained in zip(shadow.parameters(), model.parameters(), strict=True) if trained.requires_grad]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE[device.type], betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step, seconds = 0, 0.0
    resumed = checkpoint.load(FOLDER)
    if resumed is not None:
        parts, meta = resumed
        step, seconds = meta["step"], meta["seconds"]
        model.load_state_dict(parts["model"])
        checkpoint.load_optimizer(optimizer, parts["optimizer"])
        shadow.load_state_dict(parts["ema"])
        print(f"resumed at step {step}, {seconds / 60:.1f} minutes", flush=True)
    else:
        if options.from_export:
            model.load_exported(checkpoint.TARGET)
        else:
            load_taught(model)
        shadow.load_state_dict(model.state_dict())
    feeds: dict[int, Feed] = {}
    vae = load_trained(device=device)
    if options.compile and device.type == "cpu":  # see the README
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    interruption = Interruption()
    begun = time.monotonic() - seconds
    saved = sheeted = printed = time.monotonic()
    since: dict[int, list[torch.Tensor]] = {}
    pictures = 0
    while not interruption and step < options.steps:
        share = step / options.steps
        size = size_at(step, share, options.large_from)
        if size not in feeds:
            feeds[size] = Feed(load_latents(size), model, device)
        clean, noise, sigma, pooled, text, shares = feeds[size].at(step)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        with machine.autocast(device):
            velocity, logits = model(noisy, sigma, pooled, text, size // 16)
        flow = F.mse_loss(velocity.float(), noise - clean)
        labels = label_loss(logits.float(), shares)
        optimizer.zero_grad(set_to_none=True)
        (flow + LABEL_WEIGHT * labels).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(LEARNING_RATE[device.type], step, share)
        optimizer.step()
        step += 1
        keep = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, weight in zip(average, weights, strict=True):
                mean.lerp_(weight, 1 - keep)
        since.setdefault(size, []).append(torch.stack((flow, labels)).detach())
        pictures += len(clean)
        now = time.monotonic()
        if now - printed > PRINT_SECONDS:
            means = {size: torch.stack(losses).mean(0).tolist() for size, losses in sorted(since.items())}
            losses = ", ".join(f"{size} px: flow {f:.4f} labels {s:.3f}" for size, (f, s) in means.items())
            speed = pictures / (now - printed)
            print(f"step {step}, {(now - begun) / 60:.1f} min, {speed:.1f} pictures/s, {losses}", flush=True)
            since, pictures, printed = {}, 0, now
        if now - saved > SAVE_SECONDS:
            save(model, shadow, optimizer, step, now - begun)
            saved = time.monotonic()
        if now - sheeted > SHEET_SECONDS:
            write_sheet(shadow, vae, FOLDER / "sheets" / f"{step:06d}.png", 128)
            sheeted = time.monotonic()
    save(model, shadow, optimizer, step, time.monotonic() - begun)
    write_sheet(shadow, vae, FOLDER / "sheets" / f"{step:06d}.png", 256)
    print(f"ended at step {step}", flush=True)


def save(model: DemoModel, shadow: DemoModel, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    parts = {
        "model": model.state_dict(),
        "ema": shadow.state_dict(),
        "optimizer": checkpoint.optimizer_tensors(optimizer),
    }
    checkpoint.save(FOLDER, parts, {"step": step, "seconds": seconds})


def write_sheet(shadow: DemoModel, vae, path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sample_sheet(shadow, vae, list(SHEET_CAPTIONS), size, SHIFT[size])).save(path)


if __name__ == "__main__":
    main()
