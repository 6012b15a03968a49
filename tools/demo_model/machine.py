"""What a command computes on: `--device` and `--threads`."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager

import torch

BATCH_SCALE = {"cpu": 1, "cuda": 32}
"""How many times the pictures of a step that two cores can bear: a GPU is idle with less."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU where one is")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")


def prepare(options: argparse.Namespace) -> torch.device:
    """The device that `options` name, made ready."""
    torch.set_num_threads(options.threads)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # see the README
    return torch.device(options.device)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 products on a GPU. Two CPU cores without matrix units are three times as fast in fp32."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
