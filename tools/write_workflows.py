"""Write workflows/NAME.json, which ComfyUI's editor opens, from workflows/api/NAME.api.json, which its queue takes.

    python tools/write_workflows.py

The API file is the one to edit. Nodes stand in columns by how far they are from the start, one below the other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PACK = Path(__file__).resolve().parents[1]
WIDTH, GAP, TITLE, ROW, TEXT, PICTURE = 320, 40, 40, 26, 140, 300
"""Sizes on the canvas: a node's width, the space between nodes, its title, a row of a node, a text box, a picture."""
CONTROL = "control_after_generate"
SHOWS_PICTURE = ("LoadImage", "SaveImage", "SaveAnimatedWEBP", "PreviewImage")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
HOST = {
    "CLIPLoader": (("CLIP",), {}),
    "DualCLIPLoader": (("CLIP",), {}),
    "CLIPTextEncode": (("CONDITIONING",), {"clip": "CLIP"}),
    "FluxGuidance": (("CONDITIONING",), {"conditioning": "CONDITIONING"}),
    "LoraLoaderModelOnly": (("MODEL",), {"model": "MODEL"}),
    "LoadImage": (("IMAGE", "MASK"), {}),
    "SaveImage": ((), {"images": "IMAGE"}),
    "SaveAnimatedWEBP": ((), {"images": "IMAGE"}),
    "EmptySD3LatentImage": (("LATENT",), {}),
    "EmptyHunyuanLatentVideo": (("LATENT",), {}),
}
"""ComfyUI's own nodes: the types of their outputs, and of their inputs that are no widgets."""


def editor_workflow(api: dict[str, Any], classes: dict[str, type], titles: dict[str, str]) -> dict[str, Any]:
    """A workflow in the editor's format, of one in the API format. `classes`, `titles`: the pack's nodes by id."""
    links: list[list[Any]] = []
    nodes = {key: _node(key, entry, classes, titles) for key, entry in api.items()}
    for key, entry in api.items():
        for slot in nodes[key]["inputs"]:
            source, output = entry["inputs"][slot["name"]]
            given = nodes[source]["outputs"][output]
            slot["link"] = len(links) + 1
            given["links"].append(slot["link"])
            links.append([slot["link"], int(source), output, int(key), nodes[key]["inputs"].index(slot), given["type"]])
            slot["type"] = given["type"] if slot["type"] == "*" else slot["type"]
    _place(api, nodes)
    return {
        "revision": 0,
        "last_node_id": max(map(int, api)),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


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
        "properties": {"Node name for S&R": name},
        "widgets_values": widgets,
    }
    return {**node, "title": title} if title not in ("", titles.get(name, name)) else node


def _is_socket(kind: Any) -> bool:
    return isinstance(kind, str) and kind not in WIDGETS


def _linked(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _place(api: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> None:
    """Set each node's place, and its turn in a run."""
    depths: dict[str, int] = {}

    def depth(key: str) -> int:
        if key not in depths:
            sources = [value[0] for value in api[key]["inputs"].values() if _linked(value)]
            depths[key] = 1 + max(map(depth, sources)) if sources else 0
        return depths[key]

    bottoms: dict[int, int] = {}
    for order, key in enumerate(sorted(api, key=lambda key: (depth(key), int(key)))):
        column = depth(key)
        node = nodes[key]
        node["pos"] = [column * (WIDTH + GAP), bottoms.get(column, 0)]
        node["order"] = order
        bottoms[column] = node["pos"][1] + node["size"][1] + GAP


def main() -> None:
    package = ModuleType("paralleldit")
    package.__path__ = [str(PACK)]
    sys.modules["paralleldit"] = package
    from paralleldit.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    for path in sorted((PACK / "workflows" / "api").glob("*.api.json")):
        target = PACK / "workflows" / path.name.replace(".api.json", ".json")
        editor = editor_workflow(json.loads(path.read_text()), NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS)
        target.write_text(json.dumps(editor, indent=2) + "\n")
        print(target.relative_to(PACK))


if __name__ == "__main__":
    main()
