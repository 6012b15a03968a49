"""A checkpoint on disk, one file or many: header facts of every tensor, and views of the mapped files.

Files are mapped copy-on-write (MAP_PRIVATE): untouched pages are the page cache's own, so that all ranks of a host
share one copy; a write (a merged LoRA) copies only its pages and never reaches the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from ..errors import UserError
from .regular import open_regular
from .safetensors import Header, TensorInfo, read_header

SUFFIXES = (".safetensors", ".sft")
"""Of files of weights, in small letters; a name may have them in others."""
INDEX = re.compile(r".+\.safetensors\.index(\.\w+)?\.json", re.IGNORECASE)
WITHOUT_VARIANT = re.compile(r"[^.]+\.(safetensors(\.index\.json)?|sft)", re.IGNORECASE)
MODEL_FOLDERS = ("transformer", "unet")
"""Where pipelines have their model."""
SCHEDULER = "_scheduler"
"""Under this name the config of a pipeline's model has that of its scheduler, which says what the model predicts."""
MAX_JSON_BYTES = 64_000_000
EXPECTED = (
    "Expected a .safetensors file, a .safetensors.index.json, or a diffusers folder "
    "(with transformer/ or unet/, or itself with config.json and weights)."
)


@dataclass
class Checkpoint:
    """Keys, dtypes and shapes of all tensors under `source`; `config` is the folder's config.json if there is one."""

    source: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    files: tuple[Path, ...]
    _maps: dict[Path, torch.Tensor] = field(default_factory=dict, repr=False)

    def tensor(self, key: str) -> torch.Tensor:
        """View of the mapped file; slicing it (`tensor(k)[rows]`, `[:, columns]`) reads only the pages of the slice.

        A tensor that an unusual writer left unaligned to its element size cannot be viewed and is copied.
        """
        info = self.tensors[key]
        raw = self._mapped(info.file)[info.start : info.end]
        if info.start % info.dtype.itemsize:
            raw = raw.clone()
        return raw.view(info.dtype).view(info.shape)

    def bytes_under(self, prefixes: Iterable[str]) -> int:
        """How many bytes have the tensors under the first of `prefixes` that any has."""
        own = ([info for key, info in self.tensors.items() if key.startswith(prefix)] for prefix in prefixes)
        return sum(info.end - info.start for info in next(filter(None, own), []))

    def is_mapped(self, tensor: torch.Tensor) -> bool:
        """True if `tensor` aliases one of the mapped files (so its memory is shared with the other ranks)."""
        pointer = tensor.untyped_storage().data_ptr()
        return any(pointer == mapped.untyped_storage().data_ptr() for mapped in self._maps.values())

    def _mapped(self, file: Path) -> torch.Tensor:
        if file not in self._maps:
            size = max(info.end for info in self.tensors.values() if info.file == file)
            try:
                self._maps[file] = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
            except RuntimeError as error:
                raise UserError(f"Cannot map {file} ({size} bytes) into memory: {error}", _hint(str(error))) from error
        return self._maps[file]


def is_weights(file: PurePath) -> bool:
    """Whether its name is one of a file of weights, in whatever letters."""
    return file.suffix.lower() in SUFFIXES


def open_checkpoint(path: str | Path, *components: str) -> Checkpoint:
    """Opens a safetensors file, a sharded index, a diffusers pipeline folder or a component folder.

    `components`: which folder of the pipeline, the first that it has; by default its model's.

    Reads headers only. Raises UserError naming the file and what was expected.
    """
    path = Path(path)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"Cannot open {path}: {reason}. {EXPECTED}", "Check the path and its permissions.") from error
    if is_folder:
        return _open_folder(path, components or MODEL_FOLDERS)
    if INDEX.fullmatch(path.name):
        return _open_index(path, None)
    return _from_headers(path, {path: read_header(path)}, None)


def _open_folder(folder: Path, components: Sequence[str]) -> Checkpoint:
    weights_folder = next((folder / name for name in components if (folder / name).is_dir()), folder)
    config = read_json(weights_folder / "config.json") if (weights_folder / "config.json").exists() else None
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if config is not None and weights_folder.name in MODEL_FOLDERS and scheduler.is_file():
        config[SCHEDULER] = read_json(scheduler)
    weights = _weights_file(weights_folder)
    if INDEX.fullmatch(weights.name):
        return _open_index(weights, config)
    return _from_headers(weights, {weights: read_header(weights)}, config)


def _weights_file(folder: Path) -> Path:
    """The one index or weights file of a component folder; without a variant in its name where there are several."""
    files = sorted(folder.iterdir())
    indexes = [file for file in files if INDEX.fullmatch(file.name)]
    shards = {shard for index in indexes for shard in _weight_map(index).values()}
    candidates = [*indexes, *(file for file in files if is_weights(file) and file.name not in shards)]
    candidates = [file for file in candidates if WITHOUT_VARIANT.fullmatch(file.name)] or candidates
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        names = sorted(entry.name for entry in folder.iterdir())[:8]
        raise UserError(f"No safetensors weights in {folder} (it holds: {', '.join(names) or 'nothing'}). {EXPECTED}")
    names = ", ".join(file.name for file in candidates[:8])
    raise UserError(f"{folder} holds {len(candidates)} sets of weights ({names}).", "Choose one by its own path.")


def _open_index(index: Path, config: dict[str, Any] | None) -> Checkpoint:
    weight_map = _weight_map(index)
    if config is None and (index.parent / "config.json").exists():
        config = read_json(index.parent / "config.json")
    headers = {index.parent / shard: read_header(index.parent / shard) for shard in sorted(set(weight_map.values()))}
    checkpoint = _from_headers(index, headers, config)
    strays = [
        key
        for key in weight_map.keys() | checkpoint.tensors.keys()
        if key not in checkpoint.tensors or checkpoint.tensors[key].file.name != weight_map.get(key)
    ]
    if strays:
        raise UserError(
            f"{index} and its {len(headers)} shards disagree on {len(strays)} tensors, e.g. {', '.join(strays[:3])}.",
            "Download the index and all shards from the same place.",
        )
    return checkpoint


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is not an index of safetensors shards: it has no weight_map.")
    for shard in weight_map.values():
        if not _is_plain_name(shard):
            raise UserError(f"{index} names the shard {shard!r}; expected a .safetensors file name without a folder.")
    return weight_map


def _is_plain_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and is_weights(PurePosixPath(name))
        and "\0" not in name
        and PurePosixPath(name).name == name == PureWindowsPath(name).name
    )


def _from_headers(source: Path, headers: dict[Path, Header], config: dict[str, Any] | None) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file, header in headers.items():
        if twice := tensors.keys() & header.tensors.keys():
            raise UserError(
                f"{source}: tensor {min(twice)!r} is in {tensors[min(twice)].file.name} and in {file.name}."
            )
        tensors |= header.tensors
        metadata |= header.metadata
    if not tensors:
        raise UserError(f"{source} holds no tensors.")
    return Checkpoint(source, tensors, metadata, config, tuple(headers))


def _hint(why: str) -> str:
    """What to do where a file cannot be mapped: some network and FUSE file systems cannot at all."""
    if os.strerror(errno.ENODEV) in why:
        return "Its file system does not map files: copy it to another disk."
    if os.strerror(errno.ENOMEM) in why:
        return "Address space is limited (ulimit -v): raise that limit."
    return "Is it still there?"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `UserError` where there is none."""
    try:
        with open_regular(path) as file:
            content = json.loads(file.read(MAX_JSON_BYTES).decode("utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({type(error).__name__}).", "Download or copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.", "Download or copy it again.")
    return content
