"""Which names a loader's list shows, and which files they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from paralleldit.nodes import host, model_files
from paralleldit.parallel_backend.errors import UserError

KINDS = ("diffusion_models", "checkpoints")


@pytest.fixture
def models(tmp_path: Path, monkeypatch) -> Path:
    """The models' folder of a host that takes no paths."""
    here = host.Host(models=tmp_path / "models")
    here.takes_paths = False
    monkeypatch.setattr(host, "current", lambda: here)
    return tmp_path / "models"


def put(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def listed(*kinds: str) -> list[str]:
    return [name for name in model_files.names(*kinds) if not name.startswith(model_files.BUNDLED)]


def test_files_of_both_kinds_of_folders_are_listed_each_under_a_name_of_its_own(models: Path) -> None:
    both = [models / kind / "sub" / "same.safetensors" for kind in KINDS]
    put(*both, models / "checkpoints" / "sd3.5.safetensors", models / "unet" / "flux.sft")
    assert sorted(listed(*KINDS)) == [
        "checkpoints/sub/same.safetensors",
        "flux.sft",
        "sd3.5.safetensors",
        "sub/same.safetensors",
    ]
    found = [
        model_files.resolve(name, KINDS, "It") for name in ("sub/same.safetensors", "checkpoints/sub/same.safetensors")
    ]
    assert found == both


def test_names_may_end_in_capitals_and_be_written_on_windows(models: Path) -> None:
    put(models / "vae" / "sub" / "A.SafeTensors", models / "vae" / "B.SFT", models / "vae" / "notes.txt")
    assert listed("vae") == ["B.SFT", "sub/A.SafeTensors"]
    assert model_files.resolve("sub\\A.SafeTensors", ("vae",), "It") == models / "vae" / "sub" / "A.SafeTensors"


def test_a_loop_of_links_lists_a_file_once_and_ends(models: Path, tmp_path: Path) -> None:
    other, third = tmp_path / "other disk", tmp_path / "third disk"
    put(models / "vae" / "a.safetensors", other / "b.safetensors", third / "c.safetensors")
    (models / "vae" / "up").symlink_to(models)
    (models / "vae" / "self").symlink_to(models / "vae")
    (models / "vae" / "linked").symlink_to(other)
    (other / "back").symlink_to(models / "vae")
    (other / "further").symlink_to(third)
    (third / "back").symlink_to(other)
    assert listed("vae") == ["a.safetensors", "linked/b.safetensors", "linked/further/c.safetensors"]


@pytest.mark.parametrize(
    ("name", "what", "remedy"),
    [
        ("flux1-dev-Q4_K_S.gguf", "is a GGUF file by its name", "bf16 or fp8 .safetensors file"),
        ("sub\\model.GGUF", "is a GGUF file by its name", "bf16 or fp8 .safetensors file"),
        ("v1-5.ckpt", "is a pickled PyTorch file", "safetensors version"),
    ],
)
def test_a_file_of_a_kind_that_is_never_read_is_not_listed_and_called_what_it_is(models, name, what, remedy) -> None:
    put(models / "unet" / Path(name.replace("\\", "/")))
    assert listed(*KINDS) == []
    with pytest.raises(UserError, match=what) as refused:
        model_files.resolve(name, KINDS, "The model")
    assert remedy in refused.value.hint


def test_a_name_that_is_not_in_utf8_is_named(models: Path) -> None:
    put(models / "vae" / os.fsdecode(b"caf\xe9.safetensors"))
    (name,) = listed("vae")
    with pytest.raises(UserError, match=r"not in UTF-8") as refused:
        model_files.resolve(name, ("vae",), "It")
    assert "Rename" in refused.value.hint


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "absent.safetensors", "..\\secret.safetensors", "/etc/passwd"]
)
def test_what_is_not_in_the_list_is_not_found(name: str, models: Path) -> None:
    put(models / "secret.safetensors", models / "vae" / "a.safetensors")
    with pytest.raises(UserError, match="was not found"):
        model_files.resolve(name, ("vae",), "It")
