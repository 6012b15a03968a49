"""A folder of models with a tiny pipeline, and nodes that talk to a stand-in for the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from paralleldit.launcher import lifecycle
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.nodes import host
from paralleldit.tests.fake_client import FakeClient
from paralleldit.tests.tiny_flux import write_pipeline


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Laid out as ComfyUI's models folder; the pipeline's name is `diffusers/tiny`."""
    folder = tmp_path_factory.mktemp("models")
    write_pipeline(folder / "diffusers" / "tiny")
    return folder


@pytest.fixture
def client(models, tmp_path, monkeypatch) -> Iterator[FakeClient]:
    fake = FakeClient()
    monkeypatch.setattr(lifecycle, "ensure_sidecar", fake.ensure)
    host.use(host.Host(models=models, spec=SidecarSpec(device="cpu", directory=tmp_path / "runtime")))
    yield fake
    host.use(None)
