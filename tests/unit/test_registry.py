"""The registry of families."""

from __future__ import annotations

from importlib import import_module

import pytest
from paralleldit.parallel_backend import families
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.files.detect import FAMILIES as FILES


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_leads_to_the_view_of_its_family(name):
    module, view = FAMILIES[name].split(":")
    assert getattr(import_module(f"{families.__name__}.{module}"), view).name == name


def test_what_is_found_in_files_can_be_sampled():
    assert {row.name for row in FILES} == set(FAMILIES)
