from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from paralleldit.tools.demo_model import checker, scenes

TRUTH = [scenes.make_scene(77, index, held_out=True) for index in range(60)]


def score(pairs):
    right, asked = Counter(), Counter()
    for picture, scene in pairs:
        for name, verdicts in checker.check(picture, scene).items():
            right[name] += sum(verdicts)
            asked[name] += len(verdicts)
    return {name: right[name] / asked[name] for name in asked}


def test_drawn_truth_is_found_right():
    shares = score((scenes.draw(scene, 128), scene) for scene in TRUTH)
    assert set(shares) == {"colour", "shape", "count", "relation", "background", "position", "size", "nothing else"}
    assert min(shares.values()) >= 0.95, shares


def change(scene, **changes):
    return replace(scene, groups=(replace(scene.groups[0], **changes), *scene.groups[1:]))


PLAIN = scenes.Scene(
    groups=(
        scenes.Group(2, "", "plain", "red", "circle"),
        scenes.Group(1, "large", "plain", "blue", "square"),
    ),
    relation="left of",
    position=None,
    background="gray",
    pattern="plain",
    objects=(
        scenes.Placed(0, 0.25, 0.25, 0.15),
        scenes.Placed(0, 0.25, 0.75, 0.15),
        scenes.Placed(1, 0.75, 0.5, 0.22),
    ),
    light=0.8,
)


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        (PLAIN, set()),
        (change(PLAIN, colour="green"), {"colour", "shape", "count", "size", "relation", "nothing else"}),
        (change(PLAIN, shape="star"), {"shape"}),
        (change(PLAIN, count=3), {"count"}),
        (change(PLAIN, size="large"), {"size"}),
        (replace(PLAIN, relation="right of"), {"relation"}),
        (replace(PLAIN, relation="above"), {"relation"}),
        (replace(PLAIN, background="pink"), {"background"}),
    ],
    ids=["as drawn", "colour", "shape", "count", "size", "side", "height", "background"],
)
def test_each_wrong_attribute_is_told_from_the_others(asked, wrong):
    verdicts = checker.check(scenes.draw(PLAIN, 128), asked)
    assert {name for name, each in verdicts.items() if not all(each)} == wrong


def test_a_shapeless_blob_is_no_shape():
    picture = np.full((128, 128, 3), (150, 152, 156), np.uint8)
    picture[30:100, 30:44] = (214, 34, 38)
    picture[86:100, 30:100] = (214, 34, 38)
    _, seen = checker.look(picture)
    assert [(s.colour, s.shape) for s in seen] == [("red", "unclear")]


def test_specks_are_not_counted():
    picture = np.full((128, 128, 3), (150, 152, 156), np.uint8)
    picture[10:14, 10:14] = (214, 34, 38)
    assert checker.look(picture)[1] == []
