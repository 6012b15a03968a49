"""What fits a layout, and which part of a model a stage is."""

from itertools import combinations, pairwise

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.keys.flux import FLUX
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.layout.capabilities import ROWS_ALONE, Capabilities
from paralleldit.parallel_backend.layout.fitting import check_layout, nearest_layouts
from paralleldit.parallel_backend.layout.layout import Layout, largest_exact_layout, layouts_of, patches_of
from paralleldit.parallel_backend.layout.rules import RunFacts
from paralleldit.parallel_backend.layout.stages import (
    BlockList,
    Stage,
    balanced_sizes,
    block_of,
    block_parameters,
    stage_parameters,
)


@pytest.mark.parametrize(
    ("stages", "tensor", "late"), [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2)]
)
@pytest.mark.parametrize("ranks", [1, 2, 6, 8])
def test_layouts_of_ranks_fit_them(ranks, stages, tensor, late):
    found = layouts_of(ranks, pipefusion_degree=stages, tensor_degree=tensor, distrifusion_degree=late)
    assert bool(found) == (ranks % (stages * tensor * late) == 0)
    for layout in found:
        check_layout(layout, RunFacts(ranks=ranks))
        assert (layout.pipefusion_degree, layout.tensor_degree, layout.distrifusion_degree) == (stages, tensor, late)


def test_a_network_without_blocks_takes_rows_cfg_and_data():
    check_layout(Layout(ulysses_degree=2, ring_degree=2, cfg_degree=2, data_degree=2), RunFacts(can=ROWS_ALONE))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_what_is_chosen_is_exact(ranks, guided):
    assert largest_exact_layout(ranks, guided=guided).is_exact


@pytest.mark.parametrize(
    ("layout", "patches"),
    [
        (Layout(pipefusion_degree=2), 4),
        (Layout(pipefusion_degree=4), 7),
        (Layout(pipefusion_degree=2, num_patches=3), 3),
    ],
    ids=str,
)
def test_number_of_patches(layout, patches):
    assert patches_of(layout, token_rows=7) == patches


KNOWN = {"batch": 4, "cfg": 3.0, "has_negative": True, "blocks": 4, "token_rows": 8, "sampler": "euler"}


@pytest.mark.parametrize(
    ("layout", "work", "words"),
    [
        ({"ulysses_degree": 3}, {"ranks": 4}, ("ulysses_degree=3", "multiply to 3", "4 ranks", "start 3 ranks")),
        ({"ulysses_degree": 3}, {"ranks": 4}, ("Nearest that fits: ulysses4",)),
        ({"tensor_degree": 2, "ring_degree": 2}, {"ranks": 8}, ("tensor2", "ring2", "tensor2 x ring4")),
        ({"data_degree": 5}, {}, ("data_degree=5", "holds 4")),
        ({"data_degree": 8}, {}, ("data_degree=8", "data4")),
        ({"cfg_degree": 2}, {"has_negative": False}, ("cfg_degree=2", "no negative")),
        ({"cfg_degree": 2}, {"cfg": 1.0}, ("cfg_degree=2", "cfg=1.0", "Nearest that fits: ulysses2; ring2")),
        ({"pipefusion_degree": 5}, {}, ("pipefusion_degree=5", "4 blocks")),
        ({"pipefusion_degree": 2, "stage_blocks": (1, 2)}, {}, ("stage_blocks=1,2", "2 stages", "4 blocks")),
        ({"pipefusion_degree": 3, "stage_blocks": (2, 2)}, {}, ("stage_blocks=2,2", "pipefusion_degree=3")),
        ({"pipefusion_degree": 2, "stage_blocks": (4, 0)}, {}, ("stage_blocks=4,0", "from 1 on")),
        ({"stage_blocks": (4,)}, {}, ("stage_blocks=4", "pipefusion_degree=1")),
        ({"stage_blocks": (2, 2)}, {"blocks": None}, ("stage_blocks=2,2", "2 stages", "pipefusion_degree=1")),
        (
            {"pipefusion_degree": 2, "num_patches": 500},
            {},
            ("num_patches=500", "8 rows", "Nearest that fits: pipefusion2, num_patches 8"),
        ),
        (
            {"pipefusion_degree": 2, "stage_blocks": (1, 1)},
            {},
            ("stage_blocks=1,1", "Nearest that fits: pipefusion2, stage_blocks even"),
        ),
        (
            {"pipefusion_degree": 2, "stage_blocks": (1, 1), "num_patches": 9},
            {},
            ("Nearest that fits: pipefusion2, stage_blocks even, num_patches 8",),
        ),
        (
            {"pipefusion_degree": 4, "stage_blocks": (1, 1, 1, 1), "num_patches": 8},
            {"ranks": 2},
            ("Nearest that fits: pipefusion2, stage_blocks even, num_patches 8",),
        ),
        (
            {"pipefusion_degree": 2},
            {"sampler": "dpm_adaptive", "whole_batch": True},
            ("dpm_adaptive", "pipefusion_degree=2", "strips", "euler"),
        ),
        (
            {"data_degree": 2},
            {"sampler": "dpm_adaptive", "whole_batch": True},
            ("dpm_adaptive", "data_degree=2", "pictures", "euler"),
        ),
        ({"pipefusion_degree": 2, "attention": "yunchang"}, {}, ("yunchang", "pipefusion_degree=2")),
        ({"distrifusion_degree": 3, "attention": "yunchang"}, {}, ("yunchang", "distrifusion_degree=3")),
        ({"pipefusion_degree": 2, "distrifusion_degree": 4}, {}, ("pipefusion_degree=2", "distrifusion_degree=4")),
        (
            {"tensor_degree": 2, "pipefusion_degree": 2, "weights": "sharded"},
            {},
            ("4 ranks", "tensor_degree=2", "pipefusion_degree=2", "8 ranks"),
        ),
        ({"tensor_degree": 2}, {"can": ROWS_ALONE}, ("tensor_degree=2", "to 1", "Nearest that fits: ulysses2; ring2")),
        ({"pipefusion_degree": 2}, {"can": ROWS_ALONE}, ("pipefusion_degree=2", "PipeFusion", "ulysses_degree")),
        ({"distrifusion_degree": 2}, {"can": ROWS_ALONE}, ("distrifusion_degree=2", "DistriFusion")),
        ({"ulysses_degree": 2, "weights": "sharded"}, {"can": ROWS_ALONE}, ("weights=sharded", "to whole")),
        ({"compile": "blocks"}, {"can": ROWS_ALONE}, ("compile=blocks", "to off")),
        ({"ring_degree": 2}, {"can": Capabilities(sequence=False)}, ("ring_degree=2", "share tensor_degree")),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_refused_with_its_numbers_and_what_fits(layout, work, words):
    layout, work = Layout(**layout), RunFacts(**KNOWN | work)
    with pytest.raises(UserError) as refused:
        check_layout(layout, work)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    for near in nearest_layouts(layout, work):
        check_layout(near, work)
        assert near.is_exact >= layout.is_exact


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"attention": "yunchang"},
        {"distrifusion_degree": 2},
        {"data_degree": 4, "cfg_degree": 2},
        {"pipefusion_degree": 4, "num_patches": 8},
        {"pipefusion_degree": 2, "stage_blocks": (1, 3)},
        {"pipefusion_degree": 3, "stage_blocks": "even"},
        {"tensor_degree": 2, "ulysses_degree": 2, "weights": "sharded"},
        {"tensor_degree": 2, "weights": "offloaded"},
    ],
    ids=str,
)
def test_a_layout_that_fits_is_let_through(layout):
    check_layout(Layout(**layout), RunFacts(**KNOWN, ranks=Layout(**layout).ranks))


def test_what_is_not_known_yet_is_not_judged():
    check_layout(Layout(cfg_degree=2, data_degree=9, pipefusion_degree=99, num_patches=99), RunFacts())


@pytest.mark.parametrize("sizes", [(), "even"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_stages_share_the_blocks_of_a_model(count, sizes):
    model = FluxTransformer2DModel(
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    stages = [stage_parameters(shapes, FLUX.blocks, Stage(index, count, sizes)) for index in range(count)]
    assert set.union(*stages) == set(shapes)
    lists = ("transformer_blocks", "single_transformer_blocks")
    everywhere = {name for name in shapes if not name.startswith(lists)}
    blocks = [{name.rsplit("blocks.")[1].split(".")[0] + name[:6] for name in stage - everywhere} for stage in stages]
    assert sum(map(len, blocks)) == len(set.union(*blocks)) == 7
    assert all(everywhere <= stage for stage in stages)
    # Computation runs through the double blocks first.
    assert "transformer_blocks.0.attn.to_q.weight" in stages[0]
    assert "single_transformer_blocks.3.attn.to_q.weight" in stages[-1]


def test_even_stages_have_equal_numbers_of_blocks_whatever_these_hold():
    parameters = (9, 9, 9, 1, 1, 1, 1, 1)
    stages = [Stage(index, 3, "even").blocks(parameters) for index in range(3)]
    assert stages == [slice(0, 3), slice(3, 6), slice(6, 8)]


def stage_weights(parameters, sizes):
    starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    return [sum(parameters[start:stop]) for start, stop in pairwise(starts)]


ZIPPED = (BlockList(("blocks", "beside.blocks"), apart=("blocks.0.norm.table",)), BlockList(("last",)))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.1.attn.weight", (0, 1)),
        ("beside.blocks.1.bias", (0, 1)),
        ("blocks.0.norm.weight", (0, 0)),
        ("blocks.0.norm.table.weight", None),
        ("last.0.weight", (1, 0)),
        ("blocks.scale", None),
        ("embed.0.weight", None),
        ("blocks_embed.0.weight", None),
    ],
)
def test_a_parameter_is_of_the_block_whose_modules_have_one_number(name, block):
    assert block_of(name, ZIPPED) == block


@pytest.mark.parametrize("stages", range(1, 8))
@pytest.mark.parametrize(
    "parameters", [(1,) * 7, (5, 5, 5, 2, 2, 2, 2, 2), (1, 9, 1, 1, 4, 4, 1), (3, 1, 4, 1, 5, 9, 2)]
)
def test_no_split_has_a_fullest_stage_with_fewer_parameters(parameters, stages):
    sizes = balanced_sizes(parameters, stages)
    assert (len(sizes), sum(sizes), min(sizes) > 0) == (stages, len(parameters), True)
    cuts = combinations(range(1, len(parameters)), stages - 1)
    splits = [[stop - start for start, stop in pairwise((0, *cut, len(parameters)))] for cut in cuts]
    ordered = [sorted(stage_weights(parameters, split), reverse=True) for split in splits]
    assert sorted(stage_weights(parameters, sizes), reverse=True) == min(ordered)


PUBLISHED = {name: (spec, config) for spec in FAMILIES.values() for name, config in spec.published.items()}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_stage_of_a_published_model_holds_little_more_than_its_share(model):
    spec, config = PUBLISHED[model]
    with torch.device("meta"):
        network = getattr(diffusers, spec.class_name)(**config)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    parameters = tuple(block_parameters(shapes, spec.blocks).values())
    assert len(parameters) == spec.count_blocks(config)
    for stages in (2, 3, 4):
        share = max(stage_weights(parameters, balanced_sizes(parameters, stages))) / sum(parameters)
        assert share <= 1.1 / stages


@pytest.mark.parametrize(
    ("layout", "facts", "reason"),
    [
        (Layout(pipefusion_degree=2), {"cache": "first block"}, r"kind first block .* pipefusion_degree=2"),
        (Layout(pipefusion_degree=2), {"cache": "teacache"}, r"kind teacache .* pipefusion_degree=2"),
        (Layout(pipefusion_degree=2), {"cache": "attention"}, r"pipefusion_degree=2 takes keys and values"),
        (Layout(distrifusion_degree=2), {"cache": "attention"}, r"distrifusion_degree=2 takes keys and values"),
        (Layout(ulysses_degree=2, compile="blocks"), {"cache": "attention"}, "compiled block"),
        (Layout(tensor_degree=2), {"is_study": True}, r"A study .* tensor_degree=2"),
        (Layout(ulysses_degree=2, compile="blocks"), {"is_study": True}, "A study"),
    ],
    ids=str,
)
def test_caches_and_studies_are_refused_where_they_cannot_work(layout, facts, reason):
    with pytest.raises(UserError, match=reason):
        check_layout(layout, RunFacts(ranks=2, **facts))


@pytest.mark.parametrize(
    "layout", [Layout(pipefusion_degree=2), Layout(distrifusion_degree=2), Layout(tensor_degree=2)]
)
def test_a_schedule_works_in_every_layout(layout):
    check_layout(layout, RunFacts(ranks=2, cache="schedule"))
