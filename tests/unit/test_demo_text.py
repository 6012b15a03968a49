import numpy as np
import pytest
import torch
from paralleldit.tools.demo_model import scenes, text
from paralleldit.tools.demo_model.train_text import NOUN_CLASSES, PLACES, TOKEN_CLASSES, classes_loss, token_truth

PAIR = next(scene for scene in (scenes.make_scene(3, i) for i in range(99)) if len(scene.groups) == 2)
ALONE = next(scene for scene in (scenes.make_scene(3, i) for i in range(99)) if scene.position is not None)


@pytest.mark.parametrize("scene", [PAIR, ALONE], ids=["pair", "alone"])
def test_each_token_is_taught_the_noun_phrase_that_it_belongs_to(scene):
    tokenizer = text.t5_tokenizer()
    ids = text.token_ids(tokenizer, [scene.caption()], text.T5_LENGTH)[0]
    words = [tokenizer.decode([number]).strip() for number in ids]
    truth = token_truth(scene)
    nouns = {scenes.plural(shape) if plural else shape for shape in scenes.SHAPES for plural in (False, True)}
    taught = [truth[place] for place, word in enumerate(words) if word in nouns]
    assert len(taught) == len(scene.groups)
    for row, group in zip(taught, scene.groups, strict=True):
        assert row[0] == group.count
        assert scenes.SHAPES[row[4] - 1] == group.shape
        assert list(scenes.COLOURS)[row[3] - 1] == group.colour
    assert PLACES[taught[0][5]] == (scene.relation or scene.position)
    assert not truth[words.index("background"), : len(NOUN_CLASSES)].any()


def test_the_lesson_is_learnt_where_the_logits_name_the_truth():
    truth = torch.from_numpy(np.stack([token_truth(PAIR)]))
    right = torch.cat(
        [
            torch.nn.functional.one_hot(truth[..., index], count).float() * 50
            for index, count in enumerate(TOKEN_CLASSES)
        ],
        dim=-1,
    )
    loss, worst = classes_loss(right, truth, TOKEN_CLASSES)
    assert loss < 1e-6
    assert worst == 1.0
    _, worst = classes_loss(right.roll(1, dims=1), truth, TOKEN_CLASSES)
    assert worst < 1.0
