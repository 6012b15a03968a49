"""ComfyUI's own templates as workflows in API format.

A template is a graph of the front end: nodes and links, some nodes switched off, parts of it in subgraphs. Here are the
nodes that run, each with the inputs that the front end would send.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FROM_OUTSIDE, TO_OUTSIDE = -10, -20
"""The ends of a link at the border of a subgraph."""
NEVER, BYPASSED = 2, 4
"""Modes of a node that does not run. A bypassed one hands on its input of the output's type."""
NOTES = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")

Api = dict[str, dict[str, Any]]


def find_template(python: str, name: str) -> Path | None:
    """The template in the packages of that Python; None where they have none of the name."""
    packages = Path(python).absolute().parents[1].glob("lib/python*/site-packages")
    found = (path for folder in packages for path in folder.glob(f"comfyui_workflow_templates*/templates/{name}.json"))
    return next(found, None)


def to_api(template: Mapping[str, Any], known: Mapping[str, Any]) -> Api:
    """`template` in API format; `known`: the nodes of a running ComfyUI (`/object_info`).

    Raises `LookupError` for a node that it does not know.
    """
    definitions = {each["id"]: each for each in (template.get("definitions") or {}).get("subgraphs", ())}
    api = {}
    for graph, node in _Graph(template, "", definitions).nodes_that_run():
        if node["type"] not in known:
            raise LookupError(node["type"])
        inputs = _widget_values(node, known[node["type"]])
        for each in node.get("inputs") or ():
            source = graph.source(each.get("link"))
            if source is not None:
                inputs[each["name"]] = source.value
        api[f"{graph.prefix}{node['id']}"] = {"class_type": node["type"], "inputs": inputs}
    return api


@dataclass(frozen=True)
class _Source:
    """What an input gets: [node, output] of a node, or a number or text."""

    value: Any


class _Graph:
    """The whole graph, or the inside of one node that stands for a subgraph."""

    def __init__(
        self,
        graph: Mapping[str, Any],
        prefix: str,
        definitions: Mapping[str, Any],
        outside: tuple[_Graph, Mapping[str, Any]] | None = None,
    ) -> None:
        self.prefix, self._graph, self._outside = prefix, graph, outside
        self._nodes = {node["id"]: node for node in graph["nodes"]}
        self._links = {}
        for link in graph.get("links") or ():
            names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
            link = link if isinstance(link, dict) else dict(zip(names, link, strict=False))
            self._links[link["id"]] = link
        self._inside = {
            node["id"]: _Graph(definitions[node["type"]], f"{prefix}{node['id']}:", definitions, (self, node))
            for node in graph["nodes"]
            if node["type"] in definitions
        }

    def nodes_that_run(self) -> Iterator[tuple[_Graph, Mapping[str, Any]]]:
        """With the graph that each is in."""
        for node in self._graph["nodes"]:
            if node.get("mode", 0) in (NEVER, BYPASSED) or node["type"] in NOTES:
                continue
            if node["id"] in self._inside:
                yield from self._inside[node["id"]].nodes_that_run()
            else:
                yield self, node

    def source(self, link: int | None) -> _Source | None:
        """Where a link begins; None for one that begins nowhere."""
        if link is None or link not in self._links:
            return None
        origin, slot = self._links[link]["origin_id"], self._links[link]["origin_slot"]
        if origin == FROM_OUTSIDE:
            return self._from_outside(self._graph["inputs"][slot]["name"])
        node = self._nodes[origin]
        inputs = node.get("inputs") or []
        if node.get("mode", 0) == NEVER:
            return None
        if node.get("mode", 0) == BYPASSED:
            kind = node["outputs"][slot]["type"]
            handed = [each["link"] for each in inputs if each["type"] == kind and each.get("link") is not None]
            return self.source(handed[0]) if handed else None
        if node["type"] == "Reroute":
            return self.source(inputs[0].get("link"))
        if node["type"] == "PrimitiveNode":
            return _Source(node["widgets_values"][0])
        if origin in self._inside:
            inside = self._inside[origin]
            ends = (each for each in inside._links.values() if each["target_id"] == TO_OUTSIDE)
            return inside.source(next(each["id"] for each in ends if each["target_slot"] == slot))
        return _Source([f"{self.prefix}{origin}", slot])

    def _from_outside(self, name: str) -> _Source | None:
        assert self._outside
        outside, node = self._outside
        inputs = node.get("inputs") or []
        link = next((each.get("link") for each in inputs if each["name"] == name), None)
        if link is not None:
            return outside.source(link)
        shown = [each["name"] for each in inputs if each.get("widget")]
        values = node.get("widgets_values") or []
        return _Source(values[shown.index(name)]) if name in shown and shown.index(name) < len(values) else None


def _widget_values(node: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a node that its widgets give, in the order in which they stand."""
    inputs = {**known["input"].get("required", {}), **known["input"].get("optional", {})}
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return {name: value for name, value in values.items() if name in inputs}
    values, given = list(values), {}
    for name, (kind, *options) in inputs.items():
        settings = options[0] if options and isinstance(options[0], dict) else {}
        if not values or settings.get("forceInput") or not (isinstance(kind, list) or kind in WIDGETS):
            continue
        given[name] = values.pop(0)
        follows = settings.get("control_after_generate") and values and values[0] in AFTER_GENERATE
        if follows or (settings.get("image_upload") and values):
            values.pop(0)
    return given


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
