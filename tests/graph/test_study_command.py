"""`cli study`: a workflow's run by prompts, steps and samplers, and what is written of it."""

from __future__ import annotations

from pathlib import Path

import torch
from paralleldit.cli.commands.main import main
from paralleldit.nodes.study.findings import load
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.fake_client import ANSWERS

PACK = Path(__file__).resolve().parents[2]
NAME = "diffusers/tiny"
SET = (
    *(f"2.model={NAME}", f"Positive.text_encoders={NAME}", f"Negative.text_encoders={NAME}", f"7.vae={NAME}"),
    *("5.width=64", "5.height=48"),
)


def studied(message, tensors):
    """Each change is a tenth, whatever the run."""
    steps = message.schedule.steps
    levels = torch.arange(steps, 0, -1) / steps
    return {
        "latent": tensors["latent"],
        "study.levels": levels,
        "study.changes": torch.full((steps - 1, 3, 6, 2), 0.1),
        "study.whole": torch.full((steps - 1, 3, 2), 0.1),
    }


def test_a_workflow_is_studied_by_prompts_steps_and_samplers(client, models, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(ANSWERS, messages.Sample, studied)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\n\na circle\n")
    places = [option for value in SET for option in ("--set", value)]
    options = ["--prompts", str(prompts), "--into", "Positive.text", "--steps", "4,8", "--samplers", "euler,heun"]
    workflow = str(PACK / "workflows" / "api" / "demo_txt2img.api.json")
    assert main(["study", workflow, "--models", str(models), "--output", str(tmp_path), *places, *options]) == 0
    asked = [message for message, _ in client.sent if isinstance(message, messages.Sample)]
    assert [(each.study, each.cache, each.schedule.steps, each.sampler) for each in asked] == [
        (True, None, steps, sampler) for _ in range(2) for steps in (4, 8) for sampler in ("euler", "heun")
    ]
    assert [message.prompt for message, _ in client.sent if isinstance(message, messages.EncodeText)][::2] == [
        "a star",
        "a circle",
    ]
    said = capsys.readouterr().out
    assert "8 runs of 3 blocks" in said
    assert "correlation" in said
    assert len(list(tmp_path.glob("study *.png"))) == 16, "changes and cosines of each run"
    assert len(load(models / "diffusers" / "tiny").runs) == 8


def test_prompts_without_a_place_for_them_are_refused(client, models, capsys, tmp_path):
    workflow = str(PACK / "workflows" / "api" / "demo_txt2img.api.json")
    assert main(["study", workflow, "--models", str(models), "--prompts", "prompts.txt"]) == 1
    assert "--prompts and --into belong together" in capsys.readouterr().err
