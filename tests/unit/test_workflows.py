"""Every value and link of the saved workflows against what the nodes declare; tests/graph compares the two formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paralleldit import NODE_CLASS_MAPPINGS
from paralleldit.cli.headless.core_nodes import Folders, core_nodes
from PIL import Image

PACK = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
API = sorted((PACK / "workflows" / "api").glob("*.json"))
TEMPLATE_FOLDERS = ("example_workflows", "example", "examples", "workflow", "workflows")
"""In these folders of a pack ComfyUI takes every JSON file for a template."""

KNOWN = {**core_nodes(Folders(Path(), Path(), Path())), **NODE_CLASS_MAPPINGS}
HOST_OUTPUTS = {
    "CLIPLoader": ("CLIP",),
    "DualCLIPLoader": ("CLIP",),
    "CLIPTextEncode": ("CONDITIONING",),
    "FluxGuidance": ("CONDITIONING",),
}
"""Nodes of ComfyUI that run there only: the tests of the host compare their inputs with its own list."""

VALUES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
IDS = {"ids": lambda path: path.name}


def nodes(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for key, entry in json.loads(path.read_text()).items():
        yield key, entry["class_type"], entry["inputs"]


def outputs(class_type: str) -> tuple[str, ...]:
    return HOST_OUTPUTS.get(class_type) or KNOWN[class_type].RETURN_TYPES


def fault_of_value(spec: Any, value: Any) -> str:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list):
        is_fixed = "default" in options  # other menus list the files of the machine
        return "" if value in kind or not is_fixed else f"{value!r} is not in the menu {kind}"
    if kind not in VALUES:
        return f"{value!r} is given, but {kind} comes from another node"
    if not isinstance(value, VALUES[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        return f"{value!r} is no {kind}"
    low, high = options.get("min", value), options.get("max", value)
    return "" if kind in ("STRING", "BOOLEAN") or low <= value <= high else f"{value} is not in {low}..{high}"


@pytest.mark.parametrize("path", API, **IDS)
def test_every_input_is_declared_given_and_of_its_type(path):
    types = {key: class_type for key, class_type, _ in nodes(path)}
    assert set(types.values()) <= set(KNOWN) | set(HOST_OUTPUTS)
    faults = []
    for key, class_type, inputs in nodes(path):
        if class_type in HOST_OUTPUTS:
            continue
        groups = KNOWN[class_type].INPUT_TYPES()
        declared = {**groups["required"], **groups.get("optional", {})}
        faults += [f"{key} lacks {name}" for name in groups["required"] if name not in inputs]
        faults += [f"{key} has an unknown {name}" for name in inputs if name not in declared]
        for name in set(inputs) & set(declared):
            value, spec = inputs[name], declared[name]
            if not isinstance(value, list):
                fault = fault_of_value(spec, value)
                faults += [f"{key}.{name}: {fault}"] if fault else []
                continue
            given = outputs(types[value[0]])[value[1]]
            wanted = "COMBO" if isinstance(spec[0], list) else spec[0]
            if not {"*", *given.split(",")} & set(wanted.split(",")):
                faults.append(f"{key}.{name} takes {wanted}, but gets {given}")
    assert faults == []


def test_every_workflow_is_saved_in_both_formats():
    assert WORKFLOWS
    assert {path.stem for path in WORKFLOWS} == {path.name.removesuffix(".api.json") for path in API}


@pytest.mark.parametrize("path", WORKFLOWS, **IDS)
def test_every_node_of_the_editor_format_is_known_and_shows_what_it_has(path):
    saved = json.loads(path.read_text())
    for node in saved["nodes"]:
        assert node["type"] in KNOWN or node["type"] in HOST_OUTPUTS
        given = outputs(node["type"])
        assert [slot["type"] for slot in node["outputs"]] == list(given), node["type"]
        if node["type"] not in KNOWN:
            continue
        groups = KNOWN[node["type"]].INPUT_TYPES()
        declared = {**groups["required"], **groups.get("optional", {})}
        for slot in node["inputs"]:
            kind = declared[slot["name"]][0]
            assert slot["type"] == ("COMBO" if isinstance(kind, list) else kind), (node["type"], slot["name"])


def test_what_comfyui_lists_as_templates_can_be_opened_and_has_a_picture():
    listed = [path for folder in TEMPLATE_FOLDERS for path in sorted((PACK / folder).glob("*.json"))]
    names = [path.stem for path in listed]
    assert len(names) == len(set(names)) >= 2
    for path in listed:
        assert isinstance(json.loads(path.read_text())["nodes"], list), f"{path.name} is not in the editor's format"
        with Image.open(path.with_suffix(".jpg")) as picture:
            assert picture.format == "JPEG"
            assert min(picture.size) >= 128
