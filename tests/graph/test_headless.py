"""The headless runner over a stand-in for the ranks: it runs what it knows and refuses the rest by name."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from paralleldit import NODE_CLASS_MAPPINGS
from paralleldit.cli.commands import main, options
from paralleldit.cli.commands.workflow_options import read_workflow
from paralleldit.cli.headless.core_nodes import Folders, core_nodes
from paralleldit.cli.headless.runner import begin_workflow, finish_meanwhile
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.protocol import messages
from PIL import Image

PACK = Path(__file__).resolve().parents[2]
NAME = "diffusers/tiny"


@pytest.fixture
def demo() -> dict[str, Any]:
    api = json.loads((PACK / "workflows" / "api" / "demo_txt2img.api.json").read_text())
    for key, name in (("2", "model"), ("3", "text_encoders"), ("4", "text_encoders"), ("7", "vae")):
        api[key]["inputs"][name] = NAME
    return api


def classes(folder: Path) -> dict[str, type]:
    return {**core_nodes(Folders(folder / "input", folder / "output", folder / "temp")), **NODE_CLASS_MAPPINGS}


def run(api, folder, **more):
    return begin_workflow(api, classes=classes(folder), **more).finish()


def test_the_demo_workflow_makes_a_picture_that_carries_the_workflow(client, demo, tmp_path):
    outputs, shown = run(demo, tmp_path)
    assert outputs["8"][0].shape == (1, 256, 256, 3)
    picture = Path(shown["9"]["images"][0]["path"])
    assert picture == tmp_path / "output" / "paralleldit_demo_00001_.png"
    with Image.open(picture) as image:
        assert image.size == (256, 256)
        assert json.loads(image.info["prompt"]) == demo
    assert [type(message).__name__ for message, _ in client.sent] == ["EncodeText", "EncodeText", "Sample", "Decode"]


def test_pictures_are_numbered_on(client, demo, tmp_path):
    demo["5"]["inputs"]["batch_size"] = 2
    paths = [each["filename"] for _ in range(2) for each in run(demo, tmp_path)[1]["9"]["images"]]
    assert paths == [f"paralleldit_demo_{number:05}_.png" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("place", "text", "read"),
    [
        ("6.steps", "5", lambda sample: sample.schedule.steps == 5),
        ("Parallel Sampler.cfg", "1.5", lambda sample: sample.cfg == 1.5),
        ("ParallelDiTSampler.scheduler", "karras", lambda sample: sample.schedule.scheduler == "karras"),
        ("6.seed", "18446744073709551615", lambda sample: sample.seed == 2**64 - 1),
    ],
)
def test_a_value_can_be_set_by_id_title_or_type(client, demo, tmp_path, place, text, read):
    run(demo, tmp_path, set_values={place: text})
    assert read(client.last(messages.Sample)[0])


def test_a_vae_with_ranks_of_its_own_decodes_while_the_next_prompt_samples(client, demo, tmp_path, monkeypatch):
    """Each decode waits for the run after it to sample: were they done in turn, the first would wait in vain."""
    sampled, decoded = [threading.Event() for _ in range(3)], []
    request = client.request

    def answer(message, *args, **kwargs):
        if isinstance(message, messages.Sample):
            sampled[message.seed].set()
        if isinstance(message, messages.Decode):
            assert sampled[min(len(decoded) + 1, 2)].wait(20)
            decoded.append(threading.current_thread() is threading.main_thread())
        return request(message, *args, **kwargs)

    monkeypatch.setattr(client, "request", answer)
    saved = []

    def runs():
        for seed in range(3):
            values = {"6.seed": str(seed), "7.own_ranks": "1"}
            yield (
                begin_workflow(demo, classes=classes(tmp_path), set_values=values),
                lambda shown: saved.append(shown["9"]["images"][0]["filename"]),
            )

    finish_meanwhile(runs())
    assert decoded == [False] * 3
    assert saved == [f"paralleldit_demo_{number:05}_.png" for number in (1, 2, 3)]


def test_what_fails_while_it_finishes_is_told(client, demo, tmp_path, monkeypatch):
    def fail(message, *args, **kwargs):
        if isinstance(message, messages.Decode):
            raise UserError("No room.")
        return request(message, *args, **kwargs)

    request = client.request
    monkeypatch.setattr(client, "request", fail)
    run = begin_workflow(demo, classes=classes(tmp_path), set_values={"7.own_ranks": "1"})
    with pytest.raises(UserError, match="No room"):
        finish_meanwhile(iter([(run, print)]))


def test_what_is_set_is_what_the_picture_tells(client, demo, tmp_path):
    _, shown = run(demo, tmp_path, set_values={"Positive.text": "two stars"})
    with Image.open(shown["9"]["images"][0]["path"]) as image:
        assert json.loads(image.info["prompt"])["3"]["inputs"]["text"] == "two stars"
    assert demo["3"]["inputs"]["text"] != "two stars"


@pytest.mark.parametrize(
    ("place", "text", "words"),
    [
        ("steps", "5", ("NODE.INPUT",)),
        ("99.steps", "5", ("'99'", "6 (Parallel Sampler)")),
        ("Parallel Text Encode.text", "x", ("'Parallel Text Encode'", "3 (Positive)")),
        ("ParallelDiTTextEncode.text", "x", ("2 nodes", "3, 4")),
        ("6.stepz", "5", ("'stepz'", "steps")),
        ("6.model", "5", ("'model'", "seed")),
        ("6.steps", "many", ("steps", "INT", "'many'")),
        ("6.steps", "0", ("steps=0", "minimum of 1")),
        ("6.scheduler", "magic", ("Unknown scheduler 'magic'",)),
        ("1.attention", "magic", ("attention", "'magic'", "sdpa")),
    ],
)
def test_a_value_that_cannot_be_set_is_named(client, demo, tmp_path, place, text, words):
    with pytest.raises(UserError) as error:
        run(demo, tmp_path, set_values={place: text})
    assert all(word in str(error.value) for word in words), error.value
    assert not client.sent


def edited(*changes):
    def edit(api):
        for path, value in changes:
            *path, last = path.split(".")
            place = api
            for key in path:
                place = place[key]
            if value is None:
                del place[last]
            else:
                place[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edited(("5.class_type", "KSamplerX"), ("8.class_type", "VAEDecodeX")), ("KSamplerX, VAEDecodeX", "ComfyUI")),
        (edited(("6.inputs.model", ["9", 0])), ("circle", "6", "9", "8")),
        (edited(("6.inputs.model", ["77", 0])), ("node 6", "77", "not in the workflow")),
        (edited(("6.inputs.model", ["2", 3])), ("output 3", "node 2", "1")),
        (edited(("6.inputs.model", ["5", 0])), ("model takes MODEL", "LATENT")),
        (edited(("6.inputs.model", None)), ("node 6", "'model'")),
        (edited(("6.inputs.model", "flux")), ("model", "another node", "MODEL")),
        (edited(("6.inputs.cfg", "high")), ("cfg", "FLOAT", "'high'")),
        (edited(("6.inputs.cfg", 1000)), ("cfg=1000", "100")),
        (edited(("9", None)), ("no output",)),
        (edited(("1.inputs.ulysses_degree", 3)), ("ulysses_degree=3", "2 ranks")),
        (edited(("2.inputs.model", "nothing")), ("'nothing'", NAME)),
        (edited(("9.inputs.filename_prefix", "../../x")), ("../../x", "output folder")),
    ],
)
def test_a_workflow_that_cannot_run_is_refused_with_the_reason(client, demo, tmp_path, edit, words):
    edit(demo)
    with pytest.raises(UserError) as error:
        run(demo, tmp_path)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "edit",
    [
        edited(("6.inputs.upload", "image")),
        edited(("6.inputs.magic", ["77", 3])),
        edited(("6._meta", None)),
        edited(("6.inputs.control_after_generate", {"__value__": [1, 2]})),
    ],
    ids=["button", "link of another pack", "no title", "list"],
)
def test_what_the_runner_does_not_know_of_a_node_is_left_aside(client, demo, tmp_path, edit):
    edit(demo)
    run(demo, tmp_path)


WRITTEN = {
    "UTF-8": ("utf-8", lambda api: api),
    "with a mark": ("utf-8-sig", lambda api: api),
    "UTF-16": ("utf-16", lambda api: api),
    "UTF-16 without a mark": ("utf-16-le", lambda api: api),
    "as sent to ComfyUI": ("utf-8", lambda api: {"prompt": api, "client_id": "x"}),
}


@pytest.mark.parametrize(("encoding", "wrapped"), WRITTEN.values(), ids=WRITTEN)
def test_a_workflow_may_be_written_as_windows_does(demo, tmp_path, encoding, wrapped):
    demo["2"]["inputs"]["text"] = "Bücher, 猫, 🐈"
    path = tmp_path / "workflow.JSON"
    path.write_bytes(json.dumps(wrapped(demo), ensure_ascii=False).encode(encoding))
    assert read_workflow(path) == demo


def test_a_workflow_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "workflow.json"
    path.write_bytes('{"1": {"class_type": "X", "inputs": {"text": "Bücher"}}}'.encode("cp1252"))
    with pytest.raises(UserError, match="encoding that is none of JSON's: byte 47"):
        read_workflow(path)


def test_half_a_character_of_a_prompt_is_named(client, demo, tmp_path):
    key = next(key for key, node in demo.items() if node["class_type"] == "ParallelDiTTextEncode")
    demo[key]["inputs"]["text"] = "a cat \ud83d, sleeping"
    with pytest.raises(UserError, match=r"half a character \(U\+D83D\) at position 7, after 'a cat '"):
        run(demo, tmp_path)


@pytest.mark.parametrize("api", [{}, {"1": []}, {"1": {"class_type": 3, "inputs": {}}}, {"last_node_id": 3}])
def test_what_is_no_workflow_is_refused(client, tmp_path, api):
    with pytest.raises(UserError, match="not a workflow"):
        run(api, tmp_path)


def test_an_editor_workflow_is_refused_with_what_to_give(client, tmp_path):
    with pytest.raises(UserError, match="Export"):
        run(json.loads((PACK / "workflows" / "demo_txt2img.json").read_text()), tmp_path)


def test_a_workflow_for_comfyui_is_refused_naming_the_nodes_that_only_run_there(client, tmp_path):
    api = json.loads((PACK / "workflows" / "api" / "flux_txt2img.api.json").read_text())
    with pytest.raises(UserError, match=r"only run in ComfyUI: CLIPTextEncode, DualCLIPLoader\."):
        run(api, tmp_path)


def test_nodes_whose_inputs_are_the_same_do_not_run_again(client, demo, tmp_path):
    cache: dict[str, Any] = {}
    for prompt in ("one", "two"):
        run(demo, tmp_path, set_values={"Positive.text": prompt}, cache=cache)
    prompts = [message.prompt for message, _ in client.sent if isinstance(message, messages.EncodeText)]
    assert sorted(prompts) == ["", "one", "two"]
    assert sum(isinstance(message, messages.Sample) for message, _ in client.sent) == 2


def test_a_fault_in_a_node_names_the_node(client, demo, tmp_path):
    client.fault = UserError("The text encoder is broken.", "Mend it.")
    with pytest.raises(UserError, match=r"node \d \((Positive|Negative)\): The text encoder is broken. Mend it."):
        run(demo, tmp_path)


class Image2Latent:
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"
    seen: ClassVar[list[torch.Tensor]] = []

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE", {}), "mask": ("MASK", {})}}

    def encode(self, image, mask):
        self.seen[:] = [image, mask]
        return ({"samples": torch.ones(1, 16, 2, 2)},)


def test_primitives_and_pictures_feed_other_nodes(client, demo, tmp_path):
    (tmp_path / "input").mkdir()
    pixels = np.zeros((16, 24, 4), dtype=np.uint8)
    pixels[:, :12] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "input" / "half.png")
    demo |= {
        "20": {"class_type": "PrimitiveInt", "inputs": {"value": 4}},
        "21": {"class_type": "PrimitiveFloat", "inputs": {"value": 2.5}},
        "22": {"class_type": "PrimitiveString", "inputs": {"value": "a ring"}},
        "23": {"class_type": "LoadImage", "inputs": {"image": "half.png"}},
        "24": {"class_type": "Image2Latent", "inputs": {"image": ["23", 0], "mask": ["23", 1]}},
        "25": {"class_type": "PreviewImage", "inputs": {"images": ["23", 0]}},
    }
    demo["6"]["inputs"] |= {"steps": ["20", 0], "cfg": ["21", 0], "latent_image": ["24", 0]}
    demo["3"]["inputs"]["text"] = ["22", 0]
    _, shown = begin_workflow(demo, classes=classes(tmp_path) | {"Image2Latent": Image2Latent}).finish()
    message, _ = client.last(messages.Sample)
    assert (message.schedule.steps, message.cfg) == (4, 2.5)
    assert "a ring" in [each.prompt for each, _ in client.sent if isinstance(each, messages.EncodeText)]
    picture, mask = Image2Latent.seen
    assert torch.equal(picture[0, 0, [0, -1]], torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    assert torch.equal(mask[0, 0, [0, -1]], torch.tensor([0.0, 1.0]))
    assert Path(shown["25"]["images"][0]["path"]).parent == tmp_path / "temp"


class Latent2Frames:
    """A frame of a third grey more for each of the latent's."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT", {})}}

    def decode(self, samples):
        batch, channels, frames, height, width = samples["samples"].shape
        assert (batch, channels) == (1, 16)
        greys = torch.arange(frames).view(-1, 1, 1, 1) / 3
        return (greys.expand(frames, 8 * height, 8 * width, 3),)


def test_a_video_is_saved_as_a_moving_picture_that_carries_the_workflow(client, tmp_path):
    settings = {"fps": 8.0, "lossless": True, "quality": 80, "method": "fastest", "filename_prefix": "clips/video"}
    api = {
        "1": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 48, "height": 32, "length": 9, "batch_size": 1},
        },
        "2": {"class_type": "Latent2Frames", "inputs": {"samples": ["1", 0]}},
        "3": {"class_type": "SaveAnimatedWEBP", "inputs": {"images": ["2", 0], **settings}},
    }
    for number in (1, 2):
        _, shown = begin_workflow(api, classes=classes(tmp_path) | {"Latent2Frames": Latent2Frames}).finish()
        path = tmp_path / "output" / "clips" / f"video_0000{number}_.webp"
        assert shown["3"]["images"] == [{"filename": path.name, "subfolder": "clips", "path": str(path)}]
    with Image.open(path) as moving:
        assert (moving.n_frames, moving.size) == (3, (48, 32))
        greys = []
        for frame in range(3):
            moving.seek(frame)
            greys.append(moving.convert("RGB").getpixel((5, 5))[0])
    assert greys == [0, 85, 170]
    assert read_workflow(path)["3"]["inputs"]["fps"] == 8.0


def test_a_picture_that_is_not_there_is_named_before_anything_runs(client, demo, tmp_path):
    demo["23"] = {"class_type": "LoadImage", "inputs": {"image": "none.png"}}
    demo["25"] = {"class_type": "PreviewImage", "inputs": {"images": ["23", 0]}}
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        run(demo, tmp_path)
    assert not client.sent


# -- the command ---------------------------------------------------------------------------------------------------


def command(demo, folder, models, *more):
    path = folder / "demo.json"
    path.write_text(json.dumps(demo))
    places = [f"--output={folder / 'out'}", f"--models={models}", "--device=cpu"]
    return main.main(["run", str(path), *places, *more])


def test_the_command_tells_where_the_picture_is_and_how_it_was_made(client, demo, models, tmp_path, capsys):
    assert command(demo, tmp_path, models, "--set", "6.seed=5") == options.OK
    told = capsys.readouterr().out
    assert str(tmp_path / "out" / "paralleldit_demo_00001_.png") in told
    for line in ("seed              5", "layout            cfg2", "ranks             2 on cpu", "seconds per step"):
        assert line in told


def test_the_command_runs_once_for_every_prompt_of_a_file(client, demo, models, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a star\n\ntwo rings\n")
    more = ("--prompts", str(tmp_path / "prompts.txt"), "--into", "Positive.text")
    assert command(demo, tmp_path, models, *more) == options.OK
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    prompts = {message.prompt for message, _ in client.sent if isinstance(message, messages.EncodeText)}
    assert prompts == {"a star", "two rings", ""}


def test_the_workflow_in_a_picture_runs_again(client, demo, models, tmp_path, capsys):
    assert command(demo, tmp_path, models) == options.OK
    picture = tmp_path / "out" / "paralleldit_demo_00001_.png"
    assert main.main(["run", str(picture), f"--output={tmp_path / 'again'}", f"--models={models}"]) == options.OK
    assert (tmp_path / "again" / "paralleldit_demo_00001_.png").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--set", "6.steps"), "NODE.INPUT=VALUE"),
        (("--prompts", "nowhere.txt"), "--into"),
        (("--prompts", "nowhere.txt", "--into", "Positive.text"), "nowhere.txt"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(client, demo, models, tmp_path, capsys, more, words):
    assert command(demo, tmp_path, models, *more) == options.FAILED
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[1]", None])
def test_a_file_that_is_no_workflow_is_named(client, tmp_path, capsys, content):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    assert main.main(["run", str(path)]) == options.FAILED
    assert "broken.json" in capsys.readouterr().err


# -- the saved workflows -------------------------------------------------------------------------------------------

SAVED = sorted(path.name.removesuffix(".api.json") for path in (PACK / "workflows" / "api").glob("*.api.json"))
CONTROL = "control_after_generate"


def saved(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = PACK / "workflows"
    return json.loads((folder / f"{name}.json").read_text()), json.loads(
        (folder / "api" / f"{name}.api.json").read_text()
    )


def widget_names(node_class: type) -> list[str]:
    groups = node_class.INPUT_TYPES()
    names = []
    for name, spec in (*groups["required"].items(), *groups.get("optional", {}).items()):
        if isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            names += [name, CONTROL] if spec[1].get(CONTROL) else [name]
    return names


@pytest.mark.parametrize("name", SAVED)
def test_the_editor_workflow_and_its_api_twin_agree(client, tmp_path, name):
    ui, api = saved(name)
    ui["nodes"] = [node for node in ui["nodes"] if node["type"] != "MarkdownNote"]
    known = classes(tmp_path)
    links = {link[0]: link for link in ui["links"]}
    assert {str(node["id"]): node["type"] for node in ui["nodes"]} == {
        key: entry["class_type"] for key, entry in api.items()
    }
    for node in ui["nodes"]:
        entry = api[str(node["id"])]
        wired = {slot["name"]: links[slot["link"]] for slot in node["inputs"]}
        linked = {each: [str(link[1]), link[2]] for each, link in wired.items()}
        values = copy.copy(node["widgets_values"])
        if node["type"] in known:
            names = widget_names(known[node["type"]])
            assert len(names) == len(values), node["type"]
            widgets = {each: value for each, value in zip(names, values, strict=True) if each != CONTROL}
            optional = known[node["type"]].INPUT_TYPES().get("optional", {})
            left_out = {each: optional[each][1].get("default") for each in widgets if each in optional}
            given = {each: value for each, value in entry["inputs"].items() if each not in linked}
            assert left_out | given == widgets
        else:
            assert [value for each, value in entry["inputs"].items() if each not in linked] == values
        assert {each: value for each, value in entry["inputs"].items() if each in linked} == linked
        for slot, (each, link) in enumerate(wired.items()):
            source = next(other for other in ui["nodes"] if other["id"] == link[1])
            assert link[3:5] == [node["id"], slot], each
            assert link[0] in source["outputs"][link[2]]["links"]
            assert source["outputs"][link[2]]["type"] == link[5] == node["inputs"][slot]["type"]


@pytest.mark.parametrize("name", SAVED)
def test_every_node_of_a_saved_workflow_is_where_it_can_be_seen(name):
    ui, _ = saved(name)
    boxes = [(*node["pos"], *node["size"]) for node in ui["nodes"]]
    for index, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[index + 1 :]:
            apart = x + width <= other_x or other_x + other_width <= x
            assert apart or y + height <= other_y or other_y + other_height <= y


def test_the_demo_is_what_the_readme_says():
    _, api = saved("demo_txt2img")
    assert api["2"]["inputs"]["model"] == "demo_model/flux-tiny"
    assert api["1"]["inputs"]["ranks"] == 0, "all GPUs, or two CPU ranks"
    assert (api["5"]["inputs"]["width"], api["5"]["inputs"]["height"]) == (256, 256)
