"""Samples in one ComfyUI process: natively, with its own KSampler on our MODEL, and with Parallel Sampler.

COMFYUI_PATH=... python parity_host.py FOLDER RANKS [RANKS ...]

Run by `test_parity.py` with the host's Python. For each FOLDER/NAME.json (`family` and `config` of the loader's handle)
there are the weights NAME.safetensors in ComfyUI's own layout. Writes FOLDER/errors.json: by case, the relative errors
of KSampler and Parallel Sampler to native sampling.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MODELS = {"flux": (16, 8, 12), "sd3": (16, 8, 12), "pixart": (4, 40, 44), "hunyuandit": (4, 8, 12)}
"""Channels, rows and columns of the latent. ComfyUI divides by zero for a PixArt of fewer."""
RANKS = (1, 2, 4)
STEPS = 2


@dataclass(frozen=True)
class Case:
    """One run; `sampler`: what is set of KSampler, beside its usual values. `layout`: degrees of 0 are chosen."""

    model: str
    ranks: tuple[int, ...] = (2,)
    batch: int = 1
    size: tuple[int, ...] = ()
    masked: bool = False
    layout: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    entries: tuple[dict[str, Any], ...] = ({},)
    """What is set of each entry of the positive CONDITIONING. More than the usual one: for KSampler alone."""
    node: str = "KSampler"
    """The node of ComfyUI that samples, one of `WAYS`. Others than KSampler have no like among our nodes."""


def sweep(samplers: tuple[str, ...], schedulers: tuple[str, ...]) -> dict[str, Case]:
    pairs = itertools.product(samplers, schedulers)
    settings = ({"sampler_name": sampler, "scheduler": scheduler, "cfg": 4.0} for sampler, scheduler in pairs)
    return {f"{each['sampler_name']} {each['scheduler']}": Case("sd3", (1,), sampler=each) for each in settings}


LEFT = torch.zeros(1, 64, 96)
LEFT[..., :40] = 1
CONDITIONINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "two prompts": ({}, {"strength": 0.5}),
    "area": ({}, {"area": (4, 6, 2, 4), "strength": 0.8}),
    "masks": ({"mask": LEFT, "mask_strength": 0.7}, {"mask": 1 - LEFT, "set_area_to_bounds": True}),
    "no guidance": ({"guidance": None},),
    "time ranges": ({"end_percent": 0.4}, {"start_percent": 0.4}),
}
CASES = {
    **{name: Case(name, RANKS, sampler={"cfg": 4.0}) for name in MODELS},
    **{f"{name}, cfg 1": Case(name, RANKS, sampler={"cfg": 1.0}) for name in MODELS},
    **{
        f"{name}, batch 3, masked, denoise 0.6": Case(name, RANKS, 3, masked=True, sampler={"denoise": 0.6, "cfg": 4.0})
        for name in MODELS
    },
    **{
        f"{name}, {what}": Case(name, (2,), 2, sampler={"cfg": 4.0}, entries=entries)
        for name in ("flux", "sd3")
        for what, entries in CONDITIONINGS.items()
    },
    **{
        f"{name}, {node}": Case(name, sampler={"cfg": 4.0}, node=node)
        for name in ("flux", "sd3")
        for node in ("KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
    },
    "flux, odd size": Case("flux", size=(7, 9)),
    "sd3, odd size": Case("sd3", size=(7, 9)),
    "flux, one condition at a time": Case("flux", layout={"cfg_degree": 2}, sampler={"cfg": 4.0}),
    "sd3, data parallel": Case("sd3", batch=3, layout={"data_degree": 2}, sampler={"cfg": 4.0}),
    "sd3, tensor parallel": Case("sd3", layout={"tensor_degree": 2}, sampler={"cfg": 4.0}),
    "sd3, weights sharded": Case("sd3", layout={"weights": "sharded"}, sampler={"cfg": 4.0}),
}


def inputs(case: Case) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Positive and negative CONDITIONING, and a LATENT."""
    draw = _drawer(4)
    positive = [[tokens, entry | extra] for extra in case.entries for tokens, entry in [_entry(case.model, draw)]]
    negative = [_entry(case.model, draw)]
    channels, *size = MODELS[case.model]
    rows, columns = case.size or size
    latent = {"samples": torch.zeros(case.batch, channels, rows, columns)}
    if case.masked:
        latent["samples"] = draw(case.batch, channels, rows, columns)
        latent["noise_mask"] = (draw(1, 8 * rows, 8 * columns) > 0).float()
    return positive, negative, latent


def _drawer(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _entry(model: str, draw: Any) -> list[Any]:
    if model == "hunyuandit":
        masks = {"attention_mask": torch.arange(6)[None] < 4, "attention_mask_mt5xl": torch.arange(9)[None] < 5}
        return [
            draw(1, 6, 24),
            {"conditioning_mt5xl": draw(1, 9, 40)} | {key: mask.long() for key, mask in masks.items()},
        ]
    if model == "pixart":
        return [draw(1, 9, 20), {"width": 640, "height": 480}]
    return [draw(1, 9, 24), {"pooled_output": draw(1, 40), "guidance": 2.0 + abs(float(draw(1)))}]


def main(folder: Path, ranks: list[int]) -> None:
    sys.argv[1:] = ["--cpu"]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "conftest.py"))
    import comfy.options

    comfy.options.enable_args_parsing()
    importlib.import_module("utils.install_util")  # ComfyUI's nodes put another `utils` first on the path
    import server
    from paralleldit.launcher import sidecar
    from paralleldit.launcher.sidecar import SidecarSpec
    from paralleldit.nodes import NODE_CLASS_MAPPINGS, host
    from paralleldit.nodes.comfy_host import ComfyHost
    from paralleldit.nodes.layout import LayoutChoice
    from paralleldit.parallel_backend.sampling_names import SAMPLER_NAMES, SCHEDULER_NAMES

    server.PromptServer.instance = SimpleNamespace(last_node_id=None)
    here = ComfyHost()
    here.takes_paths = True
    here.spec = SidecarSpec(device="cpu", directory=folder / "runtime")
    host.use(here)
    native = {name: native_model(folder / f"{name}.json") for name in MODELS}
    cases = CASES | sweep(tuple(SAMPLER_NAMES), tuple(SCHEDULER_NAMES))
    errors = {}
    for count in ranks:
        for name, case in cases.items():
            if count not in case.ranks:
                continue
            choice = LayoutChoice(ranks=count, **case.layout)
            model = NODE_CLASS_MAPPINGS["ParallelDiTLoader"]().load(
                str(folder / f"{case.model}.safetensors"), "auto", choice
            )[0]
            errors[f"{name} [{count}]"] = compare(
                case, native[case.model], model, NODE_CLASS_MAPPINGS["ParallelDiTSampler"]
            )
    sidecar.stop(here.spec.slot)
    (folder / "errors.json").write_text(json.dumps(errors))


def call(node: str, **inputs: Any) -> Any:
    """The outputs of a node of ComfyUI."""
    kind = nodes_of_host()[node]
    return getattr(kind(), kind.FUNCTION)(**inputs)


@cache
def nodes_of_host() -> dict[str, type]:
    from comfy_extras import nodes_custom_sampler

    import nodes as host_nodes

    return host_nodes.NODE_CLASS_MAPPINGS | nodes_custom_sampler.NODE_CLASS_MAPPINGS


def sample_advanced(*, seed: int, denoise: float, **settings: Any) -> Any:
    """The second half of the steps alone, from a latent to which noise is added."""
    half = {"start_at_step": STEPS // 2, "end_at_step": STEPS, "return_with_leftover_noise": "disable"}
    return call("KSamplerAdvanced", noise_seed=seed, add_noise="enable", **half, **settings)


def sample_custom(*, seed: int, **settings: Any) -> Any:
    sampler, sigmas, rest = _custom(**settings)
    return call("SamplerCustom", add_noise=True, noise_seed=seed, sampler=sampler, sigmas=sigmas, **rest)


def sample_custom_advanced(*, seed: int, **settings: Any) -> Any:
    sampler, sigmas, rest = _custom(**settings)
    latent = rest.pop("latent_image")
    noise, guider = call("RandomNoise", noise_seed=seed)[0], call("CFGGuider", **rest)[0]
    return call(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )


def _custom(*, sampler_name: str, scheduler: str, steps: int, denoise: float, **rest: Any) -> tuple[Any, Any, Any]:
    sigmas = call("BasicScheduler", model=rest["model"], scheduler=scheduler, steps=steps, denoise=denoise)[0]
    return call("KSamplerSelect", sampler_name=sampler_name)[0], sigmas, rest


WAYS: dict[str, Callable[..., Any]] = {
    "KSampler": lambda **settings: call("KSampler", **settings),
    "KSamplerAdvanced": sample_advanced,
    "SamplerCustom": sample_custom,
    "SamplerCustomAdvanced": sample_custom_advanced,
}
"""From what is set of KSampler to the LATENT of a sampling node of ComfyUI."""


@torch.inference_mode()
def compare(case: Case, native: Any, ours: Any, parallel: type) -> list[float]:
    def latent(model: Any, sample: Callable[..., Any]) -> Tensor:
        positive, negative, image = inputs(case)
        settings = {
            "seed": 7,
            "steps": STEPS,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        }
        prompts = {"positive": positive, "negative": negative}
        return sample(model=model, latent_image=image, **prompts, **(settings | case.sampler))[0]["samples"]

    stock = WAYS[case.node]
    truth = latent(native, stock)
    samples = (stock, parallel().sample) if (case.entries, case.node) == (({},), "KSampler") else (stock,)
    return [float((found - truth).norm() / truth.norm()) for found in (latent(ours, each) for each in samples)]


def native_model(told: Path) -> Any:
    """ComfyUI's own MODEL of the file beside `told`."""
    import comfy.model_detection
    import comfy.model_management
    import comfy.model_patcher
    from paralleldit.nodes.comfy_model import UNET_CONFIGS
    from safetensors.torch import load_file

    handle = json.loads(told.read_text())
    config = comfy.model_detection.model_config_from_unet_config(UNET_CONFIGS[handle["family"]](handle["config"]))
    config.set_inference_dtype(torch.float32, None)
    weights = load_file(told.with_suffix(".safetensors"))
    model = config.get_model(weights, "")
    model.load_model_weights(weights, "")
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(count) for count in sys.argv[2:]])
