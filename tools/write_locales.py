"""Writes locales/en/nodeDefs.json from what the nodes declare: `python tools/write_locales.py`.

The other languages are written by hand; what they lack is printed.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

PACK = Path(__file__).resolve().parent.parent
LOCALES = PACK / "locales"
FILE = "nodeDefs.json"
GROUPS = ("required", "optional")


def english(classes: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    """The nodes' own words, in the shape in which ComfyUI reads translations."""
    return {name: _node(node_class, titles[name]) for name, node_class in classes.items()}


def lacks(own: Mapping[str, Any], table: Mapping[str, Any]) -> Iterator[str]:
    """The places of `own` (of `english`) that a translation lacks, and those that it has beyond them.

    A translation also names the inputs, which in English are called as in workflows.
    """
    wanted = {f"{place}.name" for place in _inputs(own)} | set(flat(own))
    yield from (f"lacks {place}" for place in sorted(wanted - set(flat(table))))
    yield from (f"has {place}, which no node has" for place in sorted(set(flat(table)) - wanted))


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every text under its place, as in "ParallelDiTLayout.inputs.ranks.tooltip"."""
    found = {}
    for name, value in table.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _node(node_class: Any, title: str) -> dict[str, Any]:
    groups = node_class.INPUT_TYPES()
    inputs = {name: spec[1]["tooltip"] for group in GROUPS for name, spec in groups.get(group, {}).items()}
    outputs = {str(slot): tooltip for slot, tooltip in enumerate(node_class.OUTPUT_TOOLTIPS)}
    return {
        "display_name": title,
        "description": node_class.DESCRIPTION,
        "inputs": {name: {"tooltip": tooltip} for name, tooltip in inputs.items()},
        "outputs": {slot: {"tooltip": tooltip} for slot, tooltip in outputs.items()},
    }


def _inputs(own: Mapping[str, Any]) -> Iterator[str]:
    for name, node in own.items():
        yield from (f"{name}.inputs.{each}" for each in node["inputs"])


def main() -> int:
    package = ModuleType("paralleldit")
    package.__path__ = [str(PACK)]
    sys.modules["paralleldit"] = package
    nodes = importlib.import_module("paralleldit.nodes")

    own = english(nodes.NODE_CLASS_MAPPINGS, nodes.NODE_DISPLAY_NAME_MAPPINGS)
    (LOCALES / "en" / FILE).write_text(json.dumps(own, indent=2, ensure_ascii=False) + "\n")
    found = [
        f"{path.relative_to(PACK)} {lack}"
        for path in sorted(LOCALES.glob(f"*/{FILE}"))
        if path.parent.name != "en"
        for lack in lacks(own, json.loads(path.read_text()))
    ]
    for each in found:
        print(each)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
