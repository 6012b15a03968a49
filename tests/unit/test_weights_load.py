"""A model loaded from any kind of file computes what the plain diffusers model of the same weights computes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.keys.flux import RULES
from paralleldit.parallel_backend.files import open_checkpoint
from paralleldit.parallel_backend.files.key_map import ruled_map
from paralleldit.parallel_backend.layout.model_part import ModelPart
from paralleldit.parallel_backend.layout.stages import Stage
from paralleldit.parallel_backend.weights.formats import BY_DTYPE
from paralleldit.parallel_backend.weights.load import load_transformer
from paralleldit.parallel_backend.weights.stored_linear import StoredLinear
from paralleldit.tests.unit.flux_original_layout import HEAD_DIM, HIDDEN, original_layout, tiny_flux
from safetensors.torch import save_file
from torch import nn

FP8 = torch.float8_e4m3fn
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": FP8}


def inputs(dtype: torch.dtype, guidance: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 12, 16, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator).to(dtype),
        "pooled_projections": torch.randn(2, 40, generator=generator).to(dtype),
        "timestep": torch.tensor([0.7, 0.2]).to(dtype),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
        **({"guidance": torch.tensor([3.5, 3.5])} if guidance else {}),
    }


@torch.no_grad()
def forward(model: nn.Module, dtype: torch.dtype, guidance: bool = True) -> torch.Tensor:
    return model(**inputs(dtype, guidance), return_dict=False)[0]


@dataclass(frozen=True)
class Case:
    form: str  # "pipeline", "component", "sharded", "index", "diffusers_file", "original", "saved_by_comfyui"
    dtype: str
    prefix: str = ""
    guidance: bool = True

    def __str__(self) -> str:
        return f"{self.form}-{self.dtype}-{self.prefix or 'bare'}-{'dev' if self.guidance else 'schnell'}"


CASES = [
    *(
        Case("original", dtype, prefix)
        for dtype in DTYPES
        for prefix in ("", "diffusion_model.", "model.diffusion_model.")
    ),
    *(Case(form, dtype) for form in ("component", "sharded", "diffusers_file") for dtype in DTYPES),
    Case("pipeline", "bf16"),
    Case("index", "bf16"),
    Case("saved_by_comfyui", "bf16"),
    Case("original", "bf16", guidance=False),
    Case("component", "bf16", guidance=False),
]


def write(case: Case, weights: dict[str, torch.Tensor], folder: Path) -> Path:
    """Writes `weights` (diffusers names) as `case` says; returns the path to load."""
    if case.form in ("original", "saved_by_comfyui", "diffusers_file"):
        named = weights if case.form == "diffusers_file" else original_layout(weights)
        if case.form == "saved_by_comfyui":
            named = {key.replace("_norm.scale", "_norm.weight"): value for key, value in named.items()}
        named = {case.prefix + key: value.contiguous() for key, value in named.items()}
        if case.prefix == "model.diffusion_model.":
            named["vae.decoder.conv_in.weight"] = torch.ones(3)
        save_file(named, folder / "model.safetensors")
        return folder / "model.safetensors"
    target = folder / "transformer" if case.form == "pipeline" else folder
    model = tiny_flux(case.guidance)
    target.mkdir(exist_ok=True)
    model.save_config(target)
    groups = [weights]
    if case.form in ("sharded", "index"):
        keys = sorted(weights)
        groups = [{key: weights[key] for key in keys[part::3]} for part in range(3)]
    names = ["diffusion_pytorch_model.safetensors"]
    if len(groups) > 1:
        names = [f"diffusion_pytorch_model-{part + 1:05}-of-00003.safetensors" for part in range(3)]
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        index = {"metadata": {}, "weight_map": weight_map}
        (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for name, group in zip(names, groups, strict=True):
        save_file(group, target / name)
    return target / "diffusion_pytorch_model.safetensors.index.json" if case.form == "index" else folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loaded_model_computes_what_the_plain_model_computes(case: Case, tmp_path: Path) -> None:
    dtype = DTYPES[case.dtype]
    plain = tiny_flux(case.guidance)
    weights = {name: tensor.to(dtype) for name, tensor in plain.state_dict().items()}
    loaded = load_transformer(write(case, weights, tmp_path), device="cpu")

    compute = torch.float32 if case.dtype == "fp8" else dtype
    plain.load_state_dict({name: tensor.to(compute) for name, tensor in weights.items()}, assign=True)
    expected = forward(plain, compute, case.guidance)
    assert (loaded.weight_dtype, loaded.compute_dtype) == (dtype, compute)
    assert torch.equal(forward(loaded.module, compute, case.guidance), expected)
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_original_layout_agrees_with_diffusers_own_conversion() -> None:
    """Diffusers' converter knows hidden size 3072 only, so the matrices have that many rows but few columns."""
    plain = tiny_flux()
    wide = {
        key: torch.randn(value.shape[0] // HIDDEN * 3072 if "scale" not in key else HEAD_DIM, *value.shape[1:])
        for key, value in original_layout(plain.state_dict()).items()
        if key.startswith(("single_blocks.", "final_layer.adaLN"))
    }
    original = original_layout(plain.state_dict()) | wide
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    pieces = ruled_map(
        RULES,
        {key: tuple(value.shape) for key, value in original.items()},
        {key: tuple(value.shape) for key, value in converted.items()},
    )
    for name, expected in converted.items():
        rows = [original[piece.key][piece.start : piece.stop] for piece in pieces[name]]
        assert torch.equal(torch.cat(rows), expected), name


def format_of(layer: str) -> torch.Tensor:
    """As ComfyUI tells it since 2026."""
    return torch.tensor(list(json.dumps({"format": layer}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("layout", "weight_scale", "input_scale"),
    [
        ("original", "scale_weight", "scale_input"),
        ("original", "weight_scale", "input_scale"),
        ("diffusers", "scale_weight", "scale_input"),
    ],
)
def test_scaled_fp8_multiplies_by_the_scale(layout: str, weight_scale: str, input_scale: str, tmp_path: Path) -> None:
    plain = tiny_flux()
    weights = original_layout(plain.state_dict()) if layout == "original" else dict(plain.state_dict())
    is_newer = weight_scale == "weight_scale"
    stored = {} if is_newer else {"scaled_fp8": torch.empty(0, dtype=FP8)}
    dequantized = {}
    for key, value in weights.items():
        dequantized[key] = value.to(FP8).float()
        stored[key] = value.to(FP8)
        if key.endswith(".weight") and value.ndim == 2:
            scale = value.abs().max() / 448
            stored[key] = (value / scale).to(FP8)
            stored[key.removesuffix("weight") + weight_scale] = scale
            stored[key.removesuffix("weight") + input_scale] = torch.tensor(1.0)
            if is_newer:
                stored[key.removesuffix("weight") + "comfy_quant"] = format_of("float8_e4m3fn")
            dequantized[key] = stored[key].float() * scale
    save_file(stored, tmp_path / "scaled.safetensors")
    save_file(dequantized, tmp_path / "plain.safetensors")
    loaded = load_transformer(tmp_path / "scaled.safetensors", device="cpu")
    wide = load_transformer(tmp_path / "scaled.safetensors", device="cpu", weight_dtype="fp32")
    expected = forward(load_transformer(tmp_path / "plain.safetensors", device="cpu").module, torch.float32)
    assert loaded.weight_dtype == FP8
    assert torch.equal(forward(loaded.module, torch.float32), expected)
    assert torch.equal(forward(wide.module, torch.float32), expected)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "fp8_e4m3fn"])
def test_weight_dtype_casts_the_file(name: str, tmp_path: Path) -> None:
    plain = tiny_flux()
    path = write(Case("original", "fp32"), plain.state_dict(), tmp_path)
    loaded = load_transformer(path, device="cpu", weight_dtype=name)
    narrow = FP8 if name == "fp8_e4m3fn" else DTYPES[name]
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.to(narrow).to(loaded.compute_dtype)
    plain.to(loaded.compute_dtype)
    assert loaded.module.x_embedder.weight.dtype == narrow
    assert torch.equal(forward(loaded.module, loaded.compute_dtype), forward(plain, loaded.compute_dtype))


def test_auto_keeps_the_precision_of_the_wider_weights_of_an_fp8_file(tmp_path: Path) -> None:
    plain = tiny_flux()
    fp8_blocks = {
        key: value.to(FP8) if "blocks." in key and value.ndim == 2 else value.bfloat16()
        for key, value in plain.state_dict().items()
    }
    loaded = load_transformer(write(Case("original", "fp8"), fp8_blocks, tmp_path), device="cpu")
    plain.load_state_dict({key: value.float() for key, value in fp8_blocks.items()})
    assert (loaded.weight_dtype, loaded.module.transformer_blocks[0].attn.to_q.weight.dtype) == (FP8, FP8)
    assert torch.equal(forward(loaded.module, torch.float32), forward(plain, torch.float32))


def test_mixed_dtypes_become_the_one_of_most_weights(tmp_path: Path) -> None:
    weights = {key: value if "norm" in key else value.half() for key, value in tiny_flux().state_dict().items()}
    loaded = load_transformer(write(Case("original", "fp16"), weights, tmp_path), device="cpu")
    assert loaded.compute_dtype == torch.float16
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("strange", "metadata", "name"),
    [
        ({"img_in.comfy_quant": format_of("nvfp4")}, {}, "nvfp4"),
        ({"img_in.comfy_quant": format_of("int8_tensorwise")}, {}, "int8_tensorwise"),
        ({}, {"_quantization_metadata": '{"layers": {"img_in": {"format": "mxfp8"}}}'}, "mxfp8"),
        ({"img_in.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}, {}, "bitsandbytes"),
        ({"single_blocks.0.linear1.qweight": torch.zeros(4, dtype=torch.int8)}, {}, "Nunchaku"),
        ({"img_in.comfy_quant": torch.zeros(4, dtype=torch.uint8)}, {}, "does not tell the format"),
        ({}, {"_quantization_metadata": "[]"}, "does not tell the format"),
    ],
)
def test_quantized_formats_that_are_not_read_are_refused_by_name(strange, metadata, name, tmp_path: Path) -> None:
    save_file(original_layout(tiny_flux().state_dict()) | strange, tmp_path / "strange.safetensors", metadata)
    with pytest.raises(UserError, match=name) as refusal:
        load_transformer(tmp_path / "strange.safetensors", device="cpu")
    assert "does not tell" in name or "bf16 or fp8 file" in refusal.value.hint


@pytest.mark.parametrize(
    ("beside", "metadata"),
    [
        ({"text_encoders.t5xxl.encoder.block.0.layer.0.SelfAttention.q.comfy_quant": format_of("nvfp4")}, {}),
        ({}, {"_quantization_metadata": '{"layers": {"text_encoders.clip_l.q": {"format": "mxfp8"}}}'}),
        ({"text_encoders.llm.layers.0.q_proj.weight.absmax": torch.zeros(4)}, {}),
        ({"first_stage_model.decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}, {}),
    ],
    ids=["comfy_quant", "metadata", "bitsandbytes", "VAE"],
)
def test_of_an_all_in_one_file_the_model_alone_is_read(beside, metadata, tmp_path: Path) -> None:
    plain = tiny_flux()
    model = {f"model.diffusion_model.{key}": value for key, value in original_layout(plain.state_dict()).items()}
    save_file(model | beside, tmp_path / "all.safetensors", metadata)
    loaded = load_transformer(tmp_path / "all.safetensors", device="cpu")
    assert torch.equal(forward(loaded.module, torch.float32), forward(plain, torch.float32))
    own = open_checkpoint(tmp_path / "all.safetensors").bytes_under(("model.diffusion_model.", ""))
    assert own == sum(value.nbytes for value in model.values())


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    weights = tiny_flux().state_dict() | {"x_embedder.weight": torch.zeros(HIDDEN, 16, dtype=torch.int8)}
    with pytest.raises(UserError, match=r"holds weights of torch.int8; readable are torch.bfloat16"):
        load_transformer(write(Case("component", "fp32"), weights, tmp_path), device="cpu")


def test_a_scale_must_be_one_number(tmp_path: Path) -> None:
    weights = tiny_flux().state_dict() | {"x_embedder.scale_weight": torch.ones(HIDDEN)}
    with pytest.raises(UserError, match=r"x_embedder.scale_weight must be one finite number, is \[64\]"):
        load_transformer(write(Case("component", "fp32"), weights, tmp_path), device="cpu")


def test_unknown_weight_dtype_is_refused(tmp_path: Path) -> None:
    path = write(Case("component", "fp32"), tiny_flux().state_dict(), tmp_path)
    with pytest.raises(UserError, match="Unknown weight_dtype 'int4'; known are auto, bf16"):
        load_transformer(path, device="cpu", weight_dtype="int4")


def test_the_mapping_has_no_private_page_after_a_forward_pass(tmp_path: Path) -> None:
    path = write(Case("original", "fp32"), tiny_flux().state_dict(), tmp_path)
    loaded = load_transformer(path, device="cpu")
    forward(loaded.module, torch.float32)
    mapping = Path("/proc/self/smaps").read_text().split(str(path))[1]
    fields = dict(line.split(":") for line in mapping.splitlines()[1:20])
    assert int(fields["Rss"].split()[0]) * 1024 >= loaded.shared_bytes
    assert fields["Anonymous"].split()[0] == "0"


def test_a_stored_linear_is_a_linear_of_the_decoded_weight() -> None:
    linear = nn.Linear(32, 16, dtype=torch.bfloat16).requires_grad_(False)
    layer, fp8 = StoredLinear(linear), linear.weight.to(FP8)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(layer(x), linear(x))
    layer.store(fp8, BY_DTYPE[FP8], {"weight_scale": torch.tensor(0.5)})
    assert torch.equal(layer(x), nn.functional.linear(x, fp8.bfloat16() * 0.5, linear.bias))


def test_weights_are_the_files_pages_but_for_the_swapped_rows(tmp_path: Path) -> None:
    plain = tiny_flux().bfloat16()
    path = write(Case("original", "bf16"), plain.state_dict(), tmp_path)
    before = path.read_bytes()
    loaded = load_transformer(path, device="cpu")
    swapped = sum(value.nbytes for key, value in plain.state_dict().items() if key.startswith("norm_out."))
    assert loaded.bytes - loaded.shared_bytes == swapped
    attention = loaded.module.single_transformer_blocks[0].attn
    assert attention.to_k.weight.data_ptr() - attention.to_q.weight.data_ptr() == attention.to_q.weight.nbytes
    attention.to_q.weight.data.zero_()
    assert path.read_bytes() == before, "a write to the weights must not reach the file"


def test_a_slice_of_a_tensor_is_a_view_of_the_mapping(tmp_path: Path) -> None:
    plain = tiny_flux()
    checkpoint = open_checkpoint(write(Case("component", "fp32"), plain.state_dict(), tmp_path))
    key = "transformer_blocks.1.ff.net.0.proj.weight"
    rows = checkpoint.tensor(key)[3:7, 8:16]
    assert checkpoint.is_mapped(rows)
    assert torch.equal(rows, plain.state_dict()[key][3:7, 8:16])


def test_unaligned_tensors_are_read_right(tmp_path: Path) -> None:
    plain = tiny_flux()
    path = write(Case("original", "fp32"), plain.state_dict(), tmp_path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    loaded = load_transformer(path, device="cpu")
    assert loaded.shared_bytes == 0
    assert torch.equal(forward(loaded.module, torch.float32), forward(plain, torch.float32))


def test_a_stage_loads_only_its_blocks(tmp_path: Path) -> None:
    path = write(Case("original", "fp8"), {k: v.to(FP8) for k, v in tiny_flux().state_dict().items()}, tmp_path)
    loaded = load_transformer(path, device="cpu", part=ModelPart(Stage(1, 5)))
    real = {name for name, parameter in loaded.module.named_parameters() if not parameter.is_meta}
    blocks = {name for name in real if name.startswith(("transformer_blocks", "single_transformer_blocks"))}
    assert blocks == {name for name in real if name.startswith("transformer_blocks.1.")}
    assert len(blocks) == len(list(loaded.module.transformer_blocks[1].parameters()))
    tensors = (*loaded.module.parameters(), *loaded.module.buffers())
    assert loaded.bytes == sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    weights = dict(tiny_flux().state_dict())
    weights["x_embedder.weight"][0, 0] = 1e5
    path = write(Case("component", "fp32"), weights, tmp_path)
    for dtype, limit in (("fp16", "65504"), ("fp8_e4m3fn", "448")):
        with pytest.raises(UserError, match=rf"x_embedder.weight holds 100000, .* ends at {limit}"):
            load_transformer(path, device="cpu", weight_dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_loading_onto_a_gpu_computes_what_the_plain_model_computes(dtype: str, tmp_path: Path) -> None:
    plain = tiny_flux()
    weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in plain.state_dict().items()}
    loaded = load_transformer(write(Case("original", dtype), weights, tmp_path), device="cuda")
    assert loaded.compute_dtype == torch.bfloat16
    assert loaded.shared_bytes == 0
    plain.load_state_dict({name: tensor.bfloat16() for name, tensor in weights.items()}, assign=True)
    values = {name: value.to("cuda") for name, value in inputs(torch.bfloat16).items()}
    with torch.no_grad():
        expected = plain.to("cuda")(**values, return_dict=False)[0]
        assert torch.equal(loaded.module(**values, return_dict=False)[0], expected)
