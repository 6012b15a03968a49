"""Weights of a model by their original names, out of files of every layout and format: what ComfyUI copies."""

import pytest
import torch
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.files.originals import read_originals
from paralleldit.tests import tiny_sd3
from safetensors.torch import save_file

SPEC = FAMILIES["sd3"]


@pytest.fixture(scope="module")
def model():
    return tiny_sd3.tiny_transformer(heads=1, layers=2, dual=(0,), qk_norm="rms_norm", side=16)


@pytest.fixture(scope="module")
def original(model):
    return tiny_sd3.original_layout(dict(model.state_dict()))


def narrow(weights):
    """As ComfyUI's fp8 files: with a factor for each matrix."""
    found = {"scaled_fp8": torch.zeros(0)}
    for key, tensor in weights.items():
        if key.endswith("mlp.0.weight"):
            found[key.replace(".weight", ".scale_weight")] = torch.tensor(0.25)
            tensor = (tensor / 0.25).to(torch.float8_e4m3fn)
        found[key] = tensor
    return found


WRITERS = {
    "original": lambda model, weights, path: save_file(weights, path / "model.safetensors"),
    "with a prefix": lambda model, weights, path: tiny_sd3.write_original(path / "model.safetensors", model),
    "fp8 with scales": lambda model, weights, path: save_file(narrow(weights), path / "model.safetensors"),
    "diffusers": lambda model, weights, path: model.save_pretrained(path / "transformer"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_all_weights_of_what_comfyui_copies_are_read(tmp_path, model, original, name):
    original = {key: tensor.contiguous() for key, tensor in original.items()}
    WRITERS[name](model, original, tmp_path)
    path = tmp_path / "model.safetensors" if name != "diffusers" else tmp_path
    for module in SPEC.host_reads:
        found = read_originals(path, module)
        wanted = {
            key.removeprefix(f"{module}."): each for key, each in original.items() if key.startswith(f"{module}.")
        }
        assert wanted
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            error = 0.07 if "fp8" in name and key == "mlp.0.weight" else 0.0
            assert (found[key] - tensor).norm() <= error * tensor.norm(), key


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_halves_that_the_layouts_have_the_other_way_around_are_swapped(tmp_path, model, original, layout):
    original = {key: tensor.contiguous() for key, tensor in original.items()}
    WRITERS[layout](model, original, tmp_path)
    path = tmp_path / "model.safetensors" if layout == "original" else tmp_path
    found = read_originals(path, "final_layer.adaLN_modulation.1")
    assert torch.equal(found["weight"], original["final_layer.adaLN_modulation.1.weight"])
