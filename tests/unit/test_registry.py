"""The registry of families: one row each, and nothing else of the pack knows them by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from paralleldit.parallel_backend.families.registry import FAMILIES, load_view
from paralleldit.tests.tiny_models import TINY_MODELS
from paralleldit.tests.tiny_unet import SPECS

PACK = Path(__file__).resolve().parents[2]
OWN = ("parallel_backend/families/", "parallel_backend/text/recipes.py")
"""What a new family adds to."""
KINDS = {
    "parallel_backend/files/controlnet.py": "kinds of ControlNet files",
    "parallel_backend/adapters/controlnet/nets.py": "kinds of ControlNets",
    "parallel_backend/files/ip_adapter.py": "kinds of IP-Adapter files",
    "parallel_backend/adapters/ip_adapter.py": "kinds of IP-Adapters",
    "parallel_backend/vae/": "kinds of autoencoders",
    "parallel_backend/files/recognise.py": "kinds of files that are not served, relatives of families among them",
    "parallel_backend/sampling/model_sampling.py": "ComfyUI's kinds of noise levels, one of which is called flux",
    "cli/headless/conditioning_nodes.py": "ComfyUI's own nodes by their names, such as FluxGuidance",
    "cli/headless/core_nodes.py": "ComfyUI's own nodes by their names, such as EmptySD3LatentImage",
}
"""Files that name families because what they hold is made for one: a new family leaves them as they are."""
NAMES = {spec.name.split("-")[0] for spec in FAMILIES.values()}
WORD = re.compile(r"[A-Z]+[0-9]*(?![a-z])|[A-Z]?[a-z]+[0-9]*")
"""In a program's names: `FluxControlNet` has three."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_leads_to_the_view_of_its_family(name):
    assert load_view(FAMILIES[name]).spec is FAMILIES[name]


def test_every_family_has_a_tiny_model():
    assert {each.name for each in (*(tiny.spec for tiny in TINY_MODELS.values()), *SPECS.values())} == set(FAMILIES)


def named(tree: ast.AST) -> Iterator[str]:
    """Names and strings of a program, but for docstrings and what is shown to users (sentences)."""
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if " " not in text:
                yield text
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.FunctionDef(name=text) | ast.ClassDef(name=text):
                yield text
            case ast.alias(name=text) | ast.ImportFrom(module=str(text)):
                yield text


def test_families_are_named_in_their_own_files_alone():
    files = [path for top in ("nodes", "launcher", "cli", "parallel_backend") for path in (PACK / top).rglob("*.py")]
    naming = {
        path.relative_to(PACK).as_posix()
        for path in files
        if any(word.lower() in NAMES for each in named(ast.parse(path.read_text())) for word in WORD.findall(each))
    }
    assert "parallel_backend/families/registry.py" in naming
    assert not {file for file in naming if not file.startswith((*OWN, *KINDS))}
