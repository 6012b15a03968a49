"""An API-format workflow: reading it, changing its inputs, and checking it before anything runs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...parallel_backend.errors import UserError

NodeClasses = Mapping[str, type]
WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Link:
    """Another node's output."""

    node: str
    slot: int


@dataclass(frozen=True)
class Input:
    """One input as INPUT_TYPES declares it. `type` is a name, or the list of a menu's options."""

    name: str
    type: str | list[Any]
    options: dict[str, Any]
    required: bool

    @property
    def is_widget(self) -> bool:
        return isinstance(self.type, list) or self.type in WIDGETS


class Node:
    def __init__(self, key: str, entry: Mapping[str, Any], node_class: type) -> None:
        self.key = key
        self.node_class = node_class
        self.type: str = entry["class_type"]
        title = entry["_meta"].get("title") if isinstance(entry.get("_meta"), dict) else None
        self.title = title if isinstance(title, str) else self.type
        declared = node_class.INPUT_TYPES()  # type: ignore[attr-defined]
        self.declared = {
            name: Input(name, spec[0], spec[1] if len(spec) > 1 else {}, group == "required")
            for group in ("required", "optional")
            for name, spec in declared.get(group, {}).items()
        }
        self.hidden: dict[str, str] = declared.get("hidden", {})
        # ComfyUI too leaves aside what a node does not declare: buttons, widgets of other packs.
        self.inputs = {name: _read(value) for name, value in entry["inputs"].items() if name in self.declared}

    def __str__(self) -> str:
        return f"node {self.key} ({self.title})"

    @property
    def links(self) -> list[Link]:
        return [value for value in self.inputs.values() if isinstance(value, Link)]

    @property
    def is_output(self) -> bool:
        return getattr(self.node_class, "OUTPUT_NODE", False)


class Workflow:
    """Raises `UserError` for what is not an API-format workflow, and for nodes that `classes` does not hold."""

    def __init__(self, api: Mapping[str, Any], classes: NodeClasses) -> None:
        self.api = copy.deepcopy(dict(api))
        _check_format(self.api)
        unknown = sorted({entry["class_type"] for entry in self.api.values()} - set(classes))
        if unknown:
            raise UserError(
                f"This workflow has nodes that can only run in ComfyUI: {', '.join(unknown)}.",
                f"Queue it in ComfyUI, the pack's host. Without ComfyUI these run: {', '.join(sorted(classes))}.",
            )
        self.nodes = {key: Node(key, entry, classes[entry["class_type"]]) for key, entry in self.api.items()}

    def find(self, name: str) -> Node:
        """A node by id, title or type. Raises `UserError` when there is none or more than one."""
        if name in self.nodes:
            return self.nodes[name]
        found = [node for node in self.nodes.values() if name in (node.title, node.type)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"{len(found)} nodes are called {name!r}.", f"Use an id: {', '.join(node.key for node in found)}."
            )
        raise UserError(f"No node has the id or title {name!r}.", f"There are: {_listed(self.nodes.values())}.")

    def set(self, place: str, text: str) -> None:
        """Sets the widget at `place` (NODE.INPUT) to `text`, read as the type that the input has."""
        name, dot, input_name = place.rpartition(".")
        if not dot:
            raise UserError(f"{place!r} is not of the form NODE.INPUT.")
        node = self.find(name)
        declared = node.declared.get(input_name)
        if declared is None or not declared.is_widget:
            widgets = ", ".join(each.name for each in node.declared.values() if each.is_widget)
            raise UserError(f"{node} has no value {input_name!r} to set.", f"It has: {widgets or 'none'}.")
        value = _parse(text, declared, node)
        node.inputs[input_name] = value
        self.api[node.key]["inputs"][input_name] = value

    def order(self) -> list[Node]:
        """The nodes that the outputs need, each after those it takes from. Raises `UserError` for a cycle."""
        outputs = [node for node in self.nodes.values() if node.is_output]
        if not outputs:
            raise UserError("This workflow has no output.", "Add a SaveImage or PreviewImage node.")
        done: dict[str, Node] = {}
        for output in outputs:
            self._visit(output, done, ())
        return list(done.values())

    def _visit(self, node: Node, done: dict[str, Node], path: tuple[str, ...]) -> None:
        if node.key in path:
            cycle = [*path[path.index(node.key) :], node.key]
            raise UserError(f"The workflow's links form a circle: {' -> '.join(cycle)}.", "Remove one of them.")
        if node.key in done:
            return
        for link in node.links:
            if link.node not in self.nodes:
                raise UserError(f"{node} takes an output of node {link.node}, which is not in the workflow.")
            self._visit(self.nodes[link.node], done, (*path, node.key))
        done[node.key] = node

    def check(self) -> None:
        """Raises `UserError` for the first fault in the nodes that will run."""
        for node in self.order():
            _check_required(node)
            for name, value in node.inputs.items():
                if isinstance(value, Link):
                    self._check_link(node, node.declared[name], value)
                else:
                    node.inputs[name] = _checked_value(node, node.declared[name], value)
            _ask_node(node)

    def _check_link(self, node: Node, declared: Input, link: Link) -> None:
        source = self.nodes[link.node]
        given: tuple[str, ...] = source.node_class.RETURN_TYPES  # type: ignore[attr-defined]
        if link.slot >= len(given):
            raise UserError(f"{node} takes output {link.slot} of {source}, which has {len(given)}.")
        wanted = "STRING,COMBO" if isinstance(declared.type, list) else declared.type
        if not _types(given[link.slot]) & _types(wanted):
            raise UserError(f"{node}: {declared.name} takes {wanted}, but {source} gives {given[link.slot]}.")


def _types(names: str) -> set[str]:
    return {name.strip() for name in names.split(",")}


def _read(value: Any) -> Any:
    match value:
        case [str(node), int(slot)] if not isinstance(slot, bool):
            return Link(node, slot)
        case {"__value__": list(plain)}:  # how ComfyUI writes a list that is no link
            return plain
    return value


def _check_format(api: Mapping[str, Any]) -> None:
    if isinstance(api.get("nodes"), list):
        raise UserError(
            "This is a workflow in ComfyUI's editor format.", "Give its API format: Workflow > Export (API) in ComfyUI."
        )
    well_formed = all(
        isinstance(entry, dict) and isinstance(entry.get("class_type"), str) and isinstance(entry.get("inputs"), dict)
        for entry in api.values()
    )
    if not api or not well_formed:
        raise UserError("This is not a workflow in ComfyUI's API format.", "It maps node ids to class_type and inputs.")


def _check_required(node: Node) -> None:
    missing = [each.name for each in node.declared.values() if each.required and each.name not in node.inputs]
    if missing:
        raise UserError(f"{node} needs its input {missing[0]!r}.")


def _checked_value(node: Node, declared: Input, value: Any) -> Any:
    if not declared.is_widget:
        raise UserError(f"{node}: {declared.name} takes the output of another node ({declared.type}), not {value!r}.")
    checks_itself = declared.name in _validated_names(node)
    if isinstance(declared.type, list):
        if not checks_itself and value not in declared.type:
            raise UserError(
                f"{node}: {declared.name} cannot be {value!r}.", f"It can be: {', '.join(map(str, declared.type))}."
            )
        return value
    try:
        value = WIDGETS[declared.type](value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{node}: {declared.name} takes a value of type {declared.type}, not {value!r}.") from error
    for bound, is_outside in (("min", lambda low: value < low), ("max", lambda high: value > high)):
        limit = declared.options.get(bound)
        if limit is not None and not checks_itself and is_outside(limit):
            raise UserError(f"{node}: {declared.name}={value} is beyond its {bound}imum of {limit}.")
    return value


def _validated_names(node: Node) -> list[str]:
    validate = getattr(node.node_class, "VALIDATE_INPUTS", None)
    if validate is None:
        return []
    taken = inspect.getfullargspec(validate)
    return list(node.inputs) if taken.varkw else taken.args[1:]


def _ask_node(node: Node) -> None:
    names = _validated_names(node)
    if not names:
        return
    given = {name: None if isinstance(value, Link) else value for name, value in node.inputs.items() if name in names}
    try:
        answer = node.node_class.VALIDATE_INPUTS(**given)  # type: ignore[attr-defined]
    except UserError as error:
        raise UserError(f"{node}: {error.message}", error.hint) from error
    if answer is not True:
        raise UserError(f"{node}: {answer}")


def _parse(text: str, declared: Input, node: Node) -> Any:
    if isinstance(declared.type, list):
        return next((option for option in declared.type if str(option) == text), text)
    try:
        return TRUTH[text.lower()] if declared.type == "BOOLEAN" else WIDGETS[declared.type](text)
    except (KeyError, ValueError) as error:
        raise UserError(f"{node}: {declared.name} takes a value of type {declared.type}, not {text!r}.") from error


def _listed(nodes: Iterable[Node]) -> str:
    return ", ".join(f"{node.key} ({node.title})" for node in nodes)
