"""`python tools/chaos ...` and `python tools/chaos soak ...`: loads the pack, whatever its folder is called, as a
package, then runs the command.
"""

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
    name = "soak" if sys.argv[1:2] == ["soak"] else "command"
    sys.exit(importlib.import_module(f"paralleldit.tools.chaos.{name}").main())
