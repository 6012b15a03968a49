"""What specs say of published models is what ComfyUI's own detection says of their weights.

`COMFYUI_PATH` names a checkout of ComfyUI, `COMFYUI_PYTHON` a Python that has its requirements (by default this one).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paralleldit.parallel_backend.adapters.lora.module_names import WEIGHT, Names, Place
from paralleldit.parallel_backend.files.key_map import ruled_map
from paralleldit.tests.comfyui import detection_host as host
from paralleldit.tests.unit.test_family_configs import PUBLISHED, original_shapes, shapes_of

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
]

MODELS = [name for name, (spec, _) in PUBLISHED.items() if spec.host_config is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("published")
    for name in MODELS:
        spec, config = PUBLISHED[name]
        shapes = original_shapes(spec, shapes_of(name))
        place.joinpath(f"{name}.json").write_text(json.dumps({"family": spec.name, "config": config, "shapes": shapes}))
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, "-W", "ignore", str(Path(host.__file__)), str(place)]
    env = os.environ | {"PYTHONPATH": str(Path(host.__file__).parent / "shim")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, f"ComfyUI's side failed:\n{done.stderr[-3000:]}"
    return place


def answer_of(name: str, folder: Path) -> dict[str, Any]:
    file = folder / f"{name}.host.json"
    if not file.exists():
        pytest.skip("this ComfyUI is older than the family")
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_the_host_detects_what_the_spec_says(name, folder):
    answer = answer_of(name, folder)
    detected, said = (_ordered(answer[side]) for side in ("detected", "said"))
    # Either leaves out what the network's class has by default.
    assert {key: said[key] for key in detected.keys() & said} == {key: detected[key] for key in detected.keys() & said}
    assert not [key for key in detected.keys() - said if detected[key]]
    assert len(set(answer["classes"])) == 1


@pytest.mark.parametrize("name", MODELS)
def test_rules_read_all_weights_of_the_hosts_network(name, folder):
    spec, _ = PUBLISHED[name]
    shapes = answer_of(name, folder)["shapes"]
    of_files = {key: tuple(shape) for key, shape in shapes.items() if key not in spec.not_weights}
    # It raises for keys that are missing, left over or of another shape.
    assert ruled_map(spec.rules, of_files, shapes_of(name)).keys() == shapes_of(name).keys()


@pytest.mark.parametrize("name", MODELS)
def test_loras_may_name_weights_as_the_hosts_loader_takes_them(name, folder):
    spec, _ = PUBLISHED[name]
    names = Names(spec, shapes_of(name))
    said = answer_of(name, folder)["loras"]
    others = {}
    for called, target in said.items():
        key, rows, *functions = [target, None] if isinstance(target, str) else target
        places = names.original.get(key.removeprefix("diffusion_model."), ())
        if rows:
            places = [part for place in places if (part := place.of(*rows[1:]))]
        if functions:  # it swaps the halves, as the rule of that weight does
            places = [replace(place, rows=place.rows.roll(len(place.rows) // 2)) for place in places]
        ours = names.places(called, WEIGHT) if called in names else ()
        # ComfyUI has names for weights that not all models of the family have.
        if places and [_rows(place) for place in ours] != [_rows(place) for place in places]:
            others[called] = target
    assert not others


def _rows(place: Place) -> tuple[str, list[int]]:
    return place.parameter, place.rows.tolist()


def _ordered(config: dict[str, Any]) -> dict[str, Any]:
    """Numbers of blocks in their order, which the host has from the last to the first."""
    layers = "x_block_self_attn_layers"
    return {**config, layers: sorted(config[layers])} if layers in config else config
