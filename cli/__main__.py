"""`python <pack>/cli ...`: loads the pack, whatever its folder is called, as a package, then runs the commands."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

PACK = Path(__file__).resolve().parent.parent
PACKAGE = "paralleldit"
INTERRUPTED = 130


def _load_pack() -> None:
    """The pack's own __init__.py imports the nodes; a command needs the package's name and place only."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(PACK)]
    package.__spec__ = importlib.util.spec_from_loader(PACKAGE, loader=None, is_package=True)
    sys.modules[PACKAGE] = package


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit(f"error: ComfyUI-ParallelDiT needs Linux, and this is {sys.platform}. On Windows, run it in WSL2.")
    # Python put this folder first on the path: its modules would shadow top-level ones of the same names.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != PACK / "cli"]
    _load_pack()
    code = importlib.import_module(f"{PACKAGE}.cli.commands.main").main()
    if code == INTERRUPTED:
        # At once: neither for a picture that is being finished, nor for torch's modules to be taken apart.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
