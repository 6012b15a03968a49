"""Missing, truncated, foreign and hostile files end in an error that names the file and what was expected."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.keys.flux import HEAD_NORM, LANDMARKS
from paralleldit.parallel_backend.families.keys.shapes import rotary_axes
from paralleldit.parallel_backend.files import detect, open_checkpoint
from paralleldit.parallel_backend.files.safetensors import read_header
from paralleldit.parallel_backend.weights.load import load_transformer
from safetensors.torch import save_file

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def framed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


GOOD = framed({"a": ENTRY, "b": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [8, 12]}}, bytes(12))

BAD_FILES = {
    "empty": (b"", "has 0 bytes, expected at least 10"),
    "short": (b"\x08", "has 1 bytes"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip archive"),
    "pickle": (b"\x80\x04\x95" + b"x" * 100, "Python pickle"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), "it is a GGUF file.*bf16 or fp8"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer.*git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "HTML page"),
    "json": (b'{"error": "Invalid credentials"}', "JSON text"),
    "random": (bytes(range(255, 0, -1)), "first bytes"),
    "huge header": (framed(b"{}", length=2**63), "first bytes"),
    "header over the limit": (framed(b"{}", length=100_000_001), "first bytes"),
    "cut in the header": (GOOD[:20], r"truncated: its header alone needs \d+ bytes, the file has 20"),
    "cut in the data": (GOOD[:-5], rf"truncated: its header needs {len(GOOD)} bytes, the file has {len(GOOD) - 5}"),
    "bytes after the end": (GOOD + b"more", rf"needs {len(GOOD)} bytes, the file has {len(GOOD) + 4}"),
    "not JSON": (framed(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (framed(b'{"\xff": 1}'), "not valid JSON"),
    "deep": (framed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "not valid JSON"),
    "name twice": (
        framed(f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'.encode(), bytes(8)),
        "not valid JSON",
    ),
    "metadata": (framed({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry": (framed({"a": 1}), "entry of 'a'"),
    "field": (framed({"a": ENTRY | {"strides": [1]}}, bytes(8)), "entry of 'a'"),
    "dtype": (framed({"a": ENTRY | {"dtype": "Q4"}}, bytes(8)), "'a' has the dtype 'Q4'"),
    "negative": (framed({"a": ENTRY | {"shape": [-2]}}, bytes(8)), "whole numbers"),
    "bool": (framed({"a": ENTRY | {"shape": [True, 2]}}, bytes(8)), "whole numbers"),
    "infinite": (framed(b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}'), "whole numbers"),
    "too large": (framed({"a": ENTRY | {"shape": [2**64]}}, bytes(8)), "whole numbers"),
    "size": (framed({"a": ENTRY | {"shape": [3]}}, bytes(8)), "'a' needs 12 bytes by its shape, .* give it 8"),
    "backwards": (framed({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)), "give it -8"),
    "overlap": (framed({"a": ENTRY, "b": ENTRY}, bytes(8)), "overlaps"),
    "gap": (framed({"a": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)), "gap"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_what_is_wrong(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        header = read_header(path)
    except UserError:
        return
    for info in header.tensors.values():
        assert 8 < info.start <= info.end <= len(content)


SIZES = st.integers(-1, 20) | st.integers() | st.none()
FUZZED_HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "X"]) | st.none(),
            "shape": st.lists(SIZES, max_size=3),
            "data_offsets": st.lists(SIZES, max_size=3),
        }
    )
    | st.recursive(st.none() | st.text(), st.lists),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary() | st.builds(framed, FUZZED_HEADERS, st.binary(max_size=40)))
@example(content=GOOD)
def test_no_content_breaks_the_header_reader(content: bytes, tmp_path: Path) -> None:
    read(tmp_path / "fuzz", content)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), end=st.integers(0, len(GOOD)))
def test_no_flipped_byte_or_cut_breaks_the_header_reader(position: int, value: int, end: int, tmp_path: Path) -> None:
    read(tmp_path / "fuzz", (GOOD[:position] + bytes([value]) + GOOD[position + 1 :])[:end])


def tiny_folder(folder: Path, extra: str = "", **config: Any) -> None:
    """A component folder with the landmarks of a Flux model and `extra`; `config` goes into its config.json."""
    tensors = {key: torch.zeros(32, 8) for key in LANDMARKS["diffusers"].values()}
    tensors[f"{HEAD_NORM['diffusers']}.weight"] = torch.zeros(16)
    tensors |= {extra: torch.zeros(1)} if extra else {}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **config}))


def index(folder: Path, weight_map: Any) -> Path:
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def shards(folder: Path, weight_map: dict[str, str], **files: list[str]) -> Path:
    for name, keys in files.items():
        save_file({key: torch.zeros(1) for key in keys}, folder / f"{name}.safetensors")
    return index(folder, weight_map)


def saved(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(GOOD)
    return folder


def configured(folder: Path, **config: Any) -> Path:
    tiny_folder(folder, **config)
    return folder


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def blocks_with_a_hole(folder: Path) -> Path:
    tensors = {key: torch.zeros(32, 8) for key in LANDMARKS["original"].values()}
    tensors[f"{HEAD_NORM['original']}.scale"] = torch.zeros(16)
    tensors["double_blocks.999999999.img_mod.lin.bias"] = torch.zeros(1)
    save_file(tensors, folder / "m.safetensors")
    return folder / "m.safetensors"


BAD_SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda d: d / "none.safetensors", "Cannot open .*: No such file.* Expected a .safetensors file"),
    "name too long": (lambda d: d / ("x" * 300), "File name too long"),
    "pipe": (lambda d: pipe(d / "x.safetensors"), "not a regular file"),
    "empty folder": (lambda d: d, "No safetensors weights in .*holds: nothing"),
    "pickled folder": (lambda d: saved(d, "diffusion_pytorch_model.bin"), "No safetensors weights.*model.bin"),
    "two models": (lambda d: saved(d, "a.safetensors", "b.safetensors"), r"2 sets of weights \(a.*b.safetensors"),
    "two variants": (lambda d: saved(d, "m.fp16.safetensors", "m.bf16.safetensors"), "2 sets of weights"),
    "index outside": (lambda d: index(d, {"a": "../x.safetensors"}), "names the shard '../x.safetensors'"),
    "index absolute": (lambda d: index(d, {"a": "/x.safetensors"}), "names the shard"),
    "index of Windows": (lambda d: index(d, {"a": "..\\x.safetensors"}), "names the shard"),
    "index of pickles": (lambda d: index(d, {"a": "x.bin"}), "names the shard"),
    "index of numbers": (lambda d: index(d, {"a": 1}), "names the shard 1"),
    "index empty": (lambda d: index(d, {}), "has no weight_map"),
    "index cut": (lambda d: written(d / "m.safetensors.index.json", '{"weight_map": {'), "not valid JSON"),
    "index of a list": (lambda d: written(d / "m.safetensors.index.json", "[]"), "not a JSON object"),
    "shard missing": (lambda d: index(d, {"a": "x.safetensors"}), "Cannot read .*x.safetensors: No such file"),
    "key missing": (
        lambda d: shards(d, {"a": "x.safetensors", "b": "x.safetensors"}, x=["a"]),
        "1 shards disagree on 1 tensors, e.g. b",
    ),
    "key twice": (
        lambda d: shards(d, {"a": "x.safetensors", "b": "y.safetensors"}, x=["a"], y=["a", "b"]),
        "'a' is in x.safetensors and in y.safetensors",
    ),
    "foreign model": (
        lambda d: saved(d, "m.safetensors"),
        r"no model of a known family \(flux, .*\); looked at 2 tensors \(a, b\)",
    ),
    "foreign class": (lambda d: configured(d, _class_name="SanaModel"), "config.json says 'SanaModel'"),
    "config of another": (lambda d: configured(d, in_channels=64), "says in_channels = 64, .* shapes say 8"),
    "config heads": (lambda d: configured(d, num_attention_heads=24), "says num_attention_heads = 24, .* shapes say 2"),
    "config axes": (lambda d: configured(d, axes_dims_rope=[16, 56, 56]), r"\(16, 56, 56\) .* head dim 16"),
    "config patch": (lambda d: configured(d, patch_size="1"), "patch_size '1' does not divide"),
    "keys missing": (lambda d: configured(d), r"\d+ missing: context_embedder.bias; .* …"),
    "wrong shape": (
        lambda d: configured(d),
        r"2 of the wrong shape: proj_out.weight is \[32, 8\], expected",
    ),
    "keys left over": (
        lambda d: configured(d, extra="x_embedder.lora_A.weight"),
        "1 unexpected: x_embedder.lora_A.weight",
    ),
    "block missing": (
        blocks_with_a_hole,
        r"Block double_blocks.1 is missing; there are 2 blocks up to number 999999999",
    ),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_source_that_cannot_serve_is_named_with_what_is_wrong(name: str, tmp_path: Path) -> None:
    make, message = BAD_SOURCES[name]
    source = make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_transformer(source, device="cpu")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"), 0),
        (("diffusion_pytorch_model.fp16.safetensors",), 0),
        (("flux1.safetensors",), 0),
    ],
)
def test_a_folder_gives_its_weights_without_variant_first(files: tuple[str, ...], chosen: int, tmp_path: Path) -> None:
    assert open_checkpoint(saved(tmp_path, *files)).files == (tmp_path / files[chosen],)


def test_a_component_of_a_pipeline_folder_can_be_named(tmp_path: Path) -> None:
    for component in ("transformer", "vae"):
        (tmp_path / component).mkdir()
        saved(tmp_path / component, f"{component}.safetensors")
    assert open_checkpoint(tmp_path).files[0].name == "transformer.safetensors"
    assert open_checkpoint(tmp_path, "vae").files[0].name == "vae.safetensors"


def test_detection_reads_headers_only(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    found = detect(checkpoint)
    assert (found.family, found.layout, found.config["num_attention_heads"]) == ("flux", "diffusers", 2)
    assert not checkpoint._maps


@pytest.mark.parametrize(
    ("head_dim", "axes"), [(128, (16, 56, 56)), (64, (8, 28, 28)), (32, (4, 14, 14)), (16, (4, 6, 6)), (8, (4, 2, 2))]
)
def test_rotary_axes_follow_the_head_dim(head_dim: int, axes: tuple[int, int, int]) -> None:
    assert rotary_axes(head_dim) == axes
