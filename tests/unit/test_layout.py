"""What fits a layout, and which part of a model a stage is."""

import pytest
from diffusers import FluxTransformer2DModel
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.registry import BLOCK_LISTS
from paralleldit.parallel_backend.layout import (
    Layout,
    check_pipefusion,
    check_ranks,
    check_stale,
    check_weights,
    largest_exact_layout,
    layouts_of,
    patches_of,
)
from paralleldit.parallel_backend.stages import Stage, stage_parameters


@pytest.mark.parametrize(
    ("stages", "tensor", "late"), [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2)]
)
@pytest.mark.parametrize("ranks", [1, 2, 6, 8])
def test_layouts_of_ranks_fit_them(ranks, stages, tensor, late):
    found = layouts_of(ranks, pipefusion_degree=stages, tensor_degree=tensor, distrifusion_degree=late)
    assert bool(found) == (ranks % (stages * tensor * late) == 0)
    for layout in found:
        check_ranks(layout, ranks)
        assert (layout.pipefusion_degree, layout.tensor_degree, layout.distrifusion_degree) == (stages, tensor, late)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_what_is_chosen_is_exact(ranks, guided):
    assert largest_exact_layout(ranks, batch=1, guided=guided).is_exact


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


FITTING = {"blocks": 4, "token_rows": 8, "sampler": "euler", "elementwise": ("euler", "heun")}


@pytest.mark.parametrize(
    ("layout", "run", "words"),
    [
        ({"pipefusion_degree": 5}, {}, ("pipefusion_degree=5", "4 blocks")),
        ({"pipefusion_degree": 2, "num_patches": 9}, {}, ("num_patches=9", "8 rows")),
        ({"pipefusion_degree": 2}, {"sampler": "adaptive"}, ("adaptive", "pipefusion_degree=2", "euler, heun")),
        ({"pipefusion_degree": 2, "stage_blocks": (1, 2)}, {}, ("stage_blocks=1,2", "2 stages", "4 blocks")),
        ({"pipefusion_degree": 3, "stage_blocks": (2, 2)}, {}, ("stage_blocks=2,2", "pipefusion_degree=3")),
        ({"pipefusion_degree": 2, "stage_blocks": (4, 0)}, {}, ("stage_blocks=4,0", "from 1 on")),
    ],
    ids=str,
)
def test_what_pipefusion_cannot_cut_is_refused_with_its_numbers(layout, run, words):
    check_pipefusion(Layout(**layout | {"pipefusion_degree": 1}), **FITTING | run)
    check_pipefusion(Layout(pipefusion_degree=4, num_patches=8), **FITTING)
    check_pipefusion(Layout(pipefusion_degree=2, stage_blocks=(1, 3)), **FITTING)
    with pytest.raises(UserError) as refused:
        check_pipefusion(Layout(**layout), **FITTING | run)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"pipefusion_degree": 2, "attention": "yunchang"}, ("yunchang", "pipefusion_degree=2")),
        ({"distrifusion_degree": 3, "attention": "yunchang"}, ("yunchang", "distrifusion_degree=3")),
        ({"pipefusion_degree": 2, "distrifusion_degree": 4}, ("pipefusion_degree=2", "distrifusion_degree=4")),
    ],
    ids=str,
)
def test_what_cannot_use_old_keys_is_refused(layout, words):
    check_stale(Layout(attention="yunchang"))
    check_stale(Layout(distrifusion_degree=2))
    with pytest.raises(UserError) as refused:
        check_stale(Layout(**layout))
    assert all(word in str(refused.value) for word in words)


def test_weights_that_no_two_ranks_share_are_not_sharded():
    check_weights(Layout(tensor_degree=2, ulysses_degree=2, weights="sharded"))
    check_weights(Layout(tensor_degree=2, weights="offloaded"))
    with pytest.raises(UserError) as refused:
        check_weights(Layout(tensor_degree=2, pipefusion_degree=2, weights="sharded"))
    assert all(word in str(refused.value) for word in ("4 ranks", "tensor_degree=2", "pipefusion_degree=2", "8 ranks"))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_stages_share_the_blocks_of_a_model(count):
    model = FluxTransformer2DModel(
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    names = list(model.state_dict())
    stages = [stage_parameters(names, BLOCK_LISTS, Stage(index, count)) for index in range(count)]
    assert set.union(*stages) == set(names)
    everywhere = {name for name in names if not name.startswith(BLOCK_LISTS)}
    blocks = [{name.rsplit("blocks.")[1].split(".")[0] + name[:6] for name in stage - everywhere} for stage in stages]
    assert sum(map(len, blocks)) == len(set.union(*blocks)) == 7
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    assert all(everywhere <= stage for stage in stages)
    # Computation runs through the double blocks first.
    assert "transformer_blocks.0.attn.to_q.weight" in stages[0]
    assert "single_transformer_blocks.3.attn.to_q.weight" in stages[-1]
