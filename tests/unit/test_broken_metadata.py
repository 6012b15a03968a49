"""What stands beside weights and cannot be read is refused: without it the weights would mean something else."""

import pytest
import torch
from paralleldit.parallel_backend.adapters.lora.file import METADATA, read_lora
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.files import open_checkpoint
from paralleldit.parallel_backend.files.controlnet import read_controlnet
from safetensors.torch import save_file


class EveryName:
    """A model that has modules of all names."""

    def __contains__(self, name):
        return True

    def places(self, name, leaf):
        return ()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("{broken", "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        ('{"transformer.lora_alpha": "eight"}', "lora_alpha='eight'"),
    ],
)
def test_a_lora_whose_scale_cannot_be_read_is_refused(tmp_path, metadata, words):
    parts = {"layer.lora_A.weight": torch.ones(2, 4), "layer.lora_B.weight": torch.ones(4, 2)}
    save_file(parts, tmp_path / "lora.safetensors", {METADATA: metadata})
    with pytest.raises(UserError, match=words) as refused:
        read_lora(open_checkpoint(tmp_path / "lora.safetensors"), EveryName())
    assert "lora.safetensors" in str(refused.value)


@pytest.mark.parametrize(("config", "words"), [("[]", "is not a JSON object"), ("{broken", "is not valid JSON")])
def test_a_controlnets_config_that_cannot_be_read_is_refused(tmp_path, config, words):
    save_file({"controlnet_x_embedder.weight": torch.ones(4, 4)}, tmp_path / "net.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=words):
        read_controlnet(tmp_path / "net.safetensors")
