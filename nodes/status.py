"""Parallel Status and Parallel Unload."""

from __future__ import annotations

import json
from typing import Any

from ..parallel_backend.protocol.messages import Status, Unload
from . import host, session

ANYTHING = "MODEL,CONDITIONING,LATENT,IMAGE,VAE,STRING"
AFTER = (ANYTHING, {"tooltip": "Any output, to run this node after the one that makes it."})
NOT_RUNNING = "The sidecar is not running."


class ParallelDiTStatus:
    CATEGORY = "ParallelDiT"
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
        text = NOT_RUNNING
        if session.running() is not None:
            client = session.client_for(None)
            data = session.ask(client, Status(id=0)).result.data
            text = "\n".join(
                [
                    f"{client.welcome.ranks} ranks on {client.welcome.device}",
                    *(f"{k}: {_shown(v)}" for k, v in data.items()),
                ]
            )
        host.current().show(text)
        return {"ui": {"text": [text]}, "result": (text,)}


class ParallelDiTUnload:
    CATEGORY = "ParallelDiT"
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
        text = NOT_RUNNING
        if session.running() is not None:
            freed = session.ask(session.client_for(None), Unload(id=0)).result.data["freed_bytes"]
            text = f"freed bytes per rank: {_shown(freed)}"
        host.current().show(text)
        return {"ui": {"text": [text]}, "result": (after,)}


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
