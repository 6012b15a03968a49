import numpy as np
import pytest
from paralleldit.tools.demo_model import scenes

SAMPLES = [scenes.make_scene(3, index) for index in range(120)]


def test_the_same_seed_and_index_give_the_same_picture():
    again = scenes.make_scene(3, 7)
    assert again == SAMPLES[7]
    assert np.array_equal(scenes.draw(again, 64), scenes.draw(SAMPLES[7], 64))
    assert scenes.make_scene(4, 7) != again


def test_held_out_combinations_never_appear_in_training():
    assert not any(scene.held_out() for scene in SAMPLES)
    assert all(scenes.make_scene(3, index, held_out=True).held_out() for index in range(20))


@pytest.mark.parametrize("size", [64, 128, 200])
@pytest.mark.parametrize("style", ["picture", "chalk"])
def test_every_size_and_style_is_drawn_as_bytes(size, style):
    drawn = scenes.draw(SAMPLES[0], size, style)
    assert drawn.shape == (size, size, 3)
    assert drawn.dtype == np.uint8
    assert drawn.std() > 1


def test_captions_say_number_size_fill_colour_shape_and_relation():
    pair = scenes.Scene(
        groups=(
            scenes.Group(1, "large", "outlined", "orange", "star"),
            scenes.Group(3, "", "striped", "blue", "cross"),
        ),
        relation="left of",
        position=None,
        background="green",
        pattern="checkered",
        objects=(),
        light=0.8,
    )
    assert pair.caption() == (
        "a large outlined orange star left of three striped blue crosses on a green checkered background"
    )
    assert scenes.Group(1, "", "plain", "orange", "ring").phrase() == "an orange ring"


def test_objects_stay_inside_apart_and_on_the_side_that_the_caption_says():
    for scene in SAMPLES:
        for index, placed in enumerate(scene.objects):
            assert placed.radius < placed.x < 1 - placed.radius
            assert placed.radius < placed.y < 1 - placed.radius
            for other in scene.objects[:index]:
                assert np.hypot(placed.x - other.x, placed.y - other.y) > placed.radius + other.radius
        first, second = ([o for o in scene.objects if o.group == g] for g in (0, 1))
        holds = {
            None: lambda a, b: True,
            "left of": lambda a, b: a.x < b.x,
            "right of": lambda a, b: a.x > b.x,
            "above": lambda a, b: a.y < b.y,
            "below": lambda a, b: a.y > b.y,
        }[scene.relation]
        assert all(holds(a, b) for a in first for b in second)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_an_object_has_its_colour_inside_and_the_background_outside(shape):
    scene = scenes.Scene(
        groups=(scenes.Group(1, "large", "plain", "red", shape),),
        relation=None,
        position="in the center",
        background="gray",
        pattern="plain",
        objects=(scenes.Placed(0, 0.5, 0.5, 0.22),),
        light=0.8,
    )
    drawn = scenes.draw(scene, 128).astype(int)
    red = drawn[..., 0] - drawn[..., 1] > 100
    assert 0.02 < red.mean() < 0.2
    assert not red[:20].any()
    assert red[64, 64] == (shape != "ring")


def test_label_shares_sum_to_one_and_name_the_drawn_shapes():
    for scene in SAMPLES[:20]:
        labels = scenes.label_map(scene, 8)
        split = 1 + len(scenes.SHAPES)
        assert np.allclose(labels[..., :split].sum(-1), 1)
        assert np.allclose(labels[..., split:].sum(-1), 1)
        shown = {scenes.SHAPES[i] for i in np.nonzero(labels[..., 1:split].max(axis=(0, 1)))[0]}
        assert shown == {group.shape for group in scene.groups}


def test_the_edge_map_is_dark_on_flat_areas_and_white_on_outlines():
    picture = np.full((64, 64, 3), 200, np.uint8)
    picture[16:48, 16:48] = (20, 20, 200)
    edges = scenes.edge_map(picture)
    assert edges[32, 15, 0] == 255
    assert edges[32, 32, 0] == 0
    assert edges[5, 5, 0] == 0
