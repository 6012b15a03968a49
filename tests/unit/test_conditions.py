"""A conditioning that does not fit the model, itself or the batch is refused by name."""

from __future__ import annotations

import pytest
import torch
from paralleldit.parallel_backend.engine.conditioning import Inputs, entries_of_side
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.parallel_backend.protocol.messages import Conditioning
from paralleldit.tests.tiny_models import TINY_MODELS

BATCH = 2
SHAPE = torch.Size((BATCH, 4, 8, 8))


def draw(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


def tensors_of(model: str) -> dict[str, torch.Tensor]:
    condition = TINY_MODELS[model].condition(draw, BATCH, 4)
    return dict(condition.tensors)


def taken(model: str, tensors: dict[str, torch.Tensor]) -> Condition:
    named = {f"positive.0.{name}": tensor for name, tensor in tensors.items()}
    family = TINY_MODELS[model].make_family(2)
    (entry,) = entries_of_side((Conditioning(),), "positive", Inputs(named, family, family.model_sampling(None), SHAPE))
    return entry.condition


@pytest.mark.parametrize("model", TINY_MODELS)
def test_conditioning_of_the_models_own_kind_is_taken(model):
    tensors = tensors_of(model)
    condition = taken(model, tensors)
    assert all(torch.equal(condition[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("flux dev", {"pooled": None}, "a pooled vector, which this Flux.1 model needs"),
        ("pixart alpha", {"tokens": draw(1, 4, 7)}, "text tokens of width 7; this PixArt-alpha model takes 20"),
        ("hunyuandit 1.2", {"tokens_2": None, "mask_2": None}, "text tokens of a second encoder"),
        ("hunyuandit 1.2", {"mask": None}, "needs 5 text tokens, padded, .* has no attention mask"),
        ("hunyuandit 1.2", {"tokens_2": draw(1, 6, 40), "mask_2": draw(1, 6)}, "needs 7 text tokens of mT5, .* has 6"),
        ("pixart alpha", {"mask": draw(1, 3)}, r"does not fit together.*'mask': \[1, 3\]"),
        ("pixart alpha", {"mask": draw(1, 4, 1)}, "does not fit together"),
        ("pixart alpha", {"tokens": draw(3, 4, 20)}, "not the batch of 2"),
        ("pixart alpha", {"tokens": draw(1, 0, 20), "mask": None}, "does not fit together"),
        ("pixart alpha", {"tokens": None}, "does not fit together"),
        ("pixart alpha", {"mask_2": draw(1, 4)}, "does not fit together"),
        (
            "mochi",
            {"mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])},
            r"leave \[2, 3\] tokens of the texts of a batch",
        ),
        ("mochi", {"mask": torch.zeros(1, 4)}, r"leave \[0\] tokens"),
    ],
)
def test_conditioning_of_another_kind_is_refused(model, changes, message):
    tensors = {name: tensor for name, tensor in (tensors_of(model) | changes).items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        taken(model, tensors)


def test_a_text_for_each_picture_is_cut_with_the_batch():
    condition = TINY_MODELS["hunyuandit 1.1"].condition(torch.randn, 3, 4)
    part = condition.part(slice(1, 3), 3)
    for name in ("tokens", "mask", "tokens_2", "mask_2"):
        assert torch.equal(part[name], condition[name][1:])
    assert TINY_MODELS["hunyuandit 1.1"].condition(torch.randn, 1, 4).part(slice(1, 3), 3)["tokens"].shape[0] == 1


@pytest.mark.parametrize("model", ["pixart alpha", "pixart sigma", "hunyuandit 1.1", "hunyuandit 1.2"])
def test_flow_shift_of_a_model_that_is_no_flow_is_refused(model):
    with pytest.raises(UserError, match="has no flow shift, and the graph sets it to 3"):
        TINY_MODELS[model].make_family(2).model_sampling(3.0)


@pytest.mark.parametrize("model", ["hunyuanvideo", "mochi"])
def test_tokens_that_a_mask_leaves_out_are_left_out(model):
    tensors = tensors_of(model)
    tokens = torch.arange(4.0).view(1, 4, 1) * tensors["tokens"]
    for mask in (torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 1, 0, 0]] * BATCH)):
        condition = taken(model, {**tensors, "tokens": tokens, "mask": mask})
        assert torch.equal(condition["tokens"], tokens[:, :2])
        assert condition.get("mask") is None
