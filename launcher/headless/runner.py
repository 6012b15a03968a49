"""Executes a checked workflow, node after node."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ...parallel_backend.errors import UserError
from .workflow import Link, Node, NodeClasses, Workflow

Outputs = dict[str, tuple[Any, ...]]
OnNode = Callable[[Node], None]


def run_workflow(
    api: Mapping[str, Any],
    *,
    classes: NodeClasses,
    set_values: Mapping[str, str] | None = None,
    on_node: OnNode = lambda node: None,
    cache: dict[str, tuple[Any, ...]] | None = None,
) -> tuple[Outputs, dict[str, Any]]:
    """Runs an API-format workflow: every node's outputs by node id, and what its output nodes show (`ui`) likewise.

    `set_values` maps NODE.INPUT to a text. With a `cache` a second run does not repeat the nodes whose inputs are the
    same. Raises `UserError` naming the node at fault, before anything runs where that can be known.
    """
    workflow = Workflow(api, classes)
    for place, text in (set_values or {}).items():
        workflow.set(place, text)
    workflow.check()
    outputs: Outputs = {}
    shown: dict[str, Any] = {}
    signatures: dict[str, str] = {}
    cache = {} if cache is None else cache
    for node in workflow.order():
        signature = signatures[node.key] = _signature(node, signatures)
        if signature not in cache or node.is_output or hasattr(node.node_class, "IS_CHANGED"):
            on_node(node)
            cache[signature], ui = _execute(node, outputs, workflow.api)
            if ui:
                shown[node.key] = ui
        outputs[node.key] = cache[signature]
    return outputs, shown


def _signature(node: Node, signatures: Mapping[str, str]) -> str:
    inputs = {
        name: [signatures[value.node], value.slot] if isinstance(value, Link) else {"value": value}
        for name, value in node.inputs.items()
    }
    return json.dumps([node.type, inputs], sort_keys=True)


def _execute(node: Node, outputs: Outputs, api: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = {"PROMPT": api, "EXTRA_PNGINFO": None, "UNIQUE_ID": node.key}
    inputs = {
        name: outputs[value.node][value.slot] if isinstance(value, Link) else value
        for name, value in node.inputs.items()
    }
    inputs |= {name: hidden.get(kind) for name, kind in node.hidden.items()}
    function = getattr(node.node_class(), node.node_class.FUNCTION)  # type: ignore[attr-defined]
    try:
        answer = function(**inputs)
    except UserError as error:
        raise UserError(f"{node}: {error.message}", error.hint) from error
    if isinstance(answer, dict):
        return tuple(answer.get("result", ())), answer.get("ui", {})
    return tuple(answer), {}
