"""Write the newest averaged weights as a diffusers folder: `python -m tools.demo_model.export`.

`--vae-only` replaces the VAE in a folder that is there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

from . import checkpoint
from .checkpoint import TARGET
from .model import DemoModel
from .train import FOLDER, SHIFT
from .train_vae import load_trained

SCHEDULER_SHIFT = SHIFT[256]
ORIGIN = ("_name_or_path", "is_local", "local_files_only")


def load_averaged() -> DemoModel:
    """The demo model with the newest moving-average weights, or the exported ones where there is no checkpoint."""
    model = DemoModel().requires_grad_(False)
    state = checkpoint.load(FOLDER)
    if state is None:
        model.load_exported(TARGET)
        print("no checkpoint: the exported weights")
        return model
    parts, meta = state
    model.load_state_dict(parts["ema"])
    print(f"weights of step {meta['step']}, {meta['seconds'] / 60:.0f} minutes")
    return model


def pipeline_of(model: DemoModel) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT, use_dynamic_shifting=False),
        vae=load_trained(),
        text_encoder=model.clip,
        tokenizer=model.clip_tokenizer,
        text_encoder_2=model.t5,
        tokenizer_2=model.t5_tokenizer,
        transformer=model.transformer,
    )


def forget_origin(folder: Path) -> None:
    """Take out of the configs where on this machine their parts were loaded from."""
    for path in folder.glob("*/*config.json"):
        config = json.loads(path.read_text())
        kept = {key: value for key, value in config.items() if key not in ORIGIN}
        if kept != config:
            path.write_text(json.dumps(kept, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--vae-only", action="store_true")
    options = parser.parse_args()
    if options.vae_only:
        vae = load_trained()
        nn.Module.to(vae, torch.bfloat16)
        vae.save_pretrained(options.target / "vae")
    else:
        pipeline_of(load_averaged()).to(dtype=torch.bfloat16).save_pretrained(options.target)
    forget_origin(options.target)
    size = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(f"{options.target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
