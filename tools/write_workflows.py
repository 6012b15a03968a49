"""Write what ComfyUI's editor opens: workflows/NAME.json, of workflows/api/NAME.api.json, which its queue takes, and
of NAME.md, the note beside the nodes; and the blueprints subgraphs/NAME.json, of subgraphs/api/NAME.api.json.

    python tools/write_workflows.py

The files in api are the ones to edit. Where the files of models are downloaded from is in tools/model_downloads.json.
Nodes stand in columns by how far they are from the start, one below the other, the end of the chain in one column: so
the editor shows the whole at a scale at which texts can be read.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

PACK = Path(__file__).resolve().parents[1]
DOWNLOADS = json.loads((PACK / "tools" / "model_downloads.json").read_text())
"""By the name of a file: its address, and its folder in ComfyUI's models."""
WIDTH, GAP, TITLE, ROW, TEXT, PICTURE = 300, 30, 40, 26, 70, 300
"""Sizes on the canvas: a node's width, the space between nodes, its title, a row of a node, a text box, a picture."""
NOTE, NOTE_LETTERS, NOTE_ROW = 360, 50, 18
"""A note: its width, how many letters a row of it has, and how high that is."""
CORE = {"cnr_id": "comfy-core", "ver": "0.3.64"}
"""Of which pack a node is, so that ComfyUI can say where to get it. Ours has no name in the registry yet: to write one
down would send people to whoever takes it first."""
INPUTS, OUTPUTS = -10, -20
"""The places of a subgraph from and to which its own inputs and outputs lead."""
CONTROL = "control_after_generate"
SHOWS_PICTURE = ("LoadImage", "SaveImage", "SaveAnimatedWEBP", "PreviewImage")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
HOST = {
    "CLIPLoader": (("CLIP",), {}),
    "DualCLIPLoader": (("CLIP",), {}),
    "CheckpointLoaderSimple": (("MODEL", "CLIP", "VAE"), {}),
    "CLIPTextEncode": (("CONDITIONING",), {"clip": "CLIP"}),
    "FluxGuidance": (("CONDITIONING",), {"conditioning": "CONDITIONING"}),
    "LoraLoaderModelOnly": (("MODEL",), {"model": "MODEL"}),
    "ModelSamplingAuraFlow": (("MODEL",), {"model": "MODEL"}),
    "CFGNorm": (("MODEL",), {"model": "MODEL"}),
    "TextEncodeQwenImageEditPlus": (("CONDITIONING",), {"clip": "CLIP", "vae": "VAE", "image1": "IMAGE"}),
    "FluxKontextImageScale": (("IMAGE",), {"image": "IMAGE"}),
    "LoadImage": (("IMAGE", "MASK"), {}),
    "SaveImage": ((), {"images": "IMAGE"}),
    "SaveAnimatedWEBP": ((), {"images": "IMAGE"}),
    "EmptyLatentImage": (("LATENT",), {}),
    "EmptySD3LatentImage": (("LATENT",), {}),
    "EmptyHunyuanLatentVideo": (("LATENT",), {}),
    "EmptyMochiLatentVideo": (("LATENT",), {}),
}
"""ComfyUI's own nodes: the types of their outputs, and of their inputs that are no widgets."""


def editor_workflow(api: dict[str, Any], note: str, classes: dict[str, type], titles: dict[str, str]) -> dict[str, Any]:
    """A workflow in the editor's format, of one in the API format and of the text of a note in Markdown, which begins
    with a heading. `classes`, `titles`: the pack's nodes by id."""
    nodes, links = _graph(api, classes, titles)
    beside = _note(max(map(int, api)) + 1, note, _downloads(api))
    return {
        "revision": 0,
        "last_node_id": beside["id"],
        "last_link_id": len(links),
        "nodes": [*nodes.values(), beside],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def blueprint(name: str, plan: dict[str, Any], classes: dict[str, type], titles: dict[str, str]) -> dict[str, Any]:
    """A subgraph that the editor offers as one node. `plan`: its `nodes` in the API format, in which ["-10", N] is its
    own input of that number, the names of these `inputs`, its `outputs` (name: [node, number]), and the `widgets` of
    inner nodes that it shows, as [node, input]."""
    nodes, links = _graph(plan["nodes"], classes, titles)
    own = _id(name)
    inputs, outputs = [], []
    for number, each in enumerate(plan["inputs"]):
        led = [link for link in links if link[1:3] == [INPUTS, number]]
        inputs.append({"id": _id(name, "input", each), "name": each, "type": led[0][5], "linkIds": [led[0][0]]})
    for number, (each, (source, output)) in enumerate(plan["outputs"].items()):
        given = nodes[source]["outputs"][output]
        links.append([len(links) + 1, int(source), output, OUTPUTS, number, given["type"]])
        given["links"].append(len(links))
        outputs.append({"id": _id(name, "output", each), "name": each, "type": given["type"], "linkIds": [len(links)]})
    right = max(node["pos"][0] for node in nodes.values()) + WIDTH + GAP
    subgraph = {
        "id": own,
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": max(map(int, nodes)),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": name,
        "inputNode": {"id": INPUTS, "bounding": [-160, 0, 120, TITLE + ROW * len(inputs)]},
        "outputNode": {"id": OUTPUTS, "bounding": [right, 0, 120, TITLE + ROW * len(outputs)]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": list(nodes.values()),
        "groups": [],
        "links": [
            dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
            for link in links
        ],
        "extra": {},
        "description": plan["description"],
    }
    rows = max(len(inputs), len(outputs)) + len(plan["widgets"])
    outside = {
        "id": 1,
        "type": own,
        "pos": [0, 0],
        "size": [WIDTH, TITLE + ROW * rows],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{"name": each["name"], "type": each["type"], "link": None} for each in inputs],
        "outputs": [{"name": each["name"], "type": each["type"], "links": []} for each in outputs],
        "title": name,
        "properties": {"proxyWidgets": plan["widgets"]},
        "widgets_values": [],
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [outside],
        "links": [],
        "definitions": {"subgraphs": [subgraph]},
        "extra": {"BlueprintDescription": plan["description"]},
        "version": 0.4,
    }


def _graph(
    api: dict[str, Any], classes: dict[str, type], titles: dict[str, str]
) -> tuple[dict[str, dict[str, Any]], list[list[Any]]]:
    """The nodes by id, in their places, and the links [id, source, output, target, slot, type] between them."""
    links: list[list[Any]] = []
    nodes = {key: _node(key, entry, classes, titles) for key, entry in api.items()}
    for key, entry in api.items():
        for place, slot in enumerate(nodes[key]["inputs"]):
            source, output = entry["inputs"][slot["name"]]
            slot["link"] = len(links) + 1
            if source in nodes:
                given = nodes[source]["outputs"][output]
                given["links"].append(slot["link"])
                slot["type"] = given["type"] if slot["type"] == "*" else slot["type"]
            links.append([slot["link"], int(source), output, int(key), place, slot["type"]])
    _place(api, nodes)
    return nodes, links


def _downloads(api: dict[str, Any]) -> list[dict[str, str]]:
    """The files that the workflow's nodes name and that must be downloaded."""
    named = [value for entry in api.values() for value in entry["inputs"].values() if isinstance(value, str)]
    return [{"name": name, **DOWNLOADS[name]} for name in dict.fromkeys(named) if name in DOWNLOADS]


def _note(number: int, text: str, downloads: list[dict[str, str]]) -> dict[str, Any]:
    """The node that says what the workflow does and what it needs, left of the others."""
    title, _, text = text.partition("\n")
    listed = [f"- [{each['name']}]({each['url']}) into `models/{each['directory']}`" for each in downloads]
    text = "\n".join([text.strip(), *(["", "**Download**", *listed] if listed else [])])
    rows = sum(max(1, math.ceil(len(line.partition("](")[0]) / NOTE_LETTERS)) for line in text.splitlines())
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [-(NOTE + GAP), 0],
        "size": [NOTE, 2 * TITLE + NOTE_ROW * rows],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": title.lstrip("# "),
        "properties": {"Node name for S&R": "MarkdownNote"},
        "widgets_values": [text],
    }


def _id(*names: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(names)))


def _node(key: str, entry: dict[str, Any], classes: dict[str, type], titles: dict[str, str]) -> dict[str, Any]:
    name, given = entry["class_type"], entry["inputs"]
    title = entry.get("_meta", {}).get("title", "")
    if name in classes:
        node_class: Any = classes[name]
        groups = node_class.INPUT_TYPES()
        declared = {**groups["required"], **groups.get("optional", {})}
        outputs = tuple(
            zip(getattr(node_class, "RETURN_NAMES", node_class.RETURN_TYPES), node_class.RETURN_TYPES, strict=True)
        )
        kinds = {each: spec[0] for each, spec in declared.items() if _is_socket(spec[0]) or _linked(given.get(each))}
        options = {each: spec[1] if len(spec) > 1 else {} for each, spec in declared.items()}
        values = {each: given.get(each, options[each].get("default")) for each in declared if each not in kinds}
    else:
        types, kinds = HOST[name]
        outputs = tuple(zip(types, types, strict=True))
        values, options = {each: value for each, value in given.items() if not _linked(value)}, {}
    widgets: list[Any] = []
    for each, value in values.items():
        widgets += [value, "fixed"] if options.get(each, {}).get(CONTROL) else [value]
    boxes = sum(bool(options.get(each, {}).get("multiline")) or name == "CLIPTextEncode" for each in values)
    rows = max(len(kinds), len(outputs)) + len(widgets)
    models = [{"name": value, **DOWNLOADS[value]} for value in values.values() if value in DOWNLOADS]
    height = TITLE + ROW * rows + TEXT * boxes + PICTURE * (name in SHOWS_PICTURE)
    node = {
        "id": int(key),
        "type": name,
        "pos": [0, 0],
        "size": [WIDTH, height],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {"name": each, "type": kind if isinstance(kind, str) else "COMBO", "link": None}
            for each, kind in kinds.items()
            if _linked(given.get(each))
        ],
        "outputs": [
            {"name": each, "type": kind, "links": [], "slot_index": slot} for slot, (each, kind) in enumerate(outputs)
        ],
        "properties": {
            **({} if name in classes else CORE),
            "Node name for S&R": name,
            **({"models": models} if models else {}),
        },
        "widgets_values": widgets,
    }
    return {**node, "title": title} if title not in ("", titles.get(name, name)) else node


def _is_socket(kind: Any) -> bool:
    return isinstance(kind, str) and kind not in WIDGETS


def _linked(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _place(api: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> None:
    """Set each node's place, and its turn in a run. Of several columns in which it may stand, it takes the emptiest."""
    sources = {
        key: [value[0] for value in entry["inputs"].values() if _linked(value) and value[0] in api]
        for key, entry in api.items()
    }
    first: dict[str, int] = {}
    while len(first) < len(api):
        first |= {
            key: 1 + max((first[each] for each in sources[key]), default=-1)
            for key in api
            if key not in first and all(each in first for each in sources[key])
        }
    order = sorted(api, key=lambda key: (first[key], int(key)))
    last = max(max(first.values()) - 1, 0)
    column = {key: min(first[key], last) for key in order}
    latest = dict.fromkeys(order, last)
    for key in reversed(order):
        for each in sources[key]:
            latest[each] = max(column[each], min(latest[each], latest[key] - 1))
    bottoms = dict.fromkeys(range(last + 1), 0)
    for key in sorted(order, key=lambda key: (latest[key] > column[key], order.index(key))):
        chosen = min(range(column[key], latest[key] + 1), key=lambda each: (bottoms[each], each))
        node = nodes[key]
        node["pos"] = [chosen * (WIDTH + GAP), bottoms[chosen]]
        node["order"] = order.index(key)
        bottoms[chosen] += node["size"][1] + GAP


def main() -> None:
    package = ModuleType("paralleldit")
    package.__path__ = [str(PACK)]
    sys.modules["paralleldit"] = package
    nodes = importlib.import_module("paralleldit.nodes")

    known = nodes.NODE_CLASS_MAPPINGS, nodes.NODE_DISPLAY_NAME_MAPPINGS
    for path in sorted((PACK / "workflows" / "api").glob("*.api.json")):
        note = path.with_name(path.name.replace(".api.json", ".md")).read_text()
        _write("workflows", path, editor_workflow(json.loads(path.read_text()), note, *known))
    for path in sorted((PACK / "subgraphs" / "api").glob("*.api.json")):
        name = path.name.removesuffix(".api.json")
        _write("subgraphs", path, blueprint(name, json.loads(path.read_text()), *known))


def _write(folder: str, source: Path, editor: dict[str, Any]) -> None:
    target = PACK / folder / source.name.replace(".api.json", ".json")
    target.write_text(json.dumps(editor, indent=2) + "\n")
    print(target.relative_to(PACK))


if __name__ == "__main__":
    main()
