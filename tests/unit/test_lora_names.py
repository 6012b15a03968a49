"""What trainers call the modules of a model, and LoRA files that are for something else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paralleldit.nodes.request.weight_patches import changes_of
from paralleldit.parallel_backend.adapters.lora.file import read_lora
from paralleldit.parallel_backend.adapters.lora.module_names import Names
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.files import open_checkpoint
from paralleldit.tests.tiny_models import TINY_MODELS
from paralleldit.tests.unit.flux_original_layout import HIDDEN, tiny_flux
from safetensors.torch import save_file

RANK = 2
ATTENTION = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v")
SINGLE = tuple(f"single_transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v"))
MLP = "single_transformer_blocks.0.proj_mlp"
NAMED = {
    "kohya": ("lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight", 3, ATTENTION),
    "ai-toolkit": ("transformer.transformer_blocks.0.attn.to_q.lora_{AB}.weight", 1, ATTENTION[:1]),
    "DiffSynth": ("transformer_blocks.0.attn.to_k.lora_{AB}.default.weight", 1, ATTENTION[1:2]),
    "OneTrainer": ("lora_transformer_transformer_blocks_0_attn_to_v.lora_{}.weight", 1, ATTENTION[2:]),
    "SimpleTuner's LyCORIS": ("lycoris_transformer_blocks_0_attn_to_v.lora_{}.weight", 1, ATTENTION[2:]),
    "ComfyUI's training": ("diffusion_model.double_blocks.0.img_attn.qkv.lora_{}.weight", 3, ATTENTION),
    "LyCORIS, after Flux.2": (
        "lycoris_transformer_blocks_0_ff_context_linear_out.lora_{}.weight",
        1,
        ("transformer_blocks.0.ff_context.net.2",),
    ),
    "one projection, after Flux.2": (
        "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_{AB}.weight",
        7,
        (*SINGLE, MLP),
    ),
    "XLabs, image": ("double_blocks.0.processor.qkv_lora1.{}.weight", 3, ATTENTION),
    "XLabs, text": ("double_blocks.0.processor.proj_lora2.{}.weight", 1, ("transformer_blocks.0.attn.to_add_out",)),
    "USO": ("single_blocks.0.processor.qkv_lora.{}.weight", 3, SINGLE),
    "USO, out": ("single_blocks.0.processor.proj_lora.{}.weight", 1, ("single_transformer_blocks.0.proj_out",)),
    "linear1_qkv": ("diffusion_model.single_blocks.0.linear1_qkv.lora_{}.weight", 3, SINGLE),
    "Wan Fun's underscores": ("lora_unet__double_blocks_0_img_attn_qkv.lora_{}.weight", 3, ATTENTION),
}
"""How a trainer calls the two matrices, how many times the model's width they have in rows, and what they change."""


@pytest.fixture(scope="module")
def names() -> Names:
    return Names(FAMILIES["flux"], {name: tuple(each.shape) for name, each in tiny_flux().state_dict().items()})


@pytest.mark.parametrize(("called", "rows", "modules"), NAMED.values(), ids=NAMED)
def test_a_lora_changes_the_modules_that_its_trainer_means(called, rows: int, modules, names, tmp_path: Path) -> None:
    columns = HIDDEN * (5 if "proj_lora" in called and "single" in called else 4 if "linear_out" in called else 1)
    up, down = (called.replace("{}", end).replace("{AB}", letter) for end, letter in (("up", "B"), ("down", "A")))
    tensors = {up: torch.ones(rows * HIDDEN, RANK), down: torch.ones(RANK, columns)}
    save_file(tensors, tmp_path / "lora.safetensors")
    file = read_lora(open_checkpoint(tmp_path / "lora.safetensors"), names)
    assert [change.place.parameter for change in file.changes] == [f"{module}.weight" for module in modules]
    assert not file.strange
    covered = torch.cat([change.place.rows for change in file.changes])
    assert covered.tolist() == list(range(rows * HIDDEN))


OTHERS = {
    "Qwen-Image Lightning": ("qwen-image", "transformer_blocks.0.attn.add_k_proj.lora_{}.weight", "same"),
    "Qwen-Image, with the model's prefix": (
        "qwen-image",
        "diffusion_model.transformer_blocks.1.img_mod.1.lora_{AB}.weight",
        "transformer_blocks.1.img_mod.1",
    ),
    "Qwen-Image, DiffSynth": ("qwen-image", "transformer_blocks.0.txt_mlp.net.2.lora_{AB}.default.weight", "same"),
    "Qwen-Image, kohya": (
        "qwen-image",
        "lora_unet_transformer_blocks_0_attn_to_out_0.lora_{}.weight",
        "transformer_blocks.0.attn.to_out.0",
    ),
    "Qwen-Image, SimpleTuner": (
        "qwen-image",
        "lycoris_transformer_blocks_0_img_mlp_net_0_proj.lora_{}.weight",
        "transformer_blocks.0.img_mlp.net.0.proj",
    ),
    "Z-Image, ai-toolkit": (
        "z-image",
        "diffusion_model.layers.0.attention.to_v.lora_{AB}.weight",
        "layers.0.attention.to_v",
    ),
    "Z-Image, its own fused one": (
        "z-image",
        "lora_unet_layers_0_attention_qkv.lora_{}.weight",
        "layers.0.attention.to_{}",
    ),
    "Z-Image, a refiner": (
        "z-image",
        "transformer.noise_refiner.0.adaLN_modulation.0.lora_{AB}.weight",
        "noise_refiner.0.adaLN_modulation.0",
    ),
}
"""The model, how a trainer calls the two matrices, and the module: the same name, or three where q, k and v are one."""


@pytest.mark.parametrize(("model", "called", "module"), OTHERS.values(), ids=OTHERS)
def test_a_lora_of_another_family_changes_what_its_trainer_means(model, called, module, tmp_path: Path) -> None:
    tiny = TINY_MODELS[model]
    shapes = {name: tuple(each.shape) for name, each in tiny.make(2, 1).state_dict().items()}
    module = called.partition(".lora")[0] if module == "same" else module
    modules = [module.replace("{}", letter) for letter in "qkv"] if "{}" in module else [module]
    rows, columns = (sum(shapes[f"{each}.weight"][0] for each in modules), shapes[f"{modules[0]}.weight"][1])
    up, down = (called.replace("{}", end).replace("{AB}", letter) for end, letter in (("up", "B"), ("down", "A")))
    save_file({up: torch.ones(rows, RANK), down: torch.ones(RANK, columns)}, tmp_path / "lora.safetensors")
    file = read_lora(open_checkpoint(tmp_path / "lora.safetensors"), Names(tiny.spec, shapes))
    assert [change.place.parameter for change in file.changes] == [f"{each}.weight" for each in modules]
    assert not file.strange


REFUSED = {
    "text encoders alone": (
        {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (4, 2)},
        "is for text encoders alone: all of its 1",
    ),
    "control LoRA of Black Forest Labs": (
        {"img_in.lora_A.weight": (2, 128), "double_blocks.0.img_attn.norm.key_norm.scale": (8,)},
        "is a control LoRA: it widens",
    ),
    "control LoRA of ComfyUI": ({"diffusion_model.img_in.reshape_weight": (2,)}, "is a control LoRA: it widens"),
    "OFT": ({"lora_unet_double_blocks_0_img_attn_proj.oft_blocks": (2, 4, 4)}, "is an OFT or BOFT"),
    "a VAE": ({"decoder.mid.attn_1.q.weight": (2, 2)}, "is a VAE; a LoRA was asked for"),
    "another model's": ({"lora_unet_input_blocks_1_1.lora_up.weight": (2, 2)}, "changes nothing in this model"),
}


@pytest.mark.parametrize(("shapes", "words"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_for_something_else_is_called_what_it_is(shapes, words: str, names, tmp_path: Path) -> None:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=words) as refused:
        read_lora(open_checkpoint(tmp_path / "file.safetensors"), names)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (("set", (torch.ones(2),)), "is a control LoRA: it widens"),
        (
            SimpleNamespace(name="lora", weights=(torch.ones(2, 2), torch.ones(2, 9), None, None, None, (2, 9))),
            "is a control LoRA: it widens",
        ),
        (SimpleNamespace(name="oft", weights=()), "is an OFT or BOFT"),
        (SimpleNamespace(name="glora", weights=()), "is a GLoRA"),
    ],
    ids=["set", "wider", "OFT", "GLoRA"],
)
def test_what_comfyui_read_of_such_a_file_is_refused_by_the_same_words(patch, words: str) -> None:
    with pytest.raises(UserError, match=words):
        changes_of({"diffusion_model.img_in.weight": [(1.0, patch, 1.0, None, None)]})
