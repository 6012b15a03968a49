"""`cli bench`: a workflow's run in one layout after the other, on real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paralleldit.cli.commands.bench import Measured, table, usual_layouts
from paralleldit.parallel_backend.layout.fitting import RunFacts, check_layout
from paralleldit.parallel_backend.layout.layout import Layout

PACK = Path(__file__).resolve().parents[2]
NAME = "diffusers/tiny"
SET = (
    *(f"2.model={NAME}", f"Positive.text_encoders={NAME}", f"Negative.text_encoders={NAME}", f"7.vae={NAME}"),
    *("6.steps=3", "6.seed=42", "5.width=64", "5.height=48"),
)
LAYOUTS = (
    "cfg_degree=2",
    "pipefusion_degree=2,stage_blocks=even",
    "pipefusion_degree=2,stage_blocks=even,warmup_steps=3",  # exact
    "data_degree=2",  # of one picture
    "ulysses_degree=3",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, models):
    """Runs the command in a folder of its own, whose sidecar is warm for the next call."""
    folder = tmp_path_factory.mktemp("bench")
    env = os.environ | {"PARALLELDIT_RUNTIME_DIR": str(folder / "runtime"), "OMP_NUM_THREADS": "1"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(PACK / "cli"), *arguments]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=180, check=False)

    def bench(workflow: str, *options: str) -> subprocess.CompletedProcess[str]:
        places = [option for value in SET for option in ("--set", value)]
        path = str(PACK / "workflows" / "api" / workflow)
        return call("bench", path, "--device=cpu", f"--models={models}", "--rounds=1", *places, *options)

    yield bench
    call("stop")


def test_the_run_of_a_workflow_is_measured_in_the_layouts_that_fit_and_on_one_rank(bench):
    done = bench("demo_txt2img.api.json", *(f"--layout={layout}" for layout in LAYOUTS))
    assert done.returncode == 0, done.stderr
    assert "data_degree=2 is left out: data_degree=2 cuts the batch" in done.stderr
    assert "ulysses_degree=3 is left out: The layout's degrees" in done.stderr
    head, _, *rows = done.stdout.splitlines()
    cells = {row.split("|")[1].strip(): [float(cell) for cell in row.split("|")[2:-1]] for row in rows}
    assert "differs from one rank" in head
    assert list(cells) == ["one rank", *LAYOUTS[:3]]
    sent = {name: row[3] for name, row in cells.items()}
    differs = {name: row[5] for name, row in cells.items()}
    assert all(row[0] > 0 and row[2] > 0 and row[4] > 0 for row in cells.values())
    assert (cells["one rank"][2], sent["one rank"], differs["one rank"]) == (1.0, 0.0, 0.0)
    assert max(differs[LAYOUTS[0]], differs[LAYOUTS[2]]) <= 1e-5 < differs[LAYOUTS[1]]
    assert "starting 1 of 1 ranks" in done.stderr


def test_what_cannot_be_measured_is_refused(bench):
    assert "unknown" in bench("demo_txt2img.api.json", "--set=6.sampler_name=unknown").stderr
    nothing = bench("demo_txt2img.api.json", "--layout=ulysses_degree=3", "--no-alone")
    assert nothing.returncode == 1
    assert "in none of these layouts" in nothing.stderr


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_usual_layouts_are_of_as_many_ranks(ranks, guided):
    layouts = usual_layouts(ranks, guided=guided)
    assert len(set(layouts)) == len(layouts) > 0
    for layout in layouts:
        check_layout(layout, RunFacts(ranks=ranks))
    assert any(layout.cfg_degree == 2 for layout in layouts) == (guided and ranks % 2 == 0)
    assert any(layout == Layout(ulysses_degree=ranks) for layout in layouts)


def test_rows_are_medians_beside_the_first():
    latent = torch.ones(1, 4)
    first = Measured(seconds=[4.0, 2.0, 9.0], used=2_000_000_000, latent=latent)
    other = Measured(seconds=[2.0, 1.0, 3.0], sent=3e6, used=1_000_000_000, latent=latent * 1.5)
    *_, row_of_first, row = table({"one rank": first, "ring2": other})
    assert row_of_first == "| one rank | 4.000 | 2.000 | 1.00 | 0.0 | 2.00 | 0.0e+00 |"
    assert row == "| ring2 | 2.000 | 1.000 | 2.00 | 3.0 | 1.00 | 5.0e-01 |"
