"""Loads the pack, whatever its folder is called, as the package `paralleldit`, to compute with one thread."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

# What tests compute is small: a second thread would spend its time waiting for the first. For ranks, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor have they much to compile: processes that help with it would take longer to start.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

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


def pytest_configure() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: from now on no collection of garbage looks through it."""
    gc.enable()
    gc.collect()
    gc.freeze()
