"""What a Stable Diffusion 3 cannot sample is refused before any work, with both numbers."""

import pytest
import torch
from paralleldit.parallel_backend.engine.checks import latents_of
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.tests.tiny_models import TINY_MODELS

FAMILY = TINY_MODELS["sd3.5 medium"].make_family(2)


@pytest.mark.parametrize("size", [(18, 18), (17, 1), (1, 18)], ids=str)
def test_picture_as_large_as_the_positions_is_taken(size):
    latents_of({"latent": torch.zeros(1, 16, *size)}, FAMILY)


@pytest.mark.parametrize("size", [(19, 8), (8, 19), (20, 20)], ids=str)
def test_picture_beyond_the_positions_is_refused(size):
    with pytest.raises(UserError, match="10 rows or columns of tokens; this sd3 model has positions for 9"):
        latents_of({"latent": torch.zeros(1, 16, *size)}, FAMILY)


@pytest.mark.parametrize(
    ("text", "pooled", "words"),
    [
        (16, 12, "text tokens of width 16; this Stable Diffusion 3 model takes 24"),
        (24, 10, "a pooled vector of width 10; this Stable Diffusion 3 model takes 12"),
    ],
)
def test_conditioning_of_another_model_is_refused(text, pooled, words):
    with pytest.raises(UserError, match=words):
        FAMILY.check_condition(Condition({"tokens": torch.zeros(1, 5, text), "pooled": torch.zeros(1, pooled)}))
