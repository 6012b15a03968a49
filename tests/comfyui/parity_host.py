"""Samples in one ComfyUI process: natively, with its own KSampler on our MODEL, and with Parallel Sampler.

COMFYUI_PATH=... python parity_host.py FOLDER RANKS [RANKS ...]

Run by `test_parity.py` with the host's Python. For each FOLDER/NAME.json (`family` and `config` of the loader's handle)
there are the weights NAME.safetensors in ComfyUI's own layout, and a diffusers folder of it. Writes FOLDER/errors.json:
by case, the relative errors of KSampler and Parallel Sampler to native sampling.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import json
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MODELS = {
    "flux": (16, 8, 12),
    "sd3": (16, 8, 12),
    "pixart": (4, 40, 44),
    "hunyuandit": (4, 8, 12),
    "zimage": (16, 8, 12),
    "qwen-image": (16, 1, 8, 12),
    "qwen-image edit": (16, 1, 8, 12),
    "sdxl": (4, 8, 12),
    "sdxl v": (4, 8, 12),
    "sdxl refiner": (4, 8, 12),
}
"""Channels, frames (of a latent that has any), rows and columns of the latent. ComfyUI divides by zero for a PixArt of
fewer."""


def vae_scale(channels: int) -> dict[str, Any]:
    """What a VAE's config.json says of its latents, by channel too."""
    numbers = torch.arange(1.0, 1 + channels) / channels
    return {
        "scaling_factor": 0.69,
        "shift_factor": -0.21,
        "latents_mean": (numbers - 0.4).tolist(),
        "latents_std": (numbers + 0.7).tolist(),
    }


def scaled_folder(model: str) -> str:
    return f"{model} of another scale"


CONTROLLED = ("flux", "sd3", "hunyuandit", "sd3, Stability's", "sd3, Stability's with embedded text")
"""ControlNets, each named for its model first."""
FOR_COMFYUI = CONTROLLED[3:]
"""ComfyUI gives the first of these positions of its own, where the ranks and diffusers give it the model's; the ranks
know none of the second kind."""
RANKS = (1, 2, 4)
UNETS = ("sdxl", "sdxl v", "sdxl refiner")
ON_TWO = ("zimage", "qwen-image", "qwen-image edit", *UNETS)
"""Of which other tests sample the other numbers of ranks."""
STEPS = 2
CHANGED = 1e-2
"""Relative difference of latents that shows that something was obeyed."""


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
    """What is set of each entry of the positive CONDITIONING."""
    negative: dict[str, Any] = field(default_factory=dict)
    """What is set of the negative one's."""
    node: str = "KSampler"
    """What samples in ComfyUI, one of `WAYS`. Those of custom samplers have no like among our nodes."""
    half: bool = False
    """With latents of fp16, as ComfyUI's nodes make since 2026 with `--fp16-intermediates`."""
    scaled: bool = False
    """From a diffusers folder whose VAE scales latents as `vae_scale` says, and not as the family's usual one does."""
    controls: str = ""
    """With two of these ControlNets, the second for a part of the run: of ComfyUI's own with its own model. With ours,
    of ComfyUI's own, of ours, and of one of each in either order; of ours for Parallel Sampler."""


def sweep(samplers: tuple[str, ...], schedulers: tuple[str, ...]) -> dict[str, Case]:
    pairs = itertools.product(samplers, schedulers)
    settings = ({"sampler_name": sampler, "scheduler": scheduler, "cfg": 4.0} for sampler, scheduler in pairs)
    return {f"{each['sampler_name']} {each['scheduler']}": Case("sd3", (1,), sampler=each) for each in settings}


LEFT = torch.zeros(1, 64, 96)
LEFT[..., :40] = 1
REFERENCES = [torch.linspace(-2, 2, 16 * 6 * 4).view(1, 16, 6, 4), torch.linspace(3, -1, 16 * 5 * 9).view(1, 16, 5, 9)]
CONDITIONINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "two prompts": ({}, {"strength": 0.5}),
    "area": ({}, {"area": (4, 6, 2, 4), "strength": 0.8}),
    "area of percents": ({"area": ("percentage", 1.0, 0.7, 0.0, 0.3)}, {"strength": 0.3}),
    "masks": ({"mask": LEFT, "mask_strength": 0.7}, {"mask": 1 - LEFT, "set_area_to_bounds": True}),
    "no guidance": ({"guidance": None},),
    "time ranges": ({"end_percent": 0.4}, {"start_percent": 0.4}),
}
PARTS: dict[str, list[dict[str, Any]]] = {
    "from 1": [{"start_at_step": 1}],
    "to 1": [{"end_at_step": 1}],
    "to 1, with leftover noise": [{"end_at_step": 1, "return_with_leftover_noise": "enable"}],
    "to 1 and from 1": [
        {"end_at_step": 1, "return_with_leftover_noise": "enable"},
        {"start_at_step": 1, "add_noise": "disable"},
    ],
    "from 2": [{"start_at_step": 2}],
}
"""Of runs of two steps: what is set of KSamplerAdvanced, one after the other, beside values that take the whole run."""
EDITED = [
    torch.linspace(-2, 2, 16 * 6 * 4).view(1, 16, 1, 6, 4),
    torch.linspace(3, -1, 16 * 5 * 9).view(1, 16, 1, 5, 9),
]
"""Latents of pictures for a Qwen-Image Edit, the second of odd sides, longer than the picture."""


def ranks_of(name: str) -> tuple[int, ...]:
    return (2,) if name in ON_TWO else RANKS


CASES = {
    **{name: Case(name, ranks_of(name), sampler={"cfg": 4.0}) for name in MODELS},
    **{f"{name}, cfg 1": Case(name, ranks_of(name), sampler={"cfg": 1.0}) for name in MODELS},
    **{
        f"{name}, batch 3, masked, denoise 0.6": Case(
            name, ranks_of(name), 3, masked=True, sampler={"denoise": 0.6, "cfg": 4.0}
        )
        for name in MODELS
    },
    **{
        f"{name}, references ({places or 'its own'})": Case(
            name,
            batch=2,
            sampler={"cfg": 4.0},
            entries=({"reference_latents": EDITED} | ({"reference_latents_method": places} if places else {}),),
            negative={"reference_latents": EDITED},
        )
        for name, rules in (
            ("qwen-image", ("", "offset")),
            ("qwen-image edit", ("", "index")),
        )
        for places in rules
    },
    "qwen-image, two prompts of different lengths, a mask, odd size": Case(
        "qwen-image", batch=2, size=(7, 9), sampler={"cfg": 4.0}, entries=({"mask": LEFT}, {"strength": 0.5})
    ),
    "sdxl, two prompts of different sizes, a mask, odd size": Case(
        "sdxl",
        batch=2,
        size=(7, 9),
        sampler={"cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"},
        entries=({"mask": LEFT, "crop_w": 24, "target_width": 512, "target_height": 384}, {"strength": 0.5}),
    ),
    "sdxl refiner, a score, an area": Case(
        "sdxl refiner",
        sampler={"cfg": 4.0, "scheduler": "sgm_uniform"},
        entries=({"aesthetic_score": 8.0}, {"area": (4, 6, 2, 4)}),
    ),
    "zimage, two prompts of different lengths, a mask, odd size": Case(
        "zimage", batch=2, size=(7, 9), sampler={"cfg": 4.0}, entries=({"mask": LEFT}, {"strength": 0.5})
    ),
    **{
        f"{name}, {what}": Case(name, (2,), 2, sampler={"cfg": 4.0}, entries=entries)
        for name in ("flux", "sd3")
        for what, entries in CONDITIONINGS.items()
    },
    **{
        f"{name}, {node}": Case(name, sampler={"cfg": 4.0}, node=node)
        for name in ("flux", "sd3")
        for node in ("SamplerCustom", "SamplerCustomAdvanced")
    },
    **{
        f"{name}, steps {what}": Case(name, sampler={"cfg": 4.0, "sampler_name": sampler}, node=f"steps {what}")
        for name, sampler in (("flux", "euler"), ("sd3", "dpmpp_2m_sde"), ("pixart", "euler_ancestral"))
        for what in PARTS
    },
    **{
        f"{name}, two ControlNets": Case(name.split(", ")[0], batch=2, sampler={"cfg": 4.0}, controls=name)
        for name in CONTROLLED
    },
    **{
        f"flux, references ({places})": Case(
            "flux", (2,), 2, entries=({"reference_latents": REFERENCES, "reference_latents_method": places},)
        )
        for places in ("offset", "index", "uxo")
    },
    **{
        f"{name}, a VAE of another scale, denoise {denoise}": Case(
            name, batch=2, masked=denoise < 1, sampler={"denoise": denoise, "cfg": 4.0}, scaled=True
        )
        for name in MODELS
        # A folder without a scheduler is of a model that predicts the noise.
        if name != "sdxl v"
        for denoise in (1.0, 0.6)
    },
    **{
        f"{name}, fp16 latents": Case(name, batch=2, masked=True, sampler={"denoise": 0.6, "cfg": 4.0}, half=True)
        for name in MODELS
    },
    "flux, area of the negative prompt": Case("flux", sampler={"cfg": 4.0}, negative={"area": (5, 8, 0, 0)}),
    "flux, area of the negative prompt, cfg 1": Case("flux", entries=({}, {}), negative={"area": (5, 8, 0, 0)}),
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
    lengths = (9 + number for number in range(len(case.entries)))
    positive = [
        [tokens, entry | extra]
        for extra, length in zip(case.entries, lengths, strict=False)
        for tokens, entry in [_entry(case.model, draw, length)]
    ]
    negative = [[tokens, entry | case.negative] for tokens, entry in [_entry(case.model, draw, 6)]]
    *channels, rows, columns = MODELS[case.model]
    rows, columns = case.size or (rows, columns)
    latent = {"samples": torch.zeros(case.batch, *channels, rows, columns)}
    if case.masked:
        latent["samples"] = draw(case.batch, *channels, rows, columns)
        latent["noise_mask"] = (draw(1, 8 * rows, 8 * columns) > 0).float()
    if case.half:
        latent["samples"] = latent["samples"].half()
    return positive, negative, latent


def _drawer(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _entry(model: str, draw: Any, text: int) -> list[Any]:
    """Of a prompt; `text`: its length, where texts may be of different ones."""
    if model in UNETS:
        return [draw(1, text, 24), {"pooled_output": draw(1, 12), "width": 640, "height": 480}]
    if model in ON_TWO:
        return [draw(1, text, 20 if model == "zimage" else 24), {}]
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
    import comfy.samplers
    import server
    from paralleldit.launcher import lifecycle
    from paralleldit.launcher.spec import SidecarSpec
    from paralleldit.nodes import NODE_CLASS_MAPPINGS, host
    from paralleldit.nodes.comfyui.host import ComfyHost
    from paralleldit.nodes.layout_choice import LayoutChoice
    from paralleldit.parallel_backend.sampling.names import SAMPLER_NAMES, SCHEDULER_NAMES

    server.PromptServer.instance = SimpleNamespace(last_node_id=None)
    here = ComfyHost(SidecarSpec(device="cpu", directory=folder / "runtime"))
    here.takes_paths = True
    host.use(here)
    native = {name: native_model(folder / f"{name}.json") for name in MODELS if host_takes(folder / f"{name}.json")}
    control = {name: with_controls(folder / name, name, native[name.split(", ")[0]]) for name in CONTROLLED}
    loader = NODE_CLASS_MAPPINGS["ParallelDiTLoader"]()
    for name in native:
        check_with_newer_management(loader, folder / f"{name}.safetensors", native[name])
    # An older ComfyUI lacks some samplers, and samples by another in their place.
    known = tuple(name for name in SAMPLER_NAMES if name in comfy.samplers.KSampler.SAMPLERS)
    cases = CASES | sweep(known, tuple(SCHEDULER_NAMES))
    errors = {}
    for count in ranks:
        for name, case in cases.items():
            if count not in case.ranks or case.model not in native:
                continue
            choice = LayoutChoice(ranks=count, **case.layout)
            file = folder / (scaled_folder(case.model) if case.scaled else f"{case.model}.safetensors")
            model = loader.load(str(file), "auto", choice)[0]
            truth = of_other_scale(native[case.model]) if case.scaled else native[case.model]
            errors[f"{name} [{count}]"] = compare(
                case, truth, model, NODE_CLASS_MAPPINGS["ParallelDiTSampler"], control.get(case.controls)
            )
    lifecycle.stop(here.spec.slot)
    (folder / "errors.json").write_text(json.dumps(errors))


def check_with_newer_management(loader: Any, file: Path, native: Any) -> None:
    """What ComfyUI does with memory and several GPUs since 2026: LoRA nodes find all weights, and no copy is made."""
    from paralleldit.parallel_backend.errors import UserError

    is_known = importlib.util.find_spec("comfy.memory_management") is not None
    memory = importlib.import_module("comfy.memory_management") if is_known else SimpleNamespace(aimdo_enabled=False)
    had, memory.aimdo_enabled = memory.aimdo_enabled, True
    try:
        ours = loader.load(str(file), "auto", None)[0]
    finally:
        memory.aimdo_enabled = had
    unknown = native.model_state_dict("diffusion_model.").keys() - ours.model_state_dict().keys()
    assert not unknown, f"{file.stem}: {sorted(unknown)}"
    refusal = ""
    try:
        ours.deepclone_multigpu()
    except UserError as error:
        refusal = str(error)
    assert "cannot copy it to other GPUs" in refusal


def with_controls(folder: Path, name: str, native: Any) -> Callable[..., tuple[Any, Any]]:
    """Puts two ControlNets for `native` on the prompts, each by ComfyUI's own nodes or, where `ours` says so, by ours.

    Their picture is encoded in the ranks; the VAE and what else is read go to `folder`.
    """
    from paralleldit.nodes import NODE_CLASS_MAPPINGS
    from paralleldit.tests.comfyui.controlnet_host import MODES, controlnet
    from paralleldit.tests.tiny_flux import write_vae

    write_vae(folder, MODELS[name.split(", ")[0]][0])
    file = folder / "controlnet.safetensors"
    network = controlnet(name, native, file)
    vae = NODE_CLASS_MAPPINGS["ParallelDiTVAELoader"]().load(str(folder / "vae"), "auto", None)[0]
    picture = torch.rand(1, 80, 96, 3, generator=torch.Generator().manual_seed(5))

    def apply(positive: Any, negative: Any, ours: tuple[bool, bool]) -> tuple[Any, Any]:
        for is_ours, (strength, end) in zip(ours, ((0.7, 1.0), (0.5, 0.4)), strict=True):
            settings = {"strength": strength, "start_percent": 0.0, "end_percent": end, "image": picture, "vae": vae}
            settings |= {"positive": positive, "negative": negative}
            if is_ours:
                net = NODE_CLASS_MAPPINGS["ParallelDiTControlNetLoader"]().load(str(file))[0]
                positive, negative = NODE_CLASS_MAPPINGS["ParallelDiTControlNetApply"]().apply(
                    controlnet=net, mode=MODES.get(name, -1), **settings
                )
            else:
                positive, negative = call("ControlNetApplyAdvanced", control_net=network, **settings)
        return positive, negative

    return apply


def call(node: str, **inputs: Any) -> Any:
    """The outputs of a node of ComfyUI, of either of its two kinds."""
    from comfy_extras import nodes_custom_sampler

    import nodes as host_nodes

    kind = host_nodes.NODE_CLASS_MAPPINGS.get(node) or getattr(nodes_custom_sampler, node)
    return kind.execute(**inputs) if hasattr(kind, "execute") else getattr(kind(), kind.FUNCTION)(**inputs)


def sample_advanced(*, seed: int, denoise: float, **settings: Any) -> Any:
    whole = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10_000, "return_with_leftover_noise": "disable"}
    return call("KSamplerAdvanced", noise_seed=seed, **whole | settings)


def in_parts(parts: list[dict[str, Any]], sample: Callable[..., Any]) -> Callable[..., Any]:
    """Samplers one after the other, each of a part of the steps."""

    def sampled(*, latent_image: Any, **settings: Any) -> Any:
        for part in parts:
            latent_image = sample(latent_image=latent_image, **settings, **part)[0]
        return (latent_image,)

    return sampled


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
    "SamplerCustom": sample_custom,
    "SamplerCustomAdvanced": sample_custom_advanced,
    **{f"steps {what}": in_parts(parts, sample_advanced) for what, parts in PARTS.items()},
}
"""From what is set of KSampler to the LATENT of a sampling node of ComfyUI."""


@torch.inference_mode()
def compare(case: Case, native: Any, ours: Any, parallel: type, control: Any) -> list[float]:
    from comfy.cli_args import args

    def latent(model: Any, sample: Callable[..., Any], controls: tuple[bool, bool] | None) -> Tensor:
        positive, negative, image = inputs(case)
        if controls:
            positive, negative = control(positive, negative, controls)
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

    def error(found: Tensor) -> float:
        """Relative; absolute where the latent stays the empty one that it was."""
        assert found.dtype == truth.dtype
        return float((found.float() - truth.float()).norm() / (truth.float().norm() or 1.0))

    args.fp16_intermediates = case.half
    stock = WAYS[case.node]
    theirs, mine = ((False, False), (True, True)) if case.controls else (None, None)
    truth = latent(native, stock, theirs)
    if case.controls:
        assert error(latent(native, stock, None)) > CHANGED, "the ControlNets change next to nothing"
    parts = {"KSampler": [{}]} | {f"steps {what}": own for what, own in PARTS.items()}
    of_ours = [in_parts(parts[case.node], parallel().sample)] if case.node in parts else []
    mixed = (theirs, mine, (False, True), (True, False)) if case.controls else (None,)
    if case.controls in FOR_COMFYUI:
        mixed, of_ours = (theirs,), []
    of_stock = max(error(latent(ours, stock, each)) for each in mixed)
    return [of_stock, *(error(latent(ours, each, mine)) for each in of_ours)]


def of_other_scale(native: Any) -> Any:
    """ComfyUI's own MODEL, as if its VAE scaled latents as `vae_scale` says."""
    scaled = native.clone()
    own = copy.copy(native.model.latent_format)
    told = vae_scale(own.latent_channels)
    mean, std = (
        torch.tensor(told[f"latents_{name}"]).view(1, -1, *[1] * own.latent_dimensions) for name in ("mean", "std")
    )
    own.process_in = lambda latent: ((latent - mean) / std - told["shift_factor"]) * told["scaling_factor"]
    own.process_out = lambda latent: (latent / told["scaling_factor"] + told["shift_factor"]) * std + mean
    scaled.model = copy.copy(native.model)
    scaled.model.latent_format = own
    return scaled


def host_takes(told: Path) -> bool:
    """Whether this ComfyUI is new enough for the model of the file beside `told`, and for all that its config says."""
    from paralleldit.nodes.comfyui.remote_model import host_knows, unet_config
    from paralleldit.parallel_backend.families.registry import FAMILIES

    handle = json.loads(told.read_text())
    spec = FAMILIES[handle["family"]]
    return host_knows(spec) and unet_config(spec, handle["config"]) == spec.host_config(handle["config"])


def native_model(told: Path) -> Any:
    """ComfyUI's own MODEL of the file beside `told`."""
    import comfy.model_management
    import comfy.model_patcher
    from paralleldit.nodes.comfyui.remote_model import model_config
    from paralleldit.parallel_backend.families.registry import FAMILIES
    from safetensors.torch import load_file

    handle = json.loads(told.read_text())
    config = model_config(FAMILIES[handle["family"]], handle["config"])
    config.set_inference_dtype(torch.float32, None)
    weights = load_file(told.with_suffix(".safetensors"))
    model = config.get_model(weights, "")
    model.load_model_weights(weights, "")
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(count) for count in sys.argv[2:]])
