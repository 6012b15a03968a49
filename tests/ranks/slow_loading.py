"""Real ranks that take a second for each tensor of a model in a folder of the name "slow", and never read "stuck"."""

from __future__ import annotations

import os
import time

from parallel_backend.weights.reader import Reader
from parallel_backend.worker.__main__ import _engine, main

_read = Reader.read


def read(self: Reader, entry):
    path = str(self.checkpoint.source)
    if "slow" in path:
        time.sleep(1.0)
    if "stuck" in path and os.environ["RANK"] == "1":
        self.checkpoint.source.with_suffix(".pipe").read_bytes()
    return _read(self, entry)


if __name__ == "__main__":
    Reader.read = read
    main(_engine)
