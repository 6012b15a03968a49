"""`python tools/chaos ...`: loads the pack, whatever its folder is called, as a package, then runs the command."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

PACK = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    # Python put this folder first on the path: its modules would shadow top-level ones of the same names.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != PACK / "tools" / "chaos"]
    package = ModuleType("paralleldit")
    package.__path__ = [str(PACK)]
    sys.modules["paralleldit"] = package
    sys.exit(importlib.import_module("paralleldit.tools.chaos.command").main())
