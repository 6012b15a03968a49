"""Which part of the pack may import which. Imports for type checkers only do not count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

PACK = Path(__file__).resolve().parents[2]
RANKS = "parallel_backend"
HOST = ("comfy", "folder_paths", "latent_preview", "server")
"""Modules of ComfyUI."""
PICKLES = ("pickle", "cloudpickle", "dill")


def ranks(*names: str) -> tuple[str, ...]:
    return tuple(f"{RANKS}/{name}" for name in names)


DATA = ranks("families/spec.py", "families/registry.py", "families/keys/")
"""What nodes and the command line may know of families."""
VAE_DATA = ranks("vae/files/", "vae/tiles.py", "vae/kinds.py")
VIEWS = ranks(
    *(
        f"families/{path.name}"
        for path in (PACK / RANKS / "families").glob("*.py")
        if path.stem not in ("__init__", "spec", "registry")
    )
)


class Imports(NamedTuple):
    """Of one file: files of the pack, and dotted names of what it takes from elsewhere."""

    inside: set[str]
    outside: set[str]


def statements(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from statements(getattr(node, field, []))


def imports_of(file: str, modules: dict[str, str]) -> Imports:
    inside, outside = set[str](), set[str]()
    for node in statements(ast.parse((PACK / file).read_text()).body):
        if isinstance(node, ast.Import):
            outside |= {alias.name for alias in node.names}
        elif node.level == 0:
            outside |= {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            parts = [*file.split("/")[: -node.level], *filter(None, (node.module or "").split("."))]
            for alias in node.names:
                name = "/".join([*parts, alias.name])
                inside.add(modules[name] if name in modules else modules["/".join(parts)])
    return Imports(inside, outside)


@pytest.fixture(scope="module")
def imports() -> dict[str, Imports]:
    tops = ("nodes", "launcher", "cli", RANKS)
    paths = [PACK / "__init__.py", *(path for top in tops for path in (PACK / top).rglob("*.py"))]
    files = [path.relative_to(PACK).as_posix() for path in paths]
    modules = {file.removesuffix(".py").removesuffix("/__init__"): file for file in files}
    return {file: imports_of(file, modules) for file in files}


@pytest.mark.parametrize(
    ("part", "ours", "others"),
    [
        ("", ("cli/", *ranks("worker/")), PICKLES),
        ("launcher/", ("nodes/",), HOST),
        ("cli/", (), HOST),
        ("nodes/", ranks("engine/", "weights/", "strategies/"), ()),
        (f"{RANKS}/", ("nodes/", "launcher/"), HOST),
        *((part, VIEWS, ("torch.nn", "diffusers")) for part in DATA),
        (f"{RANKS}/families/", ranks("weights/", "files/", "strategies/", "engine/"), ()),
        (f"{RANKS}/files/", (), ("torch.distributed", "diffusers")),
        (f"{RANKS}/layout/", ranks("protocol/", "families/"), ("torch.distributed",)),
        (f"{RANKS}/protocol/", ranks("families/"), ("torch.distributed",)),
        (f"{RANKS}/tokens/", ranks("families/", "distributed/"), ("torch.distributed",)),
        (f"{RANKS}/distributed/", ranks("families/", "attention/", "weights/"), ()),
        (f"{RANKS}/attention/", ranks("families/", "strategies/"), ()),
        (f"{RANKS}/weights/", ranks("strategies/", "engine/", "adapters/"), ()),
        (f"{RANKS}/text/", ranks("families/", "weights/", "strategies/"), ()),
        (f"{RANKS}/vae/", ranks("families/", "engine/"), ()),
        (f"{RANKS}/strategies/", ranks("weights/load.py", "engine/"), ()),
        (f"{RANKS}/adapters/", ranks("engine/"), ()),
    ],
)
def test_a_part_never_imports(imports, part, ours, others):
    """`ours`: beginnings of the paths of files, which may import each other; `others`: packages and modules."""
    for file, (inside, outside) in imports.items():
        if not file.startswith(part):
            continue
        rooms = [room for room in ours if not file.startswith(room)]
        assert not [each for each in inside for room in rooms if each.startswith(room)], file
        assert not [each for each in outside for name in others if f"{each}.".startswith(f"{name}.")], file


@pytest.mark.parametrize(
    ("part", "ours"),
    [
        ("launcher/", ranks("errors.py", "protocol/", "machine/")),
        (
            "nodes/",
            (*DATA, *ranks("errors.py", "layout/", "protocol/", "files/", "sampling/names.py"), *VAE_DATA),
        ),
        (f"{RANKS}/sampling/", ranks("errors.py", "sampling/")),
    ],
)
def test_a_part_imports_of_the_ranks_code_only(imports, part, ours):
    for file, (inside, _) in imports.items():
        if file.startswith(part):
            assert not [each for each in inside if each.startswith(f"{RANKS}/") and not each.startswith(ours)], file


def test_only_one_folder_knows_comfyui(imports):
    known = {file for file, each in imports.items() if any(name.split(".")[0] in HOST for name in each.outside)}
    assert known
    assert all(file.startswith("nodes/comfyui/") for file in known), known


def test_no_files_import_each_other_in_a_circle(imports):
    # Python runs the __init__ of a folder before any file in it, without its asking.
    graph = {file: {each for each in found.inside if each != file} for file, found in imports.items()}
    TopologicalSorter(graph).prepare()


def test_no_two_folders_import_each_other(imports):
    """But one in the other may: what its files share lies in the outer one."""
    pairs = {
        (PurePosixPath(file).parent, PurePosixPath(each).parent)
        for file, found in imports.items()
        for each in found.inside
    }
    apart = {(a, b) for a, b in pairs if not a.is_relative_to(b) and not b.is_relative_to(a)}
    assert not {(a, b) for a, b in apart if (b, a) in apart}


def test_few_files_lie_outside_of_rooms():
    loose = [path.name for path in (PACK / RANKS).glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= 3, loose
