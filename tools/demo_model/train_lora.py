"""Train the chalk style LoRA on the newest averaged weights: `python -m tools.demo_model.train_lora`.

It resumes by itself; SIGTERM and SIGINT save and end it. `--fresh` forgets an earlier run, as a newer base model wants.
At the end it writes the LoRA in the diffusers layout and in the single-file layout with one fused QKV per attention.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from . import checkpoint, machine
from .adapter_data import SIZE, make_examples, noisy_batch
from .export import load_averaged
from .interruption import Interruption
from .train_vae import load_trained

FOLDER = checkpoint.CACHE / "lora"
DIFFUSERS_FILE = checkpoint.TARGET.parent / "lora-chalk" / "pytorch_lora_weights.safetensors"
SINGLE_FILE = checkpoint.TARGET.parent / "lora-chalk" / "chalk.safetensors"
RANK = 16
LEARNING_RATE = 3e-3
BATCH = 24
SAVE_SECONDS = 180
TRAINED = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out")
FUSED = {"to_q": 0, "to_k": 1, "to_v": 2}
RENAMED = {"attn.to_out.0": "img_attn_proj", "ff.net.0.proj": "img_mlp_0", "ff.net.2": "img_mlp_2"}


class LoraLinear(nn.Module):
    """A frozen linear layer plus `up(down(x))`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        self.down = nn.Parameter((torch.randn(RANK, base.in_features) / math.sqrt(base.in_features)).to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def add_lora(transformer: nn.Module) -> dict[str, LoraLinear]:
    """Put a LoRA on the image path's linear layers of every block; returns them by the layer's name."""
    layers: dict[str, LoraLinear] = {}
    for name, module in list(transformer.named_modules()):
        if "transformer_blocks." in name and isinstance(module, nn.Linear) and name.endswith(TRAINED):
            parent, _, last = name.rpartition(".")
            layers[name] = LoraLinear(module)
            setattr(transformer.get_submodule(parent), last, layers[name])
    return layers


def diffusers_layout(layers: dict[str, LoraLinear]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, layer in layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = layer.down.detach().clone()
        tensors[f"transformer.{name}.lora_B.weight"] = layer.up.detach().clone()
    return tensors


def merge(transformer: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Add a LoRA in the diffusers layout to the weights of a transformer."""
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            up = tensors[f"transformer.{name}.lora_B.weight"]
            weight = transformer.get_parameter(f"{name}.weight")
            weight.data += (up.float() @ down.float()).to(weight.dtype)


def single_file_layout(layers: dict[str, LoraLinear]) -> dict[str, torch.Tensor]:
    """The kohya names: Q, K, V (and a single block's MLP) become one layer, block-diagonal in its up weight."""
    fused: dict[str, list[tuple[str, LoraLinear]]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        single = name.startswith("single_")
        index, rest = name.split(".", 2)[1:]
        block = f"lora_unet_{'single' if single else 'double'}_blocks_{index}"
        if rest.rpartition(".")[2] in FUSED or rest == "proj_mlp":
            fused.setdefault(f"{block}_{'linear1' if single else 'img_attn_qkv'}", []).append((rest, layer))
            continue
        target = f"{block}_{'linear2' if rest == 'proj_out' else RENAMED[rest]}"
        _put(tensors, target, layer.down, layer.up)
    for target, members in fused.items():
        order = sorted(members, key=lambda member: FUSED.get(member[0].rpartition(".")[2], 3))
        _put(
            tensors,
            target,
            torch.cat([layer.down for _, layer in order]),
            torch.block_diag(*[layer.up for _, layer in order]),
        )
    return tensors


def _put(tensors: dict[str, torch.Tensor], target: str, down: torch.Tensor, up: torch.Tensor) -> None:
    tensors[f"{target}.lora_down.weight"] = down.detach().clone()
    tensors[f"{target}.lora_up.weight"] = up.detach().clone()
    tensors[f"{target}.alpha"] = torch.tensor(float(len(down)))


def write(layers: dict[str, LoraLinear]) -> None:
    DIFFUSERS_FILE.parent.mkdir(parents=True, exist_ok=True)
    for path, tensors in ((DIFFUSERS_FILE, diffusers_layout(layers)), (SINGLE_FILE, single_file_layout(layers))):
        save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, path)
        print(f"{path.name}: {Path(path).stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=4000)
    machine.add_options(parser)
    parser.add_argument("--fresh", action="store_true", help="start anew")
    options = parser.parse_args()
    device = machine.prepare(options)
    torch.manual_seed(0)
    model = load_averaged().to(device)
    examples = make_examples(model, load_trained(device=device), options.pictures, "chalk")
    batch = BATCH * machine.BATCH_SCALE[device.type]
    layers = add_lora(model.transformer)
    weights = [weight for layer in layers.values() for weight in (layer.down, layer.up)]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.0)
    step = 0
    resumed = None if options.fresh else checkpoint.load(FOLDER)
    if resumed is not None:
        parts, meta = resumed
        step = meta["step"]
        checkpoint.load_optimizer(optimizer, parts["optimizer"])
        with torch.no_grad():
            for name, layer in layers.items():
                layer.down.copy_(parts["down"][name])
                layer.up.copy_(parts["up"][name])

    def save() -> None:
        parts = {
            "down": {name: layer.down for name, layer in layers.items()},
            "up": {name: layer.up for name, layer in layers.items()},
            "optimizer": checkpoint.optimizer_tensors(optimizer),
        }
        checkpoint.save(FOLDER, parts, {"step": step})

    interruption = Interruption()
    saved = time.monotonic()
    while not interruption and step < options.steps:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / options.steps)
        chosen, noise, sigma = noisy_batch(examples, step, batch)
        clean = examples.clean[chosen]
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        with machine.autocast(device):
            velocity, _ = model(noisy, sigma, examples.pooled[chosen], examples.text[chosen], SIZE // 16)
        loss = F.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
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
    write(layers)


if __name__ == "__main__":
    main()
