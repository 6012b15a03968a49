"""Ranks that hold parts of a model read those parts, and the parts make up the model."""

from pathlib import Path

import pytest
import torch
from paralleldit.parallel_backend.layout.model_part import WHOLE, ModelPart, Share
from paralleldit.parallel_backend.layout.stages import Stage
from paralleldit.parallel_backend.weights.load import LoadedTransformer, load_transformer
from paralleldit.parallel_backend.weights.reader import Reader
from paralleldit.parallel_backend.weights.shards import pieces_of
from paralleldit.tests.unit.flux_original_layout import HEAD_DIM, HIDDEN, original_layout, tiny_flux
from safetensors.torch import save_file

FP8 = torch.float8_e4m3fn
FEATURES = 4 * HIDDEN
BLOCKS = [*(f"transformer_blocks.{i}." for i in range(2)), *(f"single_transformer_blocks.{i}." for i in range(3))]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One model in bf16, and in fp8 with a factor for each matrix, under its original names."""
    folder = tmp_path_factory.mktemp("flux")
    weights = original_layout(tiny_flux().state_dict())
    stored = {key: value.bfloat16() for key, value in weights.items()}
    save_file(stored, folder / "bf16.safetensors")
    for key, value in weights.items():
        if key.endswith(".weight"):
            scale = value.abs().max() / 448
            stored[key] = (value / scale).to(FP8)
            stored[key.removesuffix("weight") + "scale_weight"] = scale
    save_file(stored, folder / "fp8.safetensors")
    return {dtype: folder / f"{dtype}.safetensors" for dtype in ("bf16", "fp8")}


def load(path: Path, part: ModelPart = WHOLE) -> LoadedTransformer:
    return load_transformer(path, device="cpu", part=part)


def tensor_share(index: int, count: int) -> ModelPart:
    return ModelPart(tensor=Share(index, count))


def in_blocks(loaded: LoadedTransformer) -> dict[str, torch.Tensor]:
    return {name: value for name, value in loaded.module.named_parameters() if name.startswith(tuple(BLOCKS))}


def half(size: int, index: int) -> list[int]:
    return list(range(index * size // 2, (index + 1) * size // 2))


HALVES = [
    # parameter, the dim that is cut, the places that the first and the second of two ranks have of it
    ("transformer_blocks.1.attn.to_q.weight", 0, lambda index: half(HIDDEN, index)),
    ("transformer_blocks.1.attn.to_v.bias", 0, lambda index: half(HIDDEN, index)),
    ("transformer_blocks.0.attn.add_k_proj.weight", 0, lambda index: half(HIDDEN, index)),
    ("transformer_blocks.0.attn.to_out.0.weight", 1, lambda index: half(HIDDEN, index)),
    ("transformer_blocks.0.attn.to_add_out.weight", 1, lambda index: half(HIDDEN, index)),
    ("transformer_blocks.0.ff.net.0.proj.weight", 0, lambda index: half(FEATURES, index)),
    ("transformer_blocks.0.ff_context.net.2.weight", 1, lambda index: half(FEATURES, index)),
    ("transformer_blocks.0.norm1.linear.weight", 0, lambda index: half(6 * HIDDEN, index)),
    ("single_transformer_blocks.2.attn.to_k.weight", 0, lambda index: half(HIDDEN, index)),
    ("single_transformer_blocks.2.proj_mlp.bias", 0, lambda index: half(FEATURES, index)),
    (
        "single_transformer_blocks.2.proj_out.weight",
        1,
        lambda index: half(HIDDEN, index) + [HIDDEN + place for place in half(FEATURES, index)],
    ),
]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_two_ranks_hold_half_of_the_heads_and_features_each(files, dtype) -> None:
    whole = load(files[dtype]).module.state_dict()
    for index in range(2):
        share = load(files[dtype], tensor_share(index, 2)).module.state_dict()
        for name, dim, places in HALVES:
            expected = whole[name].float().index_select(dim, torch.tensor(places(index)))
            assert torch.equal(share[name].float(), expected), name
            assert (f"{name}_scale" in share) == (dtype == "fp8" and name.endswith("weight"))
            assert share.get(f"{name}_scale") == whole.get(f"{name}_scale")


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_tensor_parallel_ranks_hold_every_weight_once(files, count) -> None:
    whole = load(files["bf16"])
    shares = [load(files["bf16"], tensor_share(index, count)) for index in range(count)]
    for name, parameter in in_blocks(whole).items():
        held = [in_blocks(share).get(name) for share in shares]
        elements = sum(part.numel() for part in held if part is not None)
        copies = count if ".norm_" in name else 1
        assert elements == copies * parameter.numel(), name
    # Whole heads go to a rank: with two of them, three ranks cannot have equal parts.
    if count == 2:
        outside = whole.bytes - sum(value.nbytes for value in in_blocks(whole).values())
        assert max(share.bytes for share in shares) <= outside + 1.02 * (whole.bytes - outside) / count


def test_rows_are_the_files_pages_and_columns_are_copied(files) -> None:
    share = load(files["bf16"], tensor_share(1, 2))
    copied = [value for name, value in in_blocks(share).items() if name.endswith((".to_out.0.weight", ".net.2.weight"))]
    copied += [
        value for name, value in in_blocks(share).items() if name.endswith(("proj_out.weight", "add_out.weight"))
    ]
    swapped = [value for name, value in share.module.named_parameters() if name.startswith("norm_out.")]
    assert share.bytes - share.shared_bytes == sum(value.nbytes for value in (*copied, *swapped))
    assert all(value.is_contiguous() for value in copied)


@pytest.mark.parametrize("tensor", [Share(), Share(1, 2)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_shares_of_a_block_put_together_are_the_block(files, monkeypatch, dtype, count, tensor) -> None:
    whole = load(files[dtype], ModelPart(tensor=tensor))
    read = []

    def spied(self, entry, start, stop):
        read[-1] += (stop - start) * entry.format.dtype.itemsize
        return read_flat(self, entry, start, stop)

    read_flat = Reader.read_flat
    monkeypatch.setattr(Reader, "read_flat", spied)
    shares = []
    for index in range(count):
        read.append(0)
        shares.append(load(files[dtype], ModelPart(tensor=tensor, shard=Share(index, count))))
    assert sum(read) == sum(value.nbytes for value in in_blocks(whole).values())
    assert max(read) <= 1.02 * sum(read) / count

    module, shards = shares[0].module, shares[0].shards
    for number, prefix in enumerate(BLOCKS):
        together = torch.cat([share.shards.shares[number] for share in shares])
        shards.buffers[number % 2][: len(together)] = together
        for name, value in in_blocks(whole).items():
            if name.startswith(prefix):
                assert torch.equal(module.get_parameter(name).float(), value.float()), name


def test_a_rank_of_many_holds_its_share_and_two_blocks(files) -> None:
    whole, share = load(files["bf16"]), load(files["bf16"], ModelPart(shard=Share(2, 4)))
    sizes = [
        sum(value.nbytes for name, value in in_blocks(whole).items() if name.startswith(prefix)) for prefix in BLOCKS
    ]
    assert share.bytes <= whole.bytes - sum(sizes) + 1.02 * (sum(sizes) / 4 + 2 * max(sizes))
    stage = load(files["bf16"], ModelPart(Stage(1, 2), shard=Share(0, 2)))
    assert len(stage.shards.shares) == 3
    assert {name for name, value in in_blocks(stage).items() if not value.is_meta} == {
        name for name in in_blocks(whole) if name.startswith(tuple(BLOCKS[2:]))
    }


def test_a_rank_without_a_head_holds_no_part_of_the_attention(files) -> None:
    share = load(files["bf16"], tensor_share(2, 3)).module.transformer_blocks[0]
    assert share.attn.to_q.weight.shape == (0, HIDDEN)
    assert share.attn.to_out[0].weight.shape == (HIDDEN, 0)
    assert share.attn.norm_q.weight.shape == (HEAD_DIM,)
    assert share.ff.net[2].weight.shape == (HIDDEN, 96)


@pytest.mark.parametrize("lengths", [[680] * 19 + [283] * 38, [64], [3, 0, 5, 0], [1, 1000], [1000, 1], []], ids=str)
def test_pieces_of_pinned_memory_hold_all_parts_in_order_and_little_more(lengths):
    pieces = pieces_of(lengths)
    assert [length for _, parts in pieces for length in parts] == lengths
    assert all(size.bit_count() == 1 and sum(parts) <= size for size, parts in pieces)
    assert sum(size for size, _ in pieces) <= 1.1 * sum(lengths) + max(lengths, default=0)
