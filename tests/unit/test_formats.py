"""A format of blocks, made up here, finds its seat: what is stored is cut, counted and multiplied with as any other."""

import pytest
import torch
import torch.nn.functional as F
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.files.quantization import READ
from paralleldit.parallel_backend.weights.formats import BY_DTYPE, FORMATS, StorageFormat
from paralleldit.parallel_backend.weights.stored_linear import StoredLinear, store_linears
from paralleldit.parallel_backend.weights.tensor_cuts import Slices
from torch import nn

GRANULE = 32


def encoded(weight: torch.Tensor) -> torch.Tensor:
    """Of each 32 elements of a row the largest, in two bytes of fp16, and then as many bytes of int8."""
    groups = weight.unflatten(-1, (-1, GRANULE))
    largest = groups.abs().amax(-1, keepdim=True).half()
    values = (groups / largest.float() * 127).round().to(torch.int8)
    return torch.cat([largest.view(torch.uint8), values.view(torch.uint8)], -1).flatten(-2)


def decoded(stored, companions, dtype):
    groups = stored.unflatten(-1, (-1, GRANULE + 2))
    largest, values = groups[..., :2].contiguous().view(torch.float16), groups[..., 2:].contiguous().view(torch.int8)
    return (values.float() / 127 * largest.float()).flatten(-2).to(dtype)


BLOCKS = StorageFormat("blocks", torch.uint8, is_plain=False, granule=GRANULE, units=GRANULE + 2, decode=decoded)
WEIGHT = torch.randn(6, 4 * GRANULE, generator=torch.Generator().manual_seed(1))
CUTS = {
    "all": None,
    "rows": Slices(0, (range(2, 5),)),
    "columns": Slices(1, (range(GRANULE, 3 * GRANULE),)),
    "two ranges of columns": Slices(1, (range(GRANULE), range(2 * GRANULE, 4 * GRANULE))),
}


@pytest.mark.parametrize("slices", CUTS.values(), ids=CUTS)
def test_a_cut_of_what_is_stored_is_the_cut_of_the_matrix(slices) -> None:
    stored = encoded(WEIGHT)
    assert tuple(stored.shape) == BLOCKS.stored_shape(WEIGHT.shape)
    assert stored.nbytes == BLOCKS.bytes(WEIGHT.shape)
    part = BLOCKS.dequantise(BLOCKS.read(stored, slices), {}, torch.float32)
    whole = BLOCKS.dequantise(stored, {}, torch.float32)
    assert torch.equal(part, whole if slices is None else slices.of(whole))
    torch.testing.assert_close(whole, WEIGHT, atol=0.02, rtol=0)


def test_a_cut_that_parts_a_granule_is_refused() -> None:
    with pytest.raises(
        UserError, match="columns 0 to 48 of a matrix that is stored as blocks, in groups of 32"
    ) as told:
        BLOCKS.read(encoded(WEIGHT), Slices(1, (range(48),)))
    assert "tensor_degree" in told.value.hint


def test_a_layer_multiplies_with_what_its_format_decodes() -> None:
    layer = StoredLinear(nn.Linear(WEIGHT.shape[1], WEIGHT.shape[0]))
    layer.store(encoded(WEIGHT), BLOCKS, {})
    x = torch.randn(2, 3, WEIGHT.shape[1])
    assert torch.equal(layer(x), F.linear(x, decoded(encoded(WEIGHT), {}, torch.float32), layer.bias))


def test_every_format_that_files_may_be_in_is_in_the_table() -> None:
    assert set(READ) <= {str(each.dtype).removeprefix("torch.") for each in FORMATS}
    assert len(BY_DTYPE) == len(FORMATS)


def test_linear_layers_become_stored_ones_and_others_stay() -> None:
    class Own(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 2, bias=False)]), Own(4, 4), nn.LayerNorm(4))
    before = dict(module.named_parameters())
    store_linears(module)
    kinds = [type(module[0]), type(module[1][0]), type(module[2]), type(module[3])]
    assert kinds == [StoredLinear, StoredLinear, Own, nn.LayerNorm]
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert len(before) == len(dict(module.named_parameters()))
