"""Runs a module with the path that its launcher gave it: `python bootstrap.py MODULE ARGUMENTS`.

A script of its own, which imports nothing of the pack: the pack's path may hold what PYTHONPATH cannot.
"""

import json
import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    pack, *found = json.loads(os.environ["PARALLELDIT_PATH"])
    beside = Path(__file__).resolve().parent
    sys.path[:] = [pack, *(found or (entry for entry in sys.path if Path(entry or ".").resolve() != beside))]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
