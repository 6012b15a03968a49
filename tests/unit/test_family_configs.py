"""Rules and configs of families at the shapes of published models, from the names and shapes of weights alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from paralleldit.parallel_backend.adapters.lora.module_names import original_places
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.keys.flux import FLUX
from paralleldit.parallel_backend.families.keys.qwen_image import QWEN_IMAGE
from paralleldit.parallel_backend.families.keys.qwen_image import REFERENCES_AT_ZERO as QWEN_AT_ZERO
from paralleldit.parallel_backend.families.keys.sdxl import SDXL
from paralleldit.parallel_backend.families.keys.wan import LANDMARKS as WAN_LANDMARKS
from paralleldit.parallel_backend.families.keys.wan import WAN
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.families.spec import FamilySpec, LatentSpec, Shapes
from paralleldit.parallel_backend.files import detect, open_checkpoint
from paralleldit.parallel_backend.files.key_map import ruled_map
from paralleldit.tests import tiny_unet
from paralleldit.tests.tiny_models import TINY_MODELS
from safetensors.torch import save_file
from torch import Tensor

PUBLISHED = {name: (spec, config) for spec in FAMILIES.values() for name, config in spec.published.items()}


def convert_unet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    of_file = {f"{single_file_utils.LDM_UNET_KEY}{key}": rows for key, rows in weights.items()}
    config = {"addition_embed_type": "text_time", "layers_per_block": 2}
    return single_file_utils.convert_ldm_unet_checkpoint(of_file, config)


CONVERTERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "zimage": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "hunyuanvideo": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    "mochi": single_file_utils.convert_mochi_transformer_checkpoint_to_diffusers,
    "qwen-image": SINGLE_FILE_LOADABLE_CLASSES["QwenImageTransformer2DModel"]["checkpoint_mapping_fn"],
    "sdxl": convert_unet,
    "sdxl-refiner": convert_unet,
}
"""Those that diffusers has for the single files of a family."""
LATENT = LatentSpec(4, scale=2.0, shift=1.0)


@cache
def shapes_of(model: str) -> Shapes:
    """Of a published model's parameters, and of its buffers that files hold, as diffusers names them."""
    spec, config = PUBLISHED[model]
    with torch.device("meta"):
        network = getattr(diffusers, spec.class_name)(**config)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def original_shapes(spec: FamilySpec, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Of the same weights in the original layout."""
    # Of several original names of one parameter, files have one: here the first.
    named = {
        tuple(place.parameter for place in places): key
        for key, places in reversed(original_places(spec.rules, shapes).items())
    }
    renamed = {name for names in named for name in names}
    return {
        **{key: (sum(shapes[name][0] for name in names), *shapes[names[0]][1:]) for names, key in named.items()},
        **{name: shape for name, shape in shapes.items() if name not in renamed},
    }


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_shapes_tell_the_config_of_a_published_model(model, layout):
    spec, config = PUBLISHED[model]
    shapes = shapes_of(model)
    found = spec.derive_config(layout, shapes if layout == "diffusers" else original_shapes(spec, shapes), config)
    assert {name: found[name] for name in config} == config


@pytest.mark.parametrize("model", [name for name, (spec, _) in PUBLISHED.items() if spec.name in CONVERTERS])
def test_rules_lead_every_row_where_the_converter_of_diffusers_does(model):
    """Every row of the original's weights is its number."""
    spec, _ = PUBLISHED[model]
    shapes = shapes_of(model)
    original = original_shapes(spec, shapes)
    weights, starts, rows = {}, {}, 0
    for key, shape in original.items():
        starts[key] = rows
        weights[key] = torch.arange(rows, rows + shape[0]).view(-1, *[1] * (len(shape) - 1))
        rows += shape[0]
    converted = CONVERTERS[spec.name](dict(weights))
    assert converted.keys() == shapes.keys()
    for name, pieces in ruled_map(spec.rules, original, shapes).items():
        own = torch.cat(
            [torch.arange(starts[piece.key] + piece.start, starts[piece.key] + piece.stop) for piece in pieces]
        )
        assert torch.equal(converted[name].flatten(), own), name


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, LatentSpec(4, scale=0.5, shift=0.25)),
        ({"scaling_factor": 0.5, "shift_factor": None}, LatentSpec(4, scale=0.5)),
        (
            {"latents_mean": [1, 2, 0, -1], "latents_std": [3, 4, 5, 6]},
            LatentSpec(4, scale=2.0, shift=1.0, mean=(1, 2, 0, -1), std=(3, 4, 5, 6)),
        ),
        ({"scaling_factor": 0.5, "latents_mean": None, "latents_std": None}, LatentSpec(4, scale=0.5)),
        ({}, LATENT),
    ],
    ids=str,
)
def test_a_latent_is_scaled_as_its_vae_says(config, expected):
    assert LATENT.of_vae(config) == expected
    latent = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(expected.process_out(expected.process_in(latent)), latent)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"scaling_factor": 0}, "scaling_factor=0"),
        ({"scaling_factor": "large"}, "scaling_factor='large'"),
        ({"scaling_factor": float("nan")}, "scaling_factor=nan"),
        ({"scaling_factor": 1.0, "shift_factor": float("inf")}, "shift_factor=inf"),
        ({"latents_mean": [1, 2], "latents_std": [3, 4]}, "4 channels .* 2 latents_mean and 2 latents_std"),
        ({"latents_mean": [1, 2, 3, 4], "latents_std": [3, 4, 5, 0]}, "4 latents_std"),
    ],
    ids=str,
)
def test_numbers_by_which_no_latent_can_be_scaled_are_refused(config, words):
    with pytest.raises(UserError, match=words):
        LATENT.of_vae(config)


def test_a_neighbour_with_the_keys_of_a_family_is_refused_by_its_name(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(1) for key in FLUX.landmarks["original"].values()}, file, {"kind": "cousin"})
    by_kind = replace(FLUX, reject=lambda shapes, metadata: metadata.get("kind"))
    monkeypatch.setitem(FAMILIES, "flux", by_kind)
    with pytest.raises(UserError, match=r"holds cousin, which is not served; Flux\.1 is"):
        detect(open_checkpoint(file))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (None, {}),
        (None, {QWEN_AT_ZERO: (0,)}),
        ("Qwen-Image Layered", {"time_text_embed.addition_t_embedding.weight": (2, 3072)}),
        ("Mage-Flow", {"img_in.weight": (3072, 128), "proj_out.weight": (128, 3072)}),
        ("a Qwen-Image that takes 132 values a token and predicts 64", {"img_in.weight": (3072, 132)}),
    ],
)
def test_other_kinds_of_qwen_image_are_refused_by_their_names(kind, changes):
    assert QWEN_IMAGE.reject({**shapes_of("qwen-image"), **changes}, {}) == kind


def test_a_mark_or_a_config_says_that_references_are_at_time_zero(tmp_path):
    weights = {name: torch.empty(shape) for name, shape in tiny_shapes("qwen-image edit").items()}
    save_file(weights, tmp_path / "edit.safetensors")
    save_file({**weights, QWEN_AT_ZERO: torch.empty(0)}, tmp_path / "edit 2511.safetensors")
    for name, at_zero in (("edit", False), ("edit 2511", True)):
        found = detect(open_checkpoint(tmp_path / f"{name}.safetensors"))
        assert (found.family, found.config["zero_cond_t"]) == ("qwen-image", at_zero)
        assert found.pieces(tiny_shapes("qwen-image edit")).keys() == weights.keys()
    assert QWEN_IMAGE.derive_config("diffusers", tiny_shapes("qwen-image edit"), {"zero_cond_t": True})["zero_cond_t"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (None, {}),
        (None, {"v_pred": (0,)}),
        ("an SDXL for inpainting", {"conv_in.weight": (320, 9, 3, 3)}),
        ("an SDXL that edits pictures", {"conv_in.weight": (320, 8, 3, 3)}),
        ("an SDXL that takes 5 channels", {"conv_in.weight": (320, 5, 3, 3)}),
        ("Playground 2.5", {"edm_mean": (4,), "edm_std": (4,)}),
        ("an SDXL of continuous noise levels", {"edm_vpred.sigma_max": ()}),
        ("Stable Video Diffusion", {"input_blocks.1.0.time_stack.in_layers.0.weight": (320,)}),
        ("a Stable Diffusion 2 that takes a picture", {"down_blocks.0.attentions.0.norm.weight": (320,)}),
        ("an SDXL with fewer blocks", {"up_blocks.0.attentions.2.transformer_blocks.10.norm1.weight": (1280,)}),
        ("an SDXL with fewer blocks", {"input_blocks.3.0.in_layers.0.weight": (320,)}),
    ],
)
def test_other_kinds_of_sdxl_are_refused_by_their_names(kind, changes):
    found = SDXL.reject({**shapes_of("sdxl"), **changes}, {})
    assert found == kind or (kind and found and found.startswith(kind))


@pytest.mark.parametrize("marks", [(), ("v_pred",), ("v_pred", "ztsnr")], ids=str)
def test_marks_beside_a_model_tell_what_it_predicts(tmp_path, marks):
    network = tiny_unet.of_files()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    weights = {
        f"model.diffusion_model.{key}": torch.zeros(shape, dtype=torch.float16)
        for key, shape in original_shapes(SDXL, shapes).items()
    }
    beside = {name: torch.zeros(0) for name in (*marks, "first_stage_model.decoder.conv_in.weight")}
    save_file({**weights, **beside}, tmp_path / "model.safetensors")
    found = detect(open_checkpoint(tmp_path / "model.safetensors"))
    assert (found.family, found.config["_marks"]) == ("sdxl", marks)
    assert {name: network.config[name] for name in found.config} == {**found.config, "_marks": ()}
    assert found.pieces(shapes).keys() == shapes.keys()


@pytest.mark.parametrize(
    ("scheduler", "marks"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}, ()),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}, ("v_pred",)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ("v_pred", "ztsnr")),
        ({"_class_name": "EDMEulerScheduler"}, None),
        ({"prediction_type": "sample"}, None),
    ],
    ids=str,
)
def test_a_pipelines_scheduler_tells_what_its_model_predicts(tmp_path, scheduler, marks):
    tiny_unet.network().save_pretrained(tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    del config["_marks"]
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if marks is None:
        with pytest.raises(UserError, match=r"scheduler_config\.json says .* not served for SDXL"):
            detect(open_checkpoint(tmp_path))
    else:
        assert detect(open_checkpoint(tmp_path)).config["_marks"] == marks


def tiny_shapes(model: str) -> Shapes:
    return {name: tuple(value.shape) for name, value in TINY_MODELS[model].make(1, 1).state_dict().items()}


WIDTH = 1536


def wan_shapes(channels: int = 16, output: int = 64, layout: str = "original", **others: tuple[int, ...]) -> Shapes:
    """The tensors that tell a Wan of so many channels, and `others`."""
    keys = WAN_LANDMARKS[layout]
    known = {"patch": (WIDTH, channels, 1, 2, 2), "norm": (WIDTH,), "table": (1, 2, WIDTH), "output": (output, WIDTH)}
    shapes = {key: known.get(fact, (WIDTH, 256)) for fact, key in keys.items()}
    return {**shapes, **{name.replace("__", "."): shape for name, shape in others.items()}}


def said(**transformer: object) -> dict[str, str]:
    return {"config": json.dumps({"transformer": transformer})}


@pytest.mark.parametrize(
    ("kind", "shapes", "metadata"),
    [
        (None, wan_shapes(), {}),
        (None, wan_shapes(layout="diffusers"), {"format": "pt"}),
        (None, wan_shapes(), said(model_type="t2v")),
        ("Wan VACE", wan_shapes(vace_patch_embedding__weight=(WIDTH, 96, 1, 2, 2)), {}),
        ("Wan Fun Camera", wan_shapes(32, control_adapter__conv__weight=(WIDTH, 1536, 2, 2)), {}),
        ("Wan S2V", wan_shapes(casual_audio_encoder__encoder__final_linear__weight=(WIDTH, WIDTH)), {}),
        ("HuMo", wan_shapes(36, audio_proj__audio_proj_glob_1__layer__bias=(WIDTH,)), {}),
        ("Wan Animate", wan_shapes(36, face_adapter__fuser_blocks__0__k_norm__weight=(128,)), {}),
        ("Wan Animate", wan_shapes(36, layout="diffusers", face_adapter__0__norm_k__weight=(128,)), {}),
        ("SCAIL-2", wan_shapes(patch_embedding_mask__weight=(WIDTH, 28, 1, 2, 2)), {}),
        ("SCAIL", wan_shapes(20, patch_embedding_pose__weight=(WIDTH, 20, 1, 2, 2)), {}),
        ("Wan Dancer", wan_shapes(36, patch_embedding_global__weight=(WIDTH, 36, 1, 2, 2)), {}),
        ("Wan Fun Control", wan_shapes(48, ref_conv__weight=(WIDTH, 16, 2, 2), img_emb__proj__0__bias=(1280,)), {}),
        ("Wan FLF2V", wan_shapes(36, img_emb__emb_pos=(1, 514, 1280), img_emb__proj__0__bias=(1280,)), {}),
        ("Wan 2.1 I2V", wan_shapes(36, img_emb__proj__0__bias=(1280,)), {}),
        ("Wan 2.1 I2V", wan_shapes(36, 64, "diffusers", condition_embedder__image_embedder__norm1__bias=(1280,)), {}),
        ("Wan 2.2 I2V", wan_shapes(36), {}),
        ("Wan Fun Control", wan_shapes(48), {}),
        ("Wan 2.2 TI2V 5B", wan_shapes(48, 192), {}),
        ("a Wan that takes 20 channels and predicts 16", wan_shapes(20), {}),
        ("Wan Causal Forcing", wan_shapes(), said(causal_ar=True)),
        ("Wan flow_rvs", wan_shapes(), said(model_type="flow_rvs")),
    ],
)
def test_other_kinds_of_wan_are_refused_by_their_names(kind, shapes, metadata):
    assert WAN.reject(shapes, metadata) == kind
