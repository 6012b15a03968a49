"""Names of models in a list, and the files and folders behind them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..parallel_backend.errors import UserError
from . import host

PACK = Path(__file__).resolve().parent.parent
BUNDLED = "demo_model"
"""Folder of the pack that holds the pipelines which come with it."""
BUNDLED_FILES = {"loras": "lora-", "controlnet": "controlnet-", "ipadapter": "ip-adapter-"}
"""How the folders begin that hold files of a kind which come with the pack."""
DIFFUSERS = "diffusers"
WEIGHTS = (".safetensors", ".sft")
PIPELINE = "model_index.json"


def names(kind: str | None) -> list[str]:
    """What a loader's list shows: files of `kind`, then pipeline folders (`diffusers/NAME`), then the bundled ones.

    A pipeline folder holds none of the kinds in `BUNDLED_FILES`.
    """
    return list(dict.fromkeys(name for name, _ in _known(kind)))


def resolve(name: str, kind: str | None, what: str) -> Path:
    """The path behind `name`. Raises `UserError` naming what was looked for and where."""
    for known, path in _known(kind):
        if known == name:
            return path.absolute()
    if host.current().takes_paths:
        for base in (Path.cwd(), PACK):
            path = base / Path(name).expanduser()
            if name and path.exists():
                return path.resolve()
    listed = names(kind)
    choice = f"Choose one of: {', '.join(listed[:12])}{' …' if len(listed) > 12 else ''}."
    folders = ", ".join(filter(None, (kind, None if kind in BUNDLED_FILES else DIFFUSERS)))
    raise UserError(
        f"{what} {name!r} was not found.",
        choice if listed else f"Put it into one of these folders of models: {folders}.",
    )


def _known(kind: str | None) -> Iterator[tuple[str, Path]]:
    here = host.current()
    for folder in here.folders(kind) if kind else ():
        for path in _files(folder):
            if path.suffix in WEIGHTS:
                yield path.relative_to(folder).as_posix(), path
    if kind in BUNDLED_FILES:
        for path in _files(PACK / BUNDLED):
            name = path.relative_to(PACK / BUNDLED)
            if path.suffix in WEIGHTS and name.parts[0].startswith(BUNDLED_FILES[kind]):
                yield f"{BUNDLED}/{name.as_posix()}", path
        return
    for folder, prefix in (*((folder, DIFFUSERS) for folder in here.folders(DIFFUSERS)), (PACK / BUNDLED, BUNDLED)):
        for path in _files(folder):
            if path.name == PIPELINE and path.parent != folder:
                yield f"{prefix}/{path.parent.relative_to(folder).as_posix()}", path.parent


def _files(folder: Path) -> Iterator[Path]:
    """All files below `folder`, through links to other folders too: models are often on another disk."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        yield from (Path(place, file) for file in sorted(files))
