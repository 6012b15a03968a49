"""A run with compiled blocks on a CUDA device gives what the CPU gives with plain ones."""

import pytest
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.tests.ranks.stale_families import HEADS, relative_error, sampled
from paralleldit.tests.tiny_models import TINY_MODELS

pytestmark = pytest.mark.gpu

MODEL = "flux dev"


def test_compiled_blocks_make_the_same_run(ranks, device, tmp_path):
    TINY_MODELS[MODEL].make(HEADS).save_pretrained(tmp_path)
    (expected,) = ranks.run(1, sampled, MODEL, Layout(), tmp_path)
    (latent,) = ranks.run(1, sampled, MODEL, Layout(compile="blocks"), tmp_path, device)
    assert relative_error(latent, expected) <= 3e-4
