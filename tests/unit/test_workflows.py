"""Every value and link of the saved workflows against what the nodes declare; tests/graph compares the two formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paralleldit import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from paralleldit.cli.headless.core_nodes import Folders, core_nodes
from paralleldit.tools.write_workflows import blueprint, editor_workflow
from PIL import Image

PACK = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
API = sorted((PACK / "workflows" / "api").glob("*.api.json"))
TEMPLATE_FOLDERS = ("example_workflows", "example", "examples", "workflow", "workflows")
"""In these folders of a pack ComfyUI takes every JSON file for a template."""

KNOWN = {**core_nodes(Folders(Path(), Path(), Path())), **NODE_CLASS_MAPPINGS}
HOST_OUTPUTS = {
    "CLIPLoader": ("CLIP",),
    "DualCLIPLoader": ("CLIP",),
    "CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"),
    "CLIPTextEncode": ("CONDITIONING",),
    "FluxGuidance": ("CONDITIONING",),
    "EmptyMochiLatentVideo": ("LATENT",),
    "ModelSamplingAuraFlow": ("MODEL",),
    "CFGNorm": ("MODEL",),
    "TextEncodeQwenImageEditPlus": ("CONDITIONING",),
    "FluxKontextImageScale": ("IMAGE",),
}
"""Nodes of ComfyUI that run there only: the tests of the host compare their inputs with its own list."""

EDITOR_ONLY = "MarkdownNote"
"""A node of the front end: it is never queued."""
DOWNLOADS = json.loads((PACK / "tools" / "model_downloads.json").read_text())
BLUEPRINTS = sorted((PACK / "subgraphs").glob("*.json"))
SHIPPED = "demo_model/"

VALUES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
IDS = {"ids": lambda path: path.name}


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
    assert list(faults_of(json.loads(path.read_text()))) == []


@pytest.mark.parametrize("path", sorted((PACK / "subgraphs" / "api").glob("*.json")), **IDS)
def test_the_nodes_of_a_blueprint_fit_together_once_its_inputs_are_given(path):
    plan = json.loads(path.read_text())
    assert list(faults_of(plan["nodes"], tuple(plan["inputs"]))) == []


def faults_of(api: dict[str, Any], given: tuple[str, ...] = ()) -> Iterator[str]:
    """`given`: the names of inputs from outside, as which "-10" stands."""
    types = {key: entry["class_type"] for key, entry in api.items()}
    assert set(types.values()) <= set(KNOWN) | set(HOST_OUTPUTS)
    for key, entry in api.items():
        class_type, inputs = entry["class_type"], entry["inputs"]
        if class_type in HOST_OUTPUTS:
            continue
        groups = KNOWN[class_type].INPUT_TYPES()
        declared = {**groups["required"], **groups.get("optional", {})}
        yield from (f"{key} lacks {name}" for name in groups["required"] if name not in inputs)
        yield from (f"{key} has an unknown {name}" for name in inputs if name not in declared)
        for name in set(inputs) & set(declared):
            value, spec = inputs[name], declared[name]
            if not isinstance(value, list):
                fault = fault_of_value(spec, value)
                yield from [f"{key}.{name}: {fault}"] if fault else []
                continue
            if value[0] == "-10":
                yield from [] if given[value[1]] == name else [f"{key}.{name} gets {given[value[1]]}"]
                continue
            kind = outputs(types[value[0]])[value[1]]
            wanted = "COMBO" if isinstance(spec[0], list) else spec[0]
            if not {"*", *kind.split(",")} & set(wanted.split(",")):
                yield f"{key}.{name} takes {wanted}, but gets {kind}"


def test_every_workflow_is_saved_in_both_formats():
    assert WORKFLOWS
    assert {path.stem for path in WORKFLOWS} == {path.name.removesuffix(".api.json") for path in API}


@pytest.mark.parametrize("path", WORKFLOWS, **IDS)
def test_every_node_of_the_editor_format_is_known_and_shows_what_it_has(path):
    saved = json.loads(path.read_text())
    for node in (node for node in saved["nodes"] if node["type"] != EDITOR_ONLY):
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


def test_the_saved_workflows_are_those_of_their_sources():
    known = NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    for path in API:
        note = path.with_name(path.name.replace(".api.json", ".md")).read_text()
        saved = json.loads((PACK / "workflows" / path.name.replace(".api.json", ".json")).read_text())
        assert saved == editor_workflow(json.loads(path.read_text()), note, *known), "run: tools/write_workflows.py"
    for path in BLUEPRINTS:
        plan = json.loads((path.parent / "api" / f"{path.stem}.api.json").read_text())
        assert json.loads(path.read_text()) == blueprint(path.stem, plan, *known), "run: tools/write_workflows.py"


@pytest.mark.parametrize("path", WORKFLOWS, **IDS)
def test_a_template_says_what_it_does_and_where_every_file_is_downloaded_from(path):
    """ComfyUI's dialog of missing models reads `models` of the node that names a file."""
    saved = json.loads(path.read_text())
    (note,) = [node for node in saved["nodes"] if node["type"] == EDITOR_ONLY]
    assert note["title"]
    assert len(note["widgets_values"][0]) > 80
    for node in saved["nodes"]:
        values = [value for value in node["widgets_values"] if isinstance(value, str) and node is not note]
        needed = [value for value in values if value.endswith(".safetensors") and not value.startswith(SHIPPED)]
        assert [each["name"] for each in node["properties"].get("models", ())] == needed, node["type"]
        assert all(
            each == {"name": each["name"], **DOWNLOADS[each["name"]]} for each in node["properties"].get("models", ())
        )
        assert all(DOWNLOADS[name]["url"] in note["widgets_values"][0] for name in needed)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_is_a_file_of_that_name_over_https(name):
    found = DOWNLOADS[name]
    assert found["url"].startswith("https://huggingface.co/")
    assert found["url"].rpartition("/")[2] == name
    assert found["directory"] in ("checkpoints", "diffusion_models", "text_encoders", "vae")


@pytest.mark.parametrize("path", BLUEPRINTS, **IDS)
def test_a_blueprint_is_one_node_whose_widgets_and_sockets_are_those_of_nodes_inside(path):
    saved = json.loads(path.read_text())
    (outside,), (inside,) = saved["nodes"], saved["definitions"]["subgraphs"]
    assert outside["type"] == inside["id"]
    assert inside["name"] == path.stem
    inner = {str(node["id"]): node for node in inside["nodes"]}
    for key, name in outside["properties"]["proxyWidgets"]:
        groups = KNOWN[inner[key]["type"]].INPUT_TYPES()
        declared = {**groups["required"], **groups.get("optional", {})}
        assert name in declared or name == "control_after_generate", (key, name)
    for side in ("inputs", "outputs"):
        assert [(each["name"], each["type"]) for each in outside[side]] == [
            (each["name"], each["type"]) for each in inside[side]
        ]
    links = {link["id"]: link for link in inside["links"]}
    for number, each in enumerate(inside["inputs"]):
        for link in (links[link] for link in each["linkIds"]):
            slot = inner[str(link["target_id"])]["inputs"][link["target_slot"]]
            assert (link["origin_id"], link["origin_slot"], slot["link"]) == (-10, number, link["id"])
    for number, each in enumerate(inside["outputs"]):
        for link in (links[link] for link in each["linkIds"]):
            slot = inner[str(link["origin_id"])]["outputs"][link["origin_slot"]]
            assert (link["target_id"], link["target_slot"]) == (-20, number)
            assert link["id"] in slot["links"]
