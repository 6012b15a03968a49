"""The saved demo workflow from the command line to a PNG, through a sidecar of two real ranks."""

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
