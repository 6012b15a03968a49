"""What the fork server of `RankPool` imports once, so that none of its forks, the ranks, need to."""

import gc

import tests.conftest  # noqa: F401 makes the pack known by its name

# isort: split
import paralleldit.tests.ranks.controlnets
import paralleldit.tests.ranks.stale_families
import paralleldit.tests.ranks.stale_flux
import paralleldit.tests.ranks.test_exact_layouts
import paralleldit.tests.ranks.test_lora
import paralleldit.tests.tiny_vaes  # noqa: F401

# What has been imported stays: no collection of the ranks looks through it, or copies its pages.
gc.collect()
gc.freeze()
