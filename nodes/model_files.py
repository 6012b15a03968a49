"""Names of models in a list, and the files and folders behind them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..parallel_backend.errors import UserError
from ..parallel_backend.files.checkpoint import is_weights
from ..parallel_backend.files.safetensors import UNREAD_SUFFIXES
from . import host

PACK = Path(__file__).resolve().parent.parent
BUNDLED = "demo_model"
"""Folder of the pack that holds the pipelines which come with it."""
BUNDLED_FILES = {"loras": "lora-", "controlnet": "controlnet-", "ipadapter": "ip-adapter-"}
"""How the folders begin that hold files of a kind which come with the pack."""
DIFFUSERS = "diffusers"
PIPELINE = "model_index.json"


def names(*kinds: str) -> list[str]:
    """What a loader's list shows: files of `kinds`, then pipeline folders (`diffusers/NAME`), then the bundled ones.

    A name that stands in the folders of two kinds is shown with the later one's folder too (`checkpoints/NAME`). A
    pipeline folder holds none of the kinds in `BUNDLED_FILES`.
    """
    return list(_known(kinds))


def resolve(name: str, kinds: Sequence[str], what: str) -> Path:
    """The path behind `name`, which may have been written on Windows.

    Raises `UserError` naming what was looked for and where, or for a path that cannot be sent to the ranks.
    """
    known = _known(kinds)
    for written in (name, name.replace("\\", "/")):
        if written in known:
            return _sendable(known[written].absolute())
    if host.current().takes_paths:
        for base in (Path.cwd(), PACK):
            path = base / Path(name).expanduser()
            if name and path.exists():
                return _sendable(path.resolve())
    if what_it_is := UNREAD_SUFFIXES.get(Path(name).suffix.lower()):
        raise UserError(f"{what} {name!r} is {what_it_is[0]} by its name, not a safetensors file.", what_it_is[1])
    listed = list(known)
    choice = f"Choose one of: {', '.join(listed[:12])}{' …' if len(listed) > 12 else ''}."
    folders = ", ".join((*kinds, *(() if _are_bundled(kinds) else (DIFFUSERS,))))
    raise UserError(
        f"{what} {name!r} was not found.",
        choice if listed else f"Put it into one of these folders of models: {folders}.",
    )


def _known(kinds: Sequence[str]) -> dict[str, Path]:
    """{name: path} of all that may be chosen, in the order of a list."""
    here, known = host.current(), {}
    for kind in kinds:
        own: dict[str, Path] = {}
        for folder in here.folders(kind):
            for path in _files(folder):
                if is_weights(path):
                    own.setdefault(path.relative_to(folder).as_posix(), path)
        known |= {f"{kind}/{name}" if name in known else name: path for name, path in own.items()}
    for name, path in _bundled_files(kinds) if _are_bundled(kinds) else _pipelines():
        known.setdefault(name, path)
    return known


def _are_bundled(kinds: Sequence[str]) -> bool:
    return any(kind in BUNDLED_FILES for kind in kinds)


def _bundled_files(kinds: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for path in _files(PACK / BUNDLED):
        name = path.relative_to(PACK / BUNDLED)
        if is_weights(path) and name.parts[0].startswith(tuple(BUNDLED_FILES[kind] for kind in kinds)):
            yield f"{BUNDLED}/{name.as_posix()}", path


def _pipelines() -> Iterator[tuple[str, Path]]:
    folders = host.current().folders(DIFFUSERS)
    for folder, prefix in (*((folder, DIFFUSERS) for folder in folders), (PACK / BUNDLED, BUNDLED)):
        for path in _files(folder):
            if path.name == PIPELINE and path.parent != folder:
                yield f"{prefix}/{path.parent.relative_to(folder).as_posix()}", path.parent


def _files(folder: Path) -> Iterator[Path]:
    """All files below `folder`, through links to other folders too: models are often on another disk.

    A link to what is listed anyway, or to where the walk came from, is not followed.
    """
    root = folder.resolve()
    came_through = {str(folder): frozenset({root})}
    for place, folders, files in os.walk(folder, followlinks=True):
        above, followed = came_through.pop(place), []
        for path in (Path(place, name) for name in sorted(folders)):
            target = path.resolve()
            is_elsewhere = target != root / path.relative_to(folder)
            if target in above or (is_elsewhere and target.is_relative_to(root)):
                continue
            came_through[str(path)] = above | {target}
            followed.append(path.name)
        folders[:] = followed
        yield from (Path(place, file) for file in sorted(files))


def _sendable(path: Path) -> Path:
    """Raises `UserError` for a path that is no text."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The path {str(path)!r} is not in UTF-8, so that it cannot be sent to the ranks.", "Rename the file."
        ) from error
    return path
