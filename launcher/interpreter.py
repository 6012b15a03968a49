"""The Python of the ranks, which finds what the host's finds.

Options of the host's interpreter (`-I`, `-E`, `-s`), a relative PYTHONPATH and what a start script put into `sys.path`
would be lost on the way to a new process. So the ranks are given the host's path itself, by `worker/bootstrap.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .devices import PACK

BOOTSTRAP = PACK / "parallel_backend" / "worker" / "bootstrap.py"
PATH_VARIABLE = "PARALLELDIT_PATH"
OTHER_PACKS = "custom_nodes"
"""ComfyUI's folder of packs, which put places of their own into the host's path. The ranks need none of them."""


def command(python: str, module: str, *arguments: str) -> list[str]:
    """Runs a module of the pack with `python`, as the host runs where it is the host's own."""
    return [python, *(_options() if python == sys.executable else ()), "-u", str(BOOTSTRAP), module, *arguments]


def environment(base: Mapping[str, str], python: str) -> dict[str, str]:
    """`base`, with the path for `command`, and in PYTHONPATH what of it processes of others (compilers) can read."""
    own = _places(sys.path) if python == sys.executable else []
    given = [] if python == sys.executable and sys.flags.ignore_environment else _given(base)
    readable = [place for place in (str(PACK), *given) if os.pathsep not in place]
    return {**base, PATH_VARIABLE: json.dumps([str(PACK), *own]), "PYTHONPATH": os.pathsep.join(readable)}


def _options() -> list[str]:
    if sys.flags.isolated:
        return ["-I"]
    return ["-E"] * sys.flags.ignore_environment + ["-s"] * sys.flags.no_user_site


def _given(base: Mapping[str, str]) -> list[str]:
    return _places(filter(None, base.get("PYTHONPATH", "").split(os.pathsep)))


def _places(entries: Sequence[str] | filter[str]) -> list[str]:
    """As absolute paths: the ranks work in another folder."""
    places = [Path(os.path.abspath(entry)) for entry in entries]
    own = (PACK, Path(sys.prefix), Path(sys.base_prefix))
    kept = [place for place in places if OTHER_PACKS not in place.parts or any(map(place.is_relative_to, own))]
    return list(dict.fromkeys(map(str, kept)))
