"""The saved demo workflow from the command line to a PNG and to measurements, through a sidecar of two real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PACK = Path(__file__).resolve().parents[2]
NAME = "diffusers/tiny"
SET = (f"2.model={NAME}", f"Positive.text_encoders={NAME}", f"Negative.text_encoders={NAME}", f"7.vae={NAME}")
SMALL = ("6.steps=2", "6.seed=42", "5.width=64", "5.height=48")
LAYOUTS = (
    "cfg_degree=2",
    "pipefusion_degree=2,stage_blocks=even",
    "pipefusion_degree=2,stage_blocks=even,warmup_steps=3",  # exact
    "data_degree=2",  # of one picture
    "ulysses_degree=3",
)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory, models):
    """Runs a command of the launcher in a folder of its own, and ends the sidecar at the end."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "models").symlink_to(models)
    env = os.environ | {"PARALLELDIT_RUNTIME_DIR": str(folder / "runtime"), "OMP_NUM_THREADS": "1"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(PACK / "cli"), *arguments]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=180, check=False)

    call.folder = folder
    yield call
    call("stop")


def run_demo(launcher, *more: str) -> subprocess.CompletedProcess[str]:
    workflow = str(PACK / "workflows" / "api" / "demo_txt2img.api.json")
    places = [option for value in (*SET, *SMALL) for option in ("--set", value)]
    return launcher("run", workflow, "--device=cpu", "--models=models", *places, *more)


def bench(launcher, *options: str) -> subprocess.CompletedProcess[str]:
    workflow = str(PACK / "workflows" / "api" / "demo_txt2img.api.json")
    places = [option for value in (*SET, *SMALL, "6.steps=3") for option in ("--set", value)]
    return launcher("bench", workflow, "--device=cpu", "--models=models", "--rounds=1", *places, *options)


def pixels(folder: Path) -> np.ndarray:
    with Image.open(folder / "paralleldit_demo_00001_.png") as image:
        return np.array(image).astype(int)


def test_one_command_makes_a_picture_and_the_sidecar_stays_for_the_next(launcher):
    first = run_demo(launcher, "--output=first")
    assert first.returncode == 0, first.stderr
    assert "starting 2 of 2 ranks on cpu" in first.stderr
    picture = Path("first") / "paralleldit_demo_00001_.png"
    for line in (f"{picture}", "seed              42", "layout            cfg2", "ranks             2 on cpu"):
        assert line in first.stdout
    again = run_demo(launcher, "--output=again")
    assert "starting" not in again.stderr
    pictures = [pixels(launcher.folder / name) for name in ("first", "again")]
    assert pictures[0].shape == (48, 64, 3)
    assert pictures[0].std() > 1
    assert np.array_equal(*pictures)


def test_a_fault_in_the_ranks_is_told_and_then_every_layout_makes_the_same_picture(launcher):
    broken = run_demo(launcher, "--output=broken", "--set", "1.attention=flash2")
    assert broken.returncode == 1
    assert "node 6 (Parallel Sampler)" in broken.stderr
    assert "flash" in broken.stderr
    assert not list((launcher.folder / "broken").glob("*.png"))
    pictures = []
    for degree in ("ulysses", "ring"):
        done = run_demo(launcher, f"--output={degree}", "--set", "6.cfg=1", "--set", f"1.{degree}_degree=2")
        assert f"layout            {degree}2" in done.stdout, done.stderr
        assert "starting" not in done.stderr
        pictures.append(pixels(launcher.folder / degree))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_what_cannot_be_measured_is_refused(launcher):
    assert "unknown" in bench(launcher, "--set=6.sampler_name=unknown").stderr
    nothing = bench(launcher, "--layout=ulysses_degree=3", "--no-alone")
    assert nothing.returncode == 1
    assert "in none of these layouts" in nothing.stderr


def test_the_run_of_a_workflow_is_measured_in_the_layouts_that_fit_and_on_one_rank(launcher):
    done = bench(launcher, *(f"--layout={layout}" for layout in LAYOUTS))
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


def test_a_vae_with_ranks_of_its_own_decodes_beside_those_that_sample(launcher):
    (launcher.folder / "prompts.txt").write_text("a circle\na square\n")
    run_demo(launcher, "--output=usual", "--set", "Positive.text=a square")
    prompts = ("--prompts=prompts.txt", "--into=Positive.text", "--set", "7.own_ranks=1")
    beside = run_demo(launcher, "--output=beside", *prompts)
    assert "starting 1 of 1 ranks on cpu" in beside.stderr
    with Image.open(launcher.folder / "beside" / "paralleldit_demo_00002_.png") as image:
        assert np.abs(np.array(image).astype(int) - pixels(launcher.folder / "usual")).max() <= 1
    assert "2 ranks on cpu" in launcher("status").stdout
    assert "1 ranks on cpu" in launcher("status", "--vae").stdout
    assert launcher("stop").stdout == "the sidecar has ended\nthe sidecar of the VAE has ended\n"
