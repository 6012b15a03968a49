"""Parallel Status and Parallel Unload."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..parallel_backend.protocol.messages import Status, Welcome
from . import host
from .session import session

ANYTHING = "MODEL,CONDITIONING,LATENT,IMAGE,VAE,STRING"
AFTER = (ANYTHING, {"tooltip": "Any output, to run this node after the one that makes it."})
NOT_RUNNING = "The sidecar is not running."


class ParallelDiTStatus:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "gpu status",
        "memory usage",
        "vram",
        "distributed status",
    )
    DESCRIPTION = "Shows the ranks, what they hold and what they have sent. Does not start the sidecar."
    RETURN_TYPES = ("STRING",)
    OUTPUT_TOOLTIPS = ("The status as text.",)
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": {"after": AFTER}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")

    def report(self, after: Any = None) -> dict[str, Any]:
        lines: list[str] = []
        if visited := session.visit(Status(id=0)):
            lines += _lines(*visited)
        if visited := session.visit(Status(id=0), vae=True):
            lines += ["The VAE's own:", *_lines(*visited)]
        text = "\n".join(lines) or NOT_RUNNING
        host.current().show(text)
        return {"ui": {"text": [text]}, "result": (text,)}


class ParallelDiTUnload:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "free memory",
        "unload models",
        "unload",
        "clear vram",
        "free vram",
    )
    DESCRIPTION = "Frees the memory that the ranks hold for models. The next run loads again."
    RETURN_TYPES = (ANYTHING,)
    RETURN_NAMES = ("after",)
    OUTPUT_TOOLTIPS = ("The input, unchanged.",)
    FUNCTION = "unload"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": {"after": AFTER}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")

    def unload(self, after: Any = None) -> dict[str, Any]:
        text = session.unload() or NOT_RUNNING
        host.current().show(text)
        return {"ui": {"text": [text]}, "result": (after,)}


def _lines(welcome: Welcome, data: dict[str, Any]) -> Iterator[str]:
    yield f"{welcome.ranks} ranks on {welcome.device}, up for {data['uptime_s']:.0f} s"
    for model in data["models"]:
        yield f"{model['kind']} {model['path']}: {model['bytes'] / 1e9:.2f} GB"
    for rank in data["ranks"]:
        memory = ", ".join(f"{size / 1e9:.1f} GB {what}" for what, size in rank["memory"].items())
        yield f"rank {rank['rank']} on {rank['host']}: {memory}"
    for layout, operations in data["traffic"].items():
        for operation, sent in operations.items():
            yield f"sent in layout {layout}: {operation} {sent['bytes'] / 1e6:.1f} MB in {sent['messages']} messages"
