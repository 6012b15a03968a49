"""What a request must bring is refused by name where it is missing."""

import pytest
import torch
from paralleldit.parallel_backend.engine.checks import needed, sigmas_of
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol.messages import Conditioning, ModelRef, Sample
from paralleldit.parallel_backend.sampling.model_sampling import FluxFlow

REQUEST = Sample(
    id=1,
    model=ModelRef(path="unused"),
    layout=Layout(),
    positive=(Conditioning(),),
    sampler="euler",
    schedule=None,
    seed=1,
)


def test_a_missing_tensor_is_named():
    with pytest.raises(UserError, match="carries no latent"):
        needed("latent", {})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "carries no sigmas"),
        ({"sigmas": torch.tensor(0.5)}, r"shape \[\]"),
        ({"sigmas": torch.ones(2, 3)}, r"shape \[2, 3\]"),
    ],
    ids=["missing", "a number", "a table"],
)
def test_sigmas_that_are_no_row_of_levels_are_refused(tensors, words):
    with pytest.raises(UserError, match=words):
        sigmas_of(REQUEST, tensors, FluxFlow())
