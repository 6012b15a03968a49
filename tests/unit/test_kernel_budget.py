"""What a block of each family costs a GPU, beside plain diffusers: kernels, bytes, collectives.

`-s` prints the tables of docs/MEASURED.md.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from paralleldit.parallel_backend.adapters.lora.layers import SidePath
from paralleldit.parallel_backend.attention.stale_kv import StaleAttention
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.strategies.prompt_batches import Asked, PromptBatches, one_by_one
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.parallel_backend.weights.formats import BY_NAME
from paralleldit.parallel_backend.weights.stored_linear import store_linears
from paralleldit.tests.kernel_counts import KERNEL, Cost, cost_of, pretended_ranks
from paralleldit.tests.tiny_models import TINY_MODELS, on_device
from torch import nn

META, CPU = torch.device("meta"), torch.device("cpu")
ONE_RANK = Layout()
HEADS, TEXT, SIDE = 8, 64, 64


def sites_of(model):
    """How many attention sites of all tokens there are in what `of_blocks` counts."""
    return {"sd3.5 medium": 3, "z-image": 4}.get(model, 2)


def of_blocks(calls) -> Cost:
    """What another depth adds: of Flux a double and a single block, of others two blocks, of Z-Image two refiners too.

    `calls(depth)` makes what is called.
    """
    return cost_of(calls(2)) - cost_of(calls(1))


def given(model, device, batch=1):
    """A latent, its time and a condition."""
    tiny = TINY_MODELS[model]
    draw = lambda *shape: torch.zeros(shape, device=device)  # noqa: E731
    text = 5 if "hunyuandit" in model else TEXT
    side = 16 if "sd3" in model else SIDE  # its tiny models have positions for no more
    with torch.device(device):
        return tiny.latent(draw, batch, side, side), torch.zeros(batch), tiny.condition(draw, batch, text)


def network_of(model, depth, device):
    with torch.device(device):
        return TINY_MODELS[model].make(HEADS, depth).to(torch.bfloat16)


kept_network_of = lru_cache(network_of)
"""The same, as the engine has installed its sites in it."""


@contextmanager
def bf16_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def diffusers_calls(model, batch=1):
    tiny = TINY_MODELS[model]

    def made(depth):
        network = network_of(model, depth, META)
        latent, _, condition = given(model, META, batch)

        def call():
            with torch.device(META), bf16_by_default():
                tiny.denoise(network, latent.bfloat16(), on_device(condition, META, torch.bfloat16))

        return call

    return made


def own_calls(model, layout=ONE_RANK, device=META, change=None, batch=1):
    """The engine's evaluation by rank 0 of `layout`, of the network as it is after `change(network)`."""
    tiny = TINY_MODELS[model]

    def made(depth):
        network = change(network_of(model, depth, device)) if change else kept_network_of(model, depth, device)
        family = tiny.family(network, torch.bfloat16, device)
        mesh = Mesh(layout, group_of=lambda ranks: dist.new_group(list(ranks)))
        attention = AttentionCore(mesh.ulysses, mesh.ring, KERNEL)
        if layout.distrifusion_degree > 1:
            attention = StaleAttention(attention, mesh.distrifusion, in_turn=False)
            attention.begin(0, 1, synchronous=False)
        strategy = SequenceParallel(family, mesh.sequence, attention)
        latent, timestep, condition = given(model, device, batch)
        return lambda: strategy.predict(latent, timestep, condition)

    return made


@lru_cache
def one_rank(model) -> Cost:
    with pretended_ranks(1):
        return of_blocks(own_calls(model))


MORE_BYTES = {"wan 2.1": 1.02, "z-image": 1.01}
"""Where a block of ours moves more than one of diffusers, for now: rotary is turned in fp32, there in bf16 (Wan); each
joint block puts text and image together, there all of them do once (Z-Image)."""
MORE_KERNELS = {"z-image": 2}
NOT_COUNTED = ("mochi",)
"""Of which diffusers' own forward asks for what the meta device has not: autocast, and the places of a mask."""


@pytest.mark.parametrize("model", [model for model in TINY_MODELS if model not in NOT_COUNTED])
def test_blocks_cost_no_more_than_those_of_diffusers(model):
    own, stock = one_rank(model), of_blocks(diffusers_calls(model))
    print(f"\n| {model} | {stock.kernels} / {own.kernels} | {stock.bytes / 1e6:.1f} / {own.bytes / 1e6:.1f} |")
    assert own.kernels <= stock.kernels + MORE_KERNELS.get(model, 0)
    assert own.bytes <= stock.bytes * MORE_BYTES.get(model, 1)


@dataclass(frozen=True)
class Added:
    """What a layout may add at each site of all tokens."""

    layout: Layout
    collectives: int
    kernels: int

    def __str__(self) -> str:
        return str(self.layout)


ADDED = (
    Added(Layout(ulysses_degree=2), collectives=4, kernels=4),
    Added(Layout(ulysses_degree=4), collectives=4, kernels=4),
    Added(Layout(ulysses_degree=8), collectives=4, kernels=4),
    Added(Layout(ring_degree=2), collectives=1, kernels=9),
    Added(Layout(ring_degree=4), collectives=3, kernels=21),
    Added(Layout(ulysses_degree=2, ring_degree=2), collectives=5, kernels=13),
    Added(Layout(distrifusion_degree=2), collectives=1, kernels=4),
    Added(Layout(distrifusion_degree=4), collectives=1, kernels=6),
)
EVERY_FAMILYS = (Layout(ulysses_degree=8),)
"""Layouts that are tried with all models; the others with a Flux and a Wan."""


@pytest.mark.parametrize(
    ("model", "added"),
    [
        (model, added)
        for added in ADDED
        for model in TINY_MODELS
        if added.layout in EVERY_FAMILYS or model in ("flux dev", "wan 2.1")
    ],
    ids=str,
)
def test_ranks_add_few_kernels_and_collectives(model, added):
    # Hops of a ring go to another rank, for which the pretended ranks want tensors of the CPU.
    device, plain = CPU if added.layout.ring_degree > 1 else META, one_rank(model)
    with pretended_ranks(added.layout.ranks):
        more = of_blocks(own_calls(model, added.layout, device)) - plain
    print(f"\n| {added} | {model} | {more.kernels / sites_of(model):g} | {more.collectives / sites_of(model):g} |")
    assert more.kernels <= added.kernels * sites_of(model)
    assert more.collectives <= added.collectives * sites_of(model)


def linears(network):
    """The linear layers of the blocks."""
    return [layer for name, layer in network.named_modules() if "blocks." in name and isinstance(layer, nn.Linear)]


def with_lora(network):
    store_linears(network)
    for layer in linears(network):
        rows, columns = layer.weight.shape
        layer.adapter = SidePath(layer.weight.new_empty(16, columns), layer.weight.new_empty(rows, 16), None)
    return network


def with_fp8(network, scaled):
    store_linears(network)
    for layer in linears(network):
        companions = {"weight_scale": layer.weight.new_empty(())} if scaled else {}
        layer.store(layer.weight.data.to(torch.float8_e4m3fn), BY_NAME["fp8_e4m3fn"], companions)
    return network


CHANGES = {
    "LoRA": (with_lora, 2, 2),
    "fp8": (lambda network: with_fp8(network, scaled=False), 1, 1),
    "scaled fp8": (lambda network: with_fp8(network, scaled=True), 2, 1),
}
"""A change of every linear layer, how many kernels it may add to each, and the goal."""


@pytest.mark.parametrize("model", ["flux dev", "sd3 medium", "pixart alpha", "hunyuandit 1.1", "wan 2.1"])
@pytest.mark.parametrize("change", CHANGES)
def test_lora_and_stored_formats_add_few_kernels_to_a_layer(model, change):
    make, allowed, _ = CHANGES[change]
    plain = one_rank(model)
    with pretended_ranks(1):
        more = of_blocks(own_calls(model, change=make)) - plain
    fewer, all_of_them = (len(linears(kept_network_of(model, depth, META))) for depth in (1, 2))
    print(f"\n| {change} | {model} | {more.kernels / (all_of_them - fewer):.2f} |")
    assert more.kernels <= allowed * (all_of_them - fewer)


@pytest.mark.parametrize("model", ["flux dev", "sd3 medium", "pixart alpha", "wan 2.1"])
def test_two_prompts_as_a_batch_cost_hardly_more_kernels_than_one(model):
    layout = Layout(ulysses_degree=2)
    latent, timestep, condition = given(model, META)
    prompts = [replace(condition, name=name) for name in ("positive", "negative")]
    with pretended_ranks(layout.ranks):
        family = TINY_MODELS[model].family(kept_network_of(model, 2, META), torch.bfloat16, META)
        mesh = Mesh(layout, group_of=lambda ranks: dist.new_group(list(ranks)))
        strategy = SequenceParallel(family, mesh.sequence, AttentionCore(mesh.ulysses, mesh.ring, KERNEL))
        batches = PromptBatches(strategy, outputs=10**12, batch=1)
        shares = [[Asked(latent, timestep, prompt) for prompt in prompts]]
        together = cost_of(lambda: batches.predict_all(shares, 0))
        one = cost_of(lambda: one_by_one(strategy.predict)([shares[0][:1]], 0))
    print(f"\n| {model} | {one.kernels} | {together.kernels} |")
    # In a batch of more than one, text and image are no neighbours in memory: some layers add their bias by itself.
    assert together.kernels <= 1.1 * one.kernels
    assert together.collectives == one.collectives
