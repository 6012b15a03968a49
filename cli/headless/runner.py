"""Executes a checked workflow, node after node; what needs no ranks that sample may be done later, or meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...parallel_backend.errors import UserError
from .workflow import Link, Node, NodeClasses, Workflow

Outputs = dict[str, tuple[Any, ...]]
OnNode = Callable[[Node], None]
OnShown = Callable[[dict[str, Any]], None]


def begin_workflow(
    api: Mapping[str, Any],
    *,
    classes: NodeClasses,
    set_values: Mapping[str, str] | None = None,
    on_node: OnNode = lambda node: None,
    cache: dict[str, tuple[Any, ...]] | None = None,
) -> WorkflowRun:
    """Runs an API-format workflow but for the nodes that work aside, and those that need them: `finish` runs these.

    A node works aside when it is given an object that says so (`works_aside`), such as a VAE with ranks of its own.

    `set_values` maps NODE.INPUT to a text. With a `cache` a second run does not repeat the nodes whose inputs are the
    same. Raises `UserError` naming the node at fault, before anything runs where that can be known.
    """
    workflow = Workflow(api, classes)
    for place, text in (set_values or {}).items():
        workflow.set(place, text)
    workflow.check()
    run = WorkflowRun(workflow, on_node, {} if cache is None else cache)
    run.begin()
    return run


class WorkflowRun:
    def __init__(self, workflow: Workflow, on_node: OnNode, cache: dict[str, tuple[Any, ...]]) -> None:
        self._workflow = workflow
        self._on_node = on_node
        self._cache = cache
        self._signatures: dict[str, str] = {}
        self._outputs: Outputs = {}
        self._shown: dict[str, Any] = {}
        self._left: list[Node] = []

    def begin(self) -> None:
        for node in self._workflow.order():
            if self._is_aside(node):
                self._left.append(node)
            else:
                self._run(node)

    def finish(self) -> tuple[Outputs, dict[str, Any]]:
        """Finishes the run; call it once, in any thread. Meanwhile the ranks that sample may take the next workflow."""
        for node in self._left:
            self._run(node)
        return self._outputs, self._shown

    def _is_aside(self, node: Node) -> bool:
        later = {each.key for each in self._left}
        if any(link.node in later for link in node.links):
            return True
        return any(getattr(self._outputs[link.node][link.slot], "works_aside", False) for link in node.links)

    def _run(self, node: Node) -> None:
        signature = self._signatures[node.key] = _signature(node, self._signatures)
        if signature not in self._cache or node.is_output or hasattr(node.node_class, "IS_CHANGED"):
            self._on_node(node)
            self._cache[signature], ui = _execute(node, self._outputs, self._workflow.api)
            if ui:
                self._shown[node.key] = ui
        self._outputs[node.key] = self._cache[signature]


def finish_meanwhile(runs: Iterator[tuple[WorkflowRun, OnShown]]) -> None:
    """Finishes each run, in turn and in another thread, while `runs` begins the next one; then reports its pictures.

    At most one run is unfinished while another begins. An error of one does not wait for the other.
    """
    finisher = ThreadPoolExecutor(1, "finisher")
    try:
        unfinished = None
        for run, on_shown in runs:
            if unfinished:
                unfinished.result()
            unfinished = finisher.submit(_finish, run, on_shown)
        if unfinished:
            unfinished.result()
    finally:
        finisher.shutdown(wait=False)


def _finish(run: WorkflowRun, on_shown: OnShown) -> None:
    on_shown(run.finish()[1])


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
