"""The pictures that the saved workflows load: ComfyUI's Load Image knows its own input folder only."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from .model_files import BUNDLED, PACK

logger = logging.getLogger(__name__)
PICTURES = PACK / BUNDLED / "input"


def provide(folder: Path) -> None:
    """Puts those into ComfyUI's input `folder` that it lacks, and says so. What is there already stays as it is."""
    for picture in sorted(PICTURES.glob("*.png")):
        copy = folder / picture.name
        if copy.exists():
            continue
        try:
            shutil.copyfile(picture, copy)
        except OSError as error:
            logger.warning(
                "ParallelDiT: %s, of a saved workflow, could not be put into %s: %s", copy.name, folder, error
            )
        else:
            logger.info("ParallelDiT: put %s, of a saved workflow, into %s.", copy.name, folder)
