"""Every node is explained, in English and Chinese, where ComfyUI looks for it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from paralleldit import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, WEB_DIRECTORY
from paralleldit.tools.write_locales import english, flat, lacks

PACK = Path(__file__).resolve().parents[2]
DOCS = PACK / WEB_DIRECTORY / "docs"
LOCALES = PACK / "locales"
LANGUAGES = ("en", "zh")
OWN = english(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS)
MEANS_SOMETHING = re.compile(r"[@|]")
"""To the host's reader of translations; braces name values."""


def read(language: str, name: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_has_a_help_page_that_begins_with_its_name(name):
    page = DOCS / f"{name}.md"
    assert page.exists(), f"write web/docs/{name}.md: its help page, which begins with the node's display name"
    title, _, text = page.read_text().partition("\n")
    assert title == f"# {NODE_DISPLAY_NAME_MAPPINGS[name]}"
    assert len(text) > 80


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_help_page_speaks_of_inputs_that_the_node_has(name):
    groups = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    inputs = {each for group in ("required", "optional") for each in groups.get(group, {})}
    listed = re.findall(r"^- \*\*(\w+)\*\*", (DOCS / f"{name}.md").read_text(), re.MULTILINE)
    assert set(listed) <= inputs


def test_no_help_page_is_left_of_a_node_that_is_gone():
    assert {path.stem for path in DOCS.glob("*.md")} == set(NODE_CLASS_MAPPINGS)


def test_the_english_texts_are_the_nodes_own():
    assert read("en", "nodeDefs") == OWN, "run: python tools/write_locales.py"


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_a_translation_covers_every_node_and_input(language):
    found = list(lacks(OWN, read(language, "nodeDefs")))
    assert not found, f"edit locales/{language}/nodeDefs.json: it {'; it '.join(found)}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_panels_words_are_the_same_in_every_language(language):
    own, table = flat(read("en", "main")), flat(read(language, "main"))
    assert set(table) == set(own), f"edit locales/{language}/main.json"
    for place, text in own.items():
        assert set(re.findall(r"\{\w+\}", table[place])) == set(re.findall(r"\{\w+\}", text)), place


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["main", "nodeDefs"])
def test_no_text_means_something_to_the_hosts_reader_of_translations(language, name):
    texts = flat(read(language, name))
    found = [place for place, text in texts.items() if MEANS_SOMETHING.search(text)]
    found += [place for place, text in texts.items() if name == "nodeDefs" and "{" in text]
    assert not found
