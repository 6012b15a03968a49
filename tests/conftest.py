"""Loads the pack, whatever its folder is called, as the package `paralleldit`."""

import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent


def _load_pack(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if "paralleldit" not in sys.modules:
    _load_pack("paralleldit")
