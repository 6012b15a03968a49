import itertools

import numpy as np
import pytest
import torch
from paralleldit.tools.demo_model.adapter_checks import chalk_verdicts, edge_agreement
from paralleldit.tools.demo_model.model import new_transformer
from paralleldit.tools.demo_model.scenes import draw, edge_map, make_scene
from paralleldit.tools.demo_model.train_lora import add_lora, diffusers_layout, merge, single_file_layout

SCENES = [make_scene(55, index, held_out=True) for index in range(40)]


def chalk_share(style):
    return np.mean([all(chalk_verdicts(draw(scene, 128, style)).values()) for scene in SCENES])


def test_drawn_chalk_is_told_from_drawn_pictures():
    assert chalk_share("chalk") == 1.0
    assert chalk_share("picture") == 0.0


@pytest.mark.parametrize(
    ("level", "wrong"),
    [((18, 18, 18), {"lines"}), ((235, 235, 235), {"board", "lines"}), ((60, 10, 10), {"no colour", "lines"})],
)
def test_an_empty_picture_is_no_chalk(level, wrong):
    verdicts = chalk_verdicts(np.full((128, 128, 3), level, np.uint8))
    assert {name for name, each in verdicts.items() if not each} == wrong


def test_edges_agree_with_their_own_picture_only():
    pictures = [draw(scene, 128) for scene in SCENES]
    own = [edge_agreement(picture, edge_map(picture))["F1"] for picture in pictures]
    moved = [edge_agreement(np.roll(picture, 2, axis=1), edge_map(picture))["F1"] for picture in pictures]
    other = [edge_agreement(a, edge_map(b))["F1"] for a, b in itertools.pairwise(pictures)]
    assert own == [1.0] * len(SCENES)
    assert min(moved) > 0.9
    assert np.mean(other) < 0.4


def test_a_picture_without_edges_agrees_with_nothing():
    flat = np.full((128, 128, 3), 150, np.uint8)
    assert edge_agreement(flat, edge_map(draw(SCENES[0], 128))) == {"precision": 0.0, "recall": 0.0, "F1": 0.0}


@pytest.fixture(scope="module")
def lora():
    """A transformer, the same with a LoRA that is not zero, and the LoRA's layers."""
    torch.manual_seed(0)
    plain, adapted = new_transformer(), new_transformer()
    adapted.load_state_dict(plain.state_dict())
    layers = add_lora(adapted)
    for layer in layers.values():
        torch.nn.init.normal_(layer.up, std=0.1)
    return plain, adapted.requires_grad_(False), layers


def test_a_merged_lora_computes_what_its_layers_do(lora):
    plain, _, layers = lora
    merge(plain, diffusers_layout(layers))
    for name, layer in layers.items():
        x = torch.randn(2, layer.base.in_features)
        torch.testing.assert_close(plain.get_submodule(name)(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fused", "parts"),
    [
        (
            "lora_unet_double_blocks_1_img_attn_qkv",
            [f"transformer_blocks.1.attn.to_{each}" for each in "qkv"],
        ),
        (
            "lora_unet_single_blocks_4_linear1",
            [f"single_transformer_blocks.4.{each}" for each in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
        ),
        ("lora_unet_single_blocks_0_linear2", ["single_transformer_blocks.0.proj_out"]),
        ("lora_unet_double_blocks_2_img_mlp_0", ["transformer_blocks.2.ff.net.0.proj"]),
    ],
)
def test_the_single_file_says_the_same_as_the_diffusers_layout(lora, fused, parts):
    _, _, layers = lora
    tensors = single_file_layout(layers)
    down, up = tensors[f"{fused}.lora_down.weight"], tensors[f"{fused}.lora_up.weight"]
    scale = tensors[f"{fused}.alpha"] / len(down)
    expected = torch.cat([layers[part].up @ layers[part].down for part in parts])
    torch.testing.assert_close(scale * up @ down, expected)
