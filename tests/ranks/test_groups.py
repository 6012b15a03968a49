"""The groups in which ranks compute."""

import torch
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.tests.ranks.conftest import TIMEOUT_S


def patience(world):
    """How many seconds ranks wait for each other on the axes that they share."""
    groups = [axis.group for axis in Mesh(Layout(ulysses_degree=2)).axes if axis.group]
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def test_ranks_wait_for_each_other_as_long_as_the_sidecar_is_told(ranks):
    assert ranks.run(2, patience) == [{TIMEOUT_S}] * 2
