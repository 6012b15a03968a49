"""Train the edge-map ControlNet on the newest averaged weights: `python -m tools.demo_model.train_controlnet`.

It resumes by itself; SIGTERM and SIGINT save and end it. `--fresh` forgets an earlier run, as a newer base model wants.
"""

from __future__ import annotations

import argparse
import time
from typing import cast

import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from torch import nn
from torch.nn import functional as F

from . import checkpoint, machine
from .adapter_data import SIZE, make_edges, make_examples, noisy_batch
from .export import load_averaged
from .interruption import Interruption
from .model import DemoModel, image_ids
from .train_vae import load_trained

FOLDER = checkpoint.CACHE / "controlnet"
CONTROLNET_TARGET = checkpoint.TARGET.parent / "controlnet-edges"
LEARNING_RATE = 5e-4
BATCH = 16
SAVE_SECONDS = 240


def new_controlnet(model: DemoModel) -> FluxControlNetModel:
    """One double and one single block that start as the transformer's first ones."""
    config = model.transformer.config
    made = FluxControlNetModel.from_transformer(
        model.transformer,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=config["attention_head_dim"],
        num_attention_heads=config["num_attention_heads"],
    )
    return cast(FluxControlNetModel, made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pictures", type=int, default=6000)
    machine.add_options(parser)
    parser.add_argument("--fresh", action="store_true", help="start anew")
    options = parser.parse_args()
    device = machine.prepare(options)
    torch.manual_seed(0)
    model = load_averaged().to(device)
    vae = load_trained(device=device)
    examples = make_examples(model, vae, options.pictures, "picture")
    edges = make_edges(vae, options.pictures)
    controlnet = new_controlnet(model)
    nn.Module.to(controlnet, device)
    batch = BATCH * machine.BATCH_SCALE[device.type]
    optimizer = torch.optim.AdamW(controlnet.parameters(), LEARNING_RATE, weight_decay=0.01)
    step = 0
    resumed = None if options.fresh else checkpoint.load(FOLDER)
    if resumed is not None:
        parts, meta = resumed
        step = meta["step"]
        controlnet.load_state_dict(parts["controlnet"])
        checkpoint.load_optimizer(optimizer, parts["optimizer"])

    def save() -> None:
        parts = {"controlnet": controlnet.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer)}
        checkpoint.save(FOLDER, parts, {"step": step})

    interruption = Interruption()
    saved = time.monotonic()
    while not interruption and step < options.steps:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, 2 * (1 - step / options.steps))
        chosen, noise, sigma = noisy_batch(examples, step, batch)
        clean = examples.clean[chosen]
        text = examples.text[chosen]
        given = {
            "hidden_states": torch.lerp(clean, noise, sigma[:, None, None]),
            "encoder_hidden_states": text,
            "pooled_projections": examples.pooled[chosen],
            "timestep": sigma,
            "img_ids": image_ids(SIZE // 16, SIZE // 16).to(device),
            "txt_ids": torch.zeros(text.shape[1], 3, device=device),
            "return_dict": False,
        }
        with machine.autocast(device):
            double, single = controlnet(controlnet_cond=edges[chosen], **given)
            (velocity,) = model.transformer(
                controlnet_block_samples=double, controlnet_single_block_samples=single, **given
            )
        loss = F.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            print(f"step {step}/{options.steps} loss {loss.item():.4f}", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
    save()
    if step < options.steps:
        print(f"interrupted at step {step}: saved, not written")
        return
    nn.Module.to(controlnet, "cpu", torch.bfloat16)
    controlnet.save_pretrained(CONTROLNET_TARGET)


if __name__ == "__main__":
    main()
